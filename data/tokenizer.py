"""Text to token ids and back; tiktoken does the byte-pair encoding.

A byte-pair encoder starts from small units and repeatedly joins the two neighbours whose joined
piece has the lowest rank in a table. tiktoken starts from bytes and takes a table `piece -> rank`.
Three kinds of files are translated into such a table; a second table maps ranks to token ids:

    tokenizer.json     byte-level BPE (GPT-2, SmolLM2, our miniature); the merges give the ranks.
    tokenizer.model    SentencePiece BPE (Mistral, Mixtral, Llama 2). A space is written `▁`, also
                       before the first word; a character without a piece becomes its bytes.
                       SentencePiece starts from characters, so the table first builds every
                       character from its bytes, then the longer pieces in the order of their score:

                           256 bytes | E2 96, E2 96 81 = ▁ | ... every character ... | ▁t | in | ...

                       No character's UTF-8 bytes contain another's, so the ids are exactly
                       SentencePiece's. (A `tokenizer.json` made from such a file works too.)
    tekken.json        Mistral's later files (Nemo, Pixtral): already a table for tiktoken. Special
                       tokens have the first ids, so a piece's id is its rank plus their number.

Special tokens (`<s>`, `</s>`, `[INST]`) are never recognised in text, only looked up by name. A
user who types `</s>` gets ordinary letters, not a control token. Added tokens that are not special
(`<think>`) are words: text is cut at them first.
"""

import base64
import functools
import json
import re
import struct
from itertools import chain

import tiktoken

from data.hub import NEAR_TOKENIZERS, TOKENIZERS, local_folder
from data.weights import check_fetched

# GPT-2's pattern: words keep their leading space, numbers and punctuation stay apart.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same, but each digit is a word of its own, without the space before it (SmolLM2).
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
WORD = r"[\p{L}\p{N}]"
UNASSIGNED = "\uffff"  # neither letter nor number in any version of Unicode
MARK = "▁"  # SentencePiece's space, U+2581
# No piece has a MARK after another character, so text may be cut before every run of MARKs.
MARK_PATTERN = f"{MARK}*[^{MARK}]+|{MARK}+"


@functools.cache
def words_of_tiktoken():
    """An encoding that gives the UTF-8 bytes of the letters and numbers in a text, by tiktoken's
    own version of Unicode."""
    bytes_alone = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding("", pat_str=WORD, mergeable_ranks=bytes_alone, special_tokens={})


