"""Text to token ids and back; the whole of byte-pair encoding is left to tiktoken.

A byte-pair encoder starts from small units and keeps joining the two neighbours whose joined piece
stands first in its table. tiktoken starts from bytes and reads such a table, `piece -> rank`.
Three kinds of files are translated into it, and a second table says which ids each rank stands for:

    tokenizer.json     byte-level BPE (GPT-2, SmolLM2, our miniature): its merges are the order.
    tokenizer.model    SentencePiece BPE (Mistral, Mixtral, Llama 2): a space is written `▁`, also
                       before the first word, and a character without a piece becomes its bytes.
                       Here the units are characters, so the table puts together each character
                       first, byte by byte, and then the longer pieces by their score:

                           256 bytes | E2 96, E2 96 81 = ▁ | ... every character ... | ▁t | in | ...

                       UTF-8 never confuses two characters; hence the ids are SentencePiece's own.
                       (A `tokenizer.json` made from such a file works too.)
    tekken.json        Mistral's later files (Nemo, Pixtral): already tiktoken's table; the special
                       tokens take the first ids, so a piece's id is its rank and their number.

Special tokens (`<s>`, `</s>`, `[INST]`) are never found in text: whoever wants one asks for it by
name, so a user who types `</s>` gets its letters and no control token.
"""

import base64
import functools
import json
import struct
from itertools import chain

import tiktoken

from data.hub import local_folder

# GPT-2's pattern: words keep their leading space, numbers and punctuation stay apart.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same where each digit is a token of its own, without the space before it (SmolLM2).
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
WORD = r"[\p{L}\p{N}]"
UNASSIGNED = "\uffff"  # neither letter nor number in any Unicode
MARK = "▁"  # SentencePiece's space, U+2581
# No piece has a MARK after another character, so text may be cut before every run of them.
MARK_PATTERN = f"{MARK}*[^{MARK}]+|{MARK}+"