class Tokenizer:
    """`encode(text) -> ids`, `decode(ids) -> text`; `special["</s>"]` is a special token's id.

    pieces: {bytes: tuple of ids}, in the order in which they are joined. fallback: the ids of the
    256 bytes, for SentencePiece only. prefix: whether SentencePiece's space comes before a text
    ("always"), before one that has none ("missing") or "never"; again: after an added token, too;
    strips: `decode` removes it.
    words: ({added token: id}, {those that are searched after the space was put there: id}).
    names: the special tokens at the beginning and end of a text. files: the files that belong to
    it, copied into every checkpoint. chat_template: the model's own (data/chat_template.py).
    """

    def __init__(self, pieces, special, pattern, fallback=(), prefix="always", again=False,
                 strips=True, words=({}, {}), names=("<s>", "</s>"), files=(),
                 chat_template=""):  # fmt: skip
        self.special, self.files, self.mark = special, tuple(files), MARK if fallback else ""
        self.pattern, self.prefix, self.again, self.strips = pattern, prefix, again, strips
        self.chat_template = chat_template
        missing = [name for name in names if name not in special]
        if missing:
            source = self.files[0] if self.files else "the tokenizer"
            raise ValueError(f"{source}: has no special token {missing[0]!r}; name its own as "
                             '"bos_token" and "eos_token" in tokenizer_config.json')  # fmt: skip
        self.bos, self.eos = (special[name] for name in names)
        self.ids = list(pieces.values())  # rank -> ids
        self.words = words[0] | words[1]
        for i in chain(special.values(), self.words.values(), *self.ids):
            if type(i) is not int or not 0 <= i < 2**31:
                raise TypeError(f"{i!r:.40} is no token id")
        self.bytes_of = {i: bytes([b]) for b, i in enumerate(fallback)}
        self.bytes_of |= {ids[0]: piece for piece, ids in pieces.items() if len(ids) == 1}
        byte_of = {} if fallback else {c: b for b, c in byte_alphabet().items()}
        for word, i in self.words.items():  # as in `tokenizers`, "é" stands for a byte here, too
            raw = [byte_of.get(c) for c in word]
            self.bytes_of[i] = word.encode() if None in raw else bytes(raw)
        longest_first = (sorted(some, key=len, reverse=True) for some in words)
        self.cut, self.cut_again = ("|".join(map(re.escape, some)) for some in longest_first)
        self.vocab_size = max(0, *self.bytes_of, *special.values(), *chain(*self.ids)) + 1
        control = (special[mark] for mark in (*names, *MARKS) if mark in special)
        # Ids below this one are written. Others, such as a padding token's, need no row in a model.
        self.written = max(0, *self.bytes_of, *chain(*self.ids), *control) + 1
        self.gone = bytes(b for b in range(256) if pieces[bytes([b])] == ())  # without a token
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.bpe = tiktoken.Encoding(
            "nanocumo", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text, start=True):
        """Token ids of `text`, without special tokens. `start=False`: the text continues another
        one, so SentencePiece puts no space before it."""
        ids = []
        for part, word in pieces_between(self.cut, text):
            if self.mark and part:
                part = part.replace(" ", MARK)
                bare = self.prefix == "always" or not part.startswith(MARK)
                part = MARK * (start and bare and self.prefix != "never") + part
            for rest, known in pieces_between(self.cut_again, part):
                ids += self.join(rest)
                ids += [self.words[known]] if known else []
            ids += [self.words[word]] if word else []
            start = self.again
        return ids

    def join(self, text):
        """The ids of a text without added tokens, each space written as SentencePiece's."""
        raw = text.encode(errors="replace") if self.gone else b""
        whole = len(raw.translate(None, self.gone)) == len(raw)
        try:
            ranks = self.bpe.encode_ordinary(text) if whole else self.ranks_around_gaps(text)
        except BaseException as error:  # Rust's PanicException is not an Exception
            if type(error).__name__ != "PanicException":  # its pattern matches nothing, or too long
                raise
            source = self.files[0] if self.files else "the tokenizer"
            raise ValueError(f"{source}: its pattern {self.pattern!r:.80} does not cut every text "
                             "into words") from None  # fmt: skip
        return [*chain.from_iterable(map(self.ids.__getitem__, ranks))]

    def ranks_around_gaps(self, text):
        """Ranks of a text with bytes that have no token (SmolLM2: some control characters). Like
        `tokenizers`, remove these bytes from each word first, then merge the rest."""
        import regex  # installed with tiktoken; its Unicode is newer than the one in tiktoken

        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # like tiktoken
        words = "".join(set(regex.findall(WORD, text)))
        known = bytes(words_of_tiktoken().encode_ordinary(words)).decode()
        plain = text.translate({ord(c): UNASSIGNED for c in set(words) - set(known)})
        words = (text[slice(*m.span())] for m in regex.finditer(self.pattern, plain))
        words = (word.encode(errors="replace") for word in words)
        words = filter(None, (word.translate(None, self.gone) for word in words))
        return [rank for word in words for rank in self.bpe._encode_single_piece(word)]

    def decode(self, ids):
        """The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.bytes_of.get(int(i), b"") for i in ids).decode(errors="replace")
        text = text.removeprefix(self.mark * self.strips)
        return text.replace(self.mark, " ") if self.mark else text

    @classmethod
    def from_pretrained(cls, path):
        """Read the first of `tokenizer.model`, `tekken.json` and `tokenizer.json` that a model
        directory has; the files near it name bos, eos and added tokens. ValueError for a damaged
        file or an unknown kind."""
        path = local_folder(path, "tokenizer")
        read = {"tokenizer.model": read_sentencepiece, "tekken.json": read_tekken,
                "tokenizer.json": read_tokenizer_json}  # fmt: skip
        file = next((path / name for name in read if (path / name).is_file()), None)
        if file is None:
            raise ValueError(f"{path} holds no {', '.join(read)}; copy the model's there")
        config = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            config |= read_near(path, name)
        try:
            names = [text_of(config.get(key)) or usual
                     for key, usual in (("bos_token", "<s>"), ("eos_token", "</s>"))]  # fmt: skip
            found = {"added": [], "normalizes": False} | read[file.name](file)
            added, late = found.pop("added") + listed(path, config), found.pop("normalizes")
            found |= sort_added(file, added, config, found["special"], late)
            if file.name == "tokenizer.model":
                found["again"] = config.get("legacy") is True
            near = [path / name for name in (*TOKENIZERS, *NEAR_TOKENIZERS) if name != file.name]
            files = [file, *(other for other in near if other.is_file())]
            template = read_chat_template(path, config)
            tokenizer = cls(**found, names=names, files=files, chat_template=template)
        except (LookupError, TypeError, AttributeError, struct.error, ValueError) as error:
            if str(error).startswith(f"{file}: "):  # raised by `read`, already clear
                raise
            raise ValueError(f"{file}: is damaged or not a {file.name} ({error!r:.80})") from None
        rows = read_near(path, "config.json").get("vocab_size")
        if type(rows) is int and tokenizer.written > rows:
            last = tokenizer.written - 1
            raise ValueError(f"{file}: writes ids up to {last}, and the model has rows for {rows} "
                             "(vocab_size in config.json): take the tokenizer that belongs to "
                             "it")  # fmt: skip
        return tokenizer


def pieces_between(pattern, text):
    """Cut a text at what the pattern finds: (text before it, what was found) and the rest."""
    at = 0
    for found in re.finditer(pattern, text) if pattern else ():
        yield text[at : found.start()], found[0]
        at = found.end()
    yield text[at:], ""


def read_json(file):
    check_fetched(file)
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not valid JSON ({error}); download it again") from None


def read_near(path, name):
    """The object in a JSON file of the folder; {} if there is none."""
    content = read_json(path / name) if (path / name).is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path / name}: holds no JSON object; download it again")
    return content


def read_chat_template(path, config):
    """The text of the model's chat template, the one called "default" of several; "" if none."""
    file, own = path / "chat_template.jinja", config.get("chat_template") or ""
    if isinstance(own, list):
        own = {one["name"]: one["template"] for one in own}.get("default", "")
    return file.read_text(encoding="utf-8") if file.is_file() else str(own)