@functools.cache
def words_of_tiktoken():
    """An encoding whose ids are the bytes of the letters and numbers in a text."""
    bytes_alone = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("", pat_str=WORD, mergeable_ranks=bytes_alone, special_tokens={})


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`; `special["</s>"]` gives a control token's id.

    pieces: {bytes: tuple of ids}, in the order in which they are joined. fallback: the ids of the
    256 bytes, if it is a SentencePiece. names: the special tokens that begin and end a text.
    `files` are what it was read from, to be copied beside a checkpoint.
    """

    def __init__(self, pieces, special, pattern, fallback=(), names=("<s>", "</s>"), files=()):
        self.special, self.files, self.mark = special, tuple(files), MARK if fallback else ""
        self.pattern = pattern
        missing = [name for name in names if name not in special]
        if missing:
            source = self.files[0] if self.files else "the tokenizer"
            raise ValueError(f"{source}: has no special token {missing[0]!r}; name its own as "
                             '"bos_token" and "eos_token" in tokenizer_config.json')  # fmt: skip
        self.bos, self.eos = (special[name] for name in names)
        self.ids = list(pieces.values())  # rank -> ids
        for i in chain(special.values(), *self.ids):
            if type(i) is not int or not 0 <= i < 2**31:
                raise TypeError(f"{i!r:.40} is no token id")
        self.bytes_of = {i: bytes([b]) for b, i in enumerate(fallback)}
        self.bytes_of |= {ids[0]: piece for piece, ids in pieces.items() if len(ids) == 1}
        self.vocab_size = max(*(max(ids, default=0) for ids in self.ids), *special.values()) + 1
        self.gone = bytes(b for b in range(256) if pieces[bytes([b])] == ())  # have no token
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.bpe = tiktoken.Encoding(
            "nanocumo", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text, start=True):
        """Token ids of `text`, no special token added. `start=False`: it goes on after other text
        (only SentencePiece cares: it writes a space before the beginning of a text)."""
        if self.mark and text:
            text = (self.mark if start else "") + text.replace(" ", self.mark)
        raw = text.encode(errors="replace") if self.gone else b""
        whole = len(raw.translate(None, self.gone)) == len(raw)
        try:
            ranks = self.bpe.encode_ordinary(text) if whole else self.ranks_around_gaps(text)
        except BaseException as error:  # of a pattern that cuts out nothing, or goes round for ever
            if type(error).__name__ != "PanicException":  # which Rust raises, and is no Exception
                raise
            source = self.files[0] if self.files else "the tokenizer"
            raise ValueError(f"{source}: its pattern {self.pattern!r:.80} does not cut every text "
                             "into words") from None  # fmt: skip
        return [*chain.from_iterable(map(self.ids.__getitem__, ranks))]

    def ranks_around_gaps(self, text):
        """Ranks of a text with bytes that have no token (SmolLM2: some control characters). Like
        `tokenizers`, take them out of a word first, then join what has become neighbours."""
        import regex  # tiktoken needs it too, but has cut text itself, by an older Unicode

        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken
        words = "".join(set(regex.findall(WORD, text)))
        known = bytes(words_of_tiktoken().encode_ordinary(words)).decode()
        plain = text.translate({ord(c): UNASSIGNED for c in set(words) - set(known)})
        words = (text[slice(*m.span())] for m in regex.finditer(self.pattern, plain))
        words = (word.encode(errors="replace") for word in words)
        words = filter(None, (word.translate(None, self.gone) for word in words))
        return [rank for word in words for rank in self.bpe._encode_single_piece(word)]

    def decode(self, ids):
        """The text of `ids`; special tokens are left out. Bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(self.bytes_of.get(int(i), b"") for i in ids).decode(errors="replace")
        return text.removeprefix(self.mark).replace(self.mark, " ") if self.mark else text

    @classmethod
    def from_pretrained(cls, path):
        """Read a model directory's `tokenizer.model`, or else its `tekken.json`, or else its
        `tokenizer.json`; the names of the first and last token from `tokenizer_config.json`.
        ValueError for kinds unknown here."""
        path = local_folder(path, "tokenizer")
        read = {"tokenizer.model": read_sentencepiece, "tekken.json": read_tekken,
                "tokenizer.json": read_tokenizer_json}  # fmt: skip
        file = next((path / name for name in read if (path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{path} holds no {', '.join(read)}; copy the model's there")
        config = path / "tokenizer_config.json"
        files = [file, config] if config.is_file() else [file]
        named = read_json(config) if config.is_file() else {}
        try:
            names = [named.get("bos_token") or "<s>", named.get("eos_token") or "</s>"]
            names = [name["content"] if isinstance(name, dict) else name for name in names]
            return cls(*read[file.name](file), names=names, files=files)
        except (LookupError, TypeError, AttributeError, struct.error, ValueError) as error:
            if str(error).startswith(f"{file}: "):  # it is told already
                raise
            raise ValueError(f"{file}: is damaged or not a {file.name} ({error!r:.80})") from None


def read_json(file):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not valid JSON ({error}); download it again") from None


# ------------------------------------------------------------------------------- tokenizer.json


def byte_alphabet():
    """GPT-2's printable stand-in for each byte, as used in the pieces of `tokenizer.json`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def read_tokenizer_json(file):
    """The arguments of `Tokenizer` from a file of Hugging Face's `tokenizers`."""
    spec = read_json(file)
    if spec["model"]["type"] != "BPE":
        raise ValueError(f"{file}: is a {spec['model']['type']} tokenizer; only BPE is known here")
    vocab = spec["model"]["vocab"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
    joined = list(dict.fromkeys(a + b for a, b in merges))
    special = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}

    if spec["model"].get("byte_fallback"):  # SentencePiece in the clothes of `tokenizers`
        steps = str([spec["normalizer"], spec["pre_tokenizer"]])
        if "Prepend" not in steps and "Metaspace" not in steps:
            raise ValueError(f"{file}: writes no {MARK} before a text, which is not known here")
        characters = [piece for piece in vocab if len(piece) == 1]
        fallback = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        pieces = {piece: vocab[piece] for piece in characters + joined if piece not in special}
        return sentencepiece_table(file, pieces, fallback), special, MARK_PATTERN, fallback

    alphabet = byte_alphabet()
    byte_of = {c: b for b, c in alphabet.items()}
    pieces = {bytes([b]): (vocab[c],) if c in vocab else () for b, c in alphabet.items()}
    pieces |= {bytes(byte_of[c] for c in piece): (vocab[piece],) for piece in joined}
    return pieces, special, split_pattern(file, spec)


def split_pattern(file, spec):
    """The regular expression that cuts text into words before a byte-level BPE merges."""
    steps = spec["pre_tokenizer"]
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    kinds = [step["type"] for step in steps]
    if not spec["normalizer"] and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return DIGITS_PATTERN
        if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
            return steps[0]["pattern"]["Regex"]
    raise ValueError(f"{file}: prepares text in a way not known here ({' + '.join(kinds)}"
                     f"{' after a normalizer' if spec['normalizer'] else ''})")  # fmt: skip


# ---------------------------------------------------------------------------------- tekken.json

# Files older than version v11 do not list their special tokens; these are the first.
TEKKEN_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()


def read_tekken(file):
    """The arguments of `Tokenizer` from a file of Mistral's own `mistral-common`."""
    spec = read_json(file)
    config, listed = spec["config"], spec.get("special_tokens")
    special = {name: i for i, name in enumerate(TEKKEN_SPECIAL)}
    if listed:
        special = {token["token_str"]: token["rank"] for token in listed}
    first = config["default_num_special_tokens"]
    if not 0 <= first <= 2**20:
        raise ValueError(f"{file}: cannot have {first!r:.40} special tokens")
    special |= {f"<SPECIAL_{i}>": i for i in range(len(special), first)}
    # the file holds more pieces than the model has embeddings
    vocab = spec["vocab"][: config["default_vocab_size"] - first]
    pieces = {base64.b64decode(t["token_bytes"]): (first + t["rank"],) for t in vocab}
    if not pieces or [i for (i,) in pieces.values()] != [*range(first, first + len(vocab))]:
        raise ValueError(f"{file}: its pieces are not in the order of their ranks; fetch it again")
    return pieces, special, config["pattern"]


# ------------------------------------------------------------------------------ tokenizer.model


def protobuf(message):
    """The fields of a protobuf message, in order: (number, an int or the raw bytes)."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
        else:
            end = {1: 8, 2: 0, 5: 4}[wire] or varint()
            yield number, message[at : at + end]
            at += end
    if at > len(message):
        raise IndexError("the file ends too early")


def read_sentencepiece(file):
    """The arguments of `Tokenizer` from a SentencePiece model of Mistral's and Llama 2's kind."""
    model = list(protobuf(file.read_bytes()))
    trainer, normalizer = (dict(protobuf(dict(model)[number])) for number in (2, 3))
    changes_text = normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(3, 1)
    if trainer.get(3) != 2 or changes_text:
        raise ValueError(f"{file}: is no SentencePiece BPE that takes text as it is and puts a "
                         "space before it, as Mistral's and Llama 2's do")  # fmt: skip
    scored, special, fallback = [], {}, {}
    for i, field in enumerate(value for number, value in model if number == 1):
        piece = dict(protobuf(field))
        text, kind = piece[1].decode(), piece.get(3, 1)
        if kind == 1:
            scored.append((-struct.unpack("<f", piece[2])[0], i, text))
        elif kind == 6:  # a byte, <0x41>
            fallback[int(text[3:5], 16)] = i
        elif kind in (2, 3, 4):  # unknown, control, user-defined: by name only
            special[text] = i
    pieces = {text: i for _, i, text in sorted(scored)}
    fallback = [fallback[b] for b in range(256)]
    return sentencepiece_table(file, pieces, fallback), special, MARK_PATTERN, fallback


def sentencepiece_table(file, pieces, fallback):
    """{text: id}, best first, and the ids of the 256 bytes -> {bytes: ids} in tiktoken's order."""
    if any(MARK in piece.lstrip(MARK) for piece in pieces):
        raise ValueError(f"{file}: has pieces of several words, which are not known here")
    table = {bytes([b]): (i,) for b, i in enumerate(fallback)}
    for character in dict.fromkeys("".join(pieces)):
        raw = character.encode()
        spelled = tuple(fallback[b] for b in raw)
        for n in range(2, len(raw)):
            table[raw[:n]] = spelled[:n]
        table[raw] = (pieces[character],) if character in pieces else spelled
    return table | {piece.encode(): (i,) for piece, i in pieces.items() if len(piece) > 1}


# ------------------------------------------------------------------------------------- training


def train_bpe(texts, vocab_size, special=("<unk>", "<s>", "</s>")):
    """Learn byte-level BPE merges from `texts` and return the contents of a `tokenizer.json`.

    Counting whole words once and merging inside them is all there is to BPE (Sennrich et al. 2016).
    """
    import collections

    import regex

    alphabet = byte_alphabet()
    counts = collections.Counter(w for text in texts for w in regex.findall(GPT2_PATTERN, text))
    words = {tuple(alphabet[b] for b in w.encode()): n for w, n in counts.items()}
    vocab = {piece: i for i, piece in enumerate([*special, *alphabet.values()])}
    merges = []
    while len(vocab) < vocab_size:
        pairs = collections.Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break  # every word is one piece already
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(list(best))
        vocab["".join(best)] = len(vocab)
        words = {merge_pair(word, best): n for word, n in words.items()}
    return byte_level_json(vocab, merges, special)


def byte_level_json(vocab, merges, special, single_digits=False):
    """The contents of a `tokenizer.json`. single_digits: each digit a word of its own (SmolLM2)."""
    added = [
        {"id": vocab[t], "content": t, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False} for t in special
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}  # fmt: skip
    steps = [{"type": "Digits", "individual_digits": True}, byte_level]
    digits = {"type": "Sequence", "pretokenizers": steps}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": vocab, "merges": merges}  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": digits if single_digits else byte_level,
            "post_processor": None, "decoder": byte_level, "model": model}  # fmt: skip


def merge_pair(word, pair):
    """Join every occurrence of `pair` in a word (a tuple of pieces), from left to right."""
    out, i = [], 0
    while i < len(word):
        joined = word[i : i + 2] == pair
        out.append(word[i] + word[i + 1] if joined else word[i])
        i += 2 if joined else 1
    return tuple(out)