# --------------------------------------------------------------------------------- added tokens

MARKS = ("<|im_start|>", "<|im_end|>")  # control tokens of ChatML, whatever their flag says


def text_of(token):
    return token["content"] if isinstance(token, dict) else token


def listed(path, config):
    """The added tokens that the files near a `tokenizer.model` list."""
    ids = read_near(path, "added_tokens.json")
    tokens = [{"content": content, "id": i} for content, i in ids.items()]
    return tokens + [
        token | {"id": int(i)} for i, token in config.get("added_tokens_decoder", {}).items()
    ]


def sort_added(file, added, config, special, late):
    """Which added tokens are special, and which are words -> the arguments of `Tokenizer`.

    Special: those with the flag, those that the config names, and ChatML's. late: words are
    searched after spaces were replaced. ValueError for words with flags that we do not follow.
    """
    named = [v for key, v in config.items() if key.endswith("_token")]
    named += config.get("additional_special_tokens") or []
    named, special, words, tokens = {*MARKS, *map(text_of, named)}, dict(special), ({}, {}), {}
    for token in added:
        tokens[token["content"]] = tokens.get(token["content"], {}) | token
    for word, token in tokens.items():
        if token.get("special") or word in named or word in special:
            special.setdefault(word, token["id"])
            continue
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"{file}: the added token {word!r:.40} has {flag}, which is "
                                 "known here only for special tokens")  # fmt: skip
        if late and token.get("normalized", True):
            words[1][MARK + word.replace(" ", MARK)] = token["id"]
        else:
            words[0][word] = token["id"]
    return {"special": special, "words": words}


# ------------------------------------------------------------------------------- tokenizer.json


def byte_alphabet():
    """byte -> the printable character that stands for it in `tokenizer.json` (from GPT-2)."""
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
    added = spec["added_tokens"]
    special = {t["content"]: t["id"] for t in added if t["special"]}

    if spec["model"].get("byte_fallback"):  # converted from SentencePiece
        characters = [piece for piece in vocab if len(piece) == 1]
        fallback = [vocab[f"<0x{b:02X}>"] for b in range(256)]
        pieces = {piece: vocab[piece] for piece in characters + joined if piece not in special}
        return dict(pieces=sentencepiece_table(file, pieces, fallback), special=special,
                    pattern=MARK_PATTERN, fallback=fallback, added=added,
                    **space_before(file, spec))  # fmt: skip

    alphabet = byte_alphabet()
    byte_of = {c: b for b, c in alphabet.items()}
    pieces = {bytes([b]): (vocab[c],) if c in vocab else () for b, c in alphabet.items()}
    pieces |= {bytes(byte_of[c] for c in piece): (vocab[piece],) for piece in joined}
    return dict(pieces=pieces, special=special, pattern=split_pattern(file, spec), added=added)


def space_before(file, spec):
    """How a `tokenizer.json` that was SentencePiece writes spaces: the arguments of `Tokenizer`.

    ValueError for a way that is not known here; it names the field.
    """
    normalizer, step, decoder = spec["normalizer"], spec["pre_tokenizer"], spec.get("decoder")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prepend = {"type": "Prepend", "prepend": MARK}
    if step is None and normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return dict(prefix="always", again=True, normalizes=True)
    if normalizer is not None or not step or step["type"] != "Metaspace":
        raise ValueError(f"{file}: puts {MARK} into a text in a way not known here (normalizer "
                         f"{str(normalizer):.200}, pre_tokenizer {str(step):.200})")  # fmt: skip
    scheme = step.get("prepend_scheme", "always")
    split, schemes = step.get("split", True), ("always", "first", "never")
    fields = {"replacement": (step["replacement"], (MARK,)), "split": (split, (False,)),
              "prepend_scheme": (scheme, schemes)}  # fmt: skip
    for field, (value, known) in fields.items():
        if value not in known:
            raise ValueError(f"{file}: Metaspace with {field} {value!r:.40} is not known here, "
                             f"only {' and '.join(map(str, known))}")  # fmt: skip
    plain = not decoder or decoder["type"] == "Metaspace"
    return dict(prefix="never" if scheme == "never" else "missing", again=scheme == "always",
                strips=scheme != "never" if plain else "Strip" in str(decoder))  # fmt: skip


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

# Files before version v11 do not list their special tokens; they have these first.
TEKKEN_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()


def read_tekken(file):
    """The arguments of `Tokenizer` from a file of Mistral's `mistral-common`."""
    spec = read_json(file)
    config, own = spec["config"], spec.get("special_tokens")
    special = {name: i for i, name in enumerate(TEKKEN_SPECIAL)}
    if own:
        special = {token["token_str"]: token["rank"] for token in own}
    first = config["default_num_special_tokens"]
    if not 0 <= first <= 2**20:
        raise ValueError(f"{file}: cannot have {first!r:.40} special tokens")
    special |= {f"<SPECIAL_{i}>": i for i in range(len(special), first)}
    # the file has more pieces than the model has embeddings
    vocab = spec["vocab"][: config["default_vocab_size"] - first]
    pieces = {base64.b64decode(t["token_bytes"]): (first + t["rank"],) for t in vocab}
    if not pieces or [i for (i,) in pieces.values()] != [*range(first, first + len(vocab))]:
        raise ValueError(
            f"{file}: its pieces are not in the order of their ranks; download it again"
        )
    return dict(pieces=pieces, special=special, pattern=config["pattern"])


# ------------------------------------------------------------------------------ tokenizer.model


def protobuf(message):
    """Yields the fields of a protobuf message: (number, an int or raw bytes)."""
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
    """The arguments of `Tokenizer` from a SentencePiece model like Mistral's and Llama 2's."""
    check_fetched(file)
    model = list(protobuf(file.read_bytes()))
    trainer, normalizer = (dict(protobuf(dict(model)[number])) for number in (2, 3))
    changes_text = normalizer.get(2) or normalizer.get(4, 1) or not normalizer.get(3, 1)
    if trainer.get(3) != 2 or changes_text:
        raise ValueError(f"{file}: is no SentencePiece BPE without normalization and with a space "
                         "before the text, like Mistral's and Llama 2's")  # fmt: skip
    scored, special, fallback = [], {}, {}
    for i, field in enumerate(value for number, value in model if number == 1):
        piece = dict(protobuf(field))
        text, kind = piece[1].decode(), piece.get(3, 1)
        if kind == 1:
            scored.append((-struct.unpack("<f", piece[2])[0], i, text))
        elif kind == 6:  # a byte, <0x41>
            fallback[int(text[3:5], 16)] = i
        elif kind in (2, 3, 4):  # unknown, control, user-defined: looked up by name only
            special[text] = i
    pieces = {text: i for _, i, text in sorted(scored)}
    fallback = [fallback[b] for b in range(256)]
    return dict(pieces=sentencepiece_table(file, pieces, fallback), special=special,
                pattern=MARK_PATTERN, fallback=fallback)  # fmt: skip


def sentencepiece_table(file, pieces, fallback):
    """{text: id}, best score first, and the ids of the 256 bytes -> {bytes: ids}, by rank."""
    if any(MARK in piece.lstrip(MARK) for piece in pieces):
        raise ValueError(f"{file}: has pieces of several words; this kind is not known here")
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

    Count the words once, then merge the most frequent pair inside them, again and again (Sennrich
    et al. 2016).
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
    """The contents of a `tokenizer.json`. single_digits: each digit is its own word (SmolLM2)."""
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
