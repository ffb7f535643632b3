"""Tokenizers: the same ids as the reference libraries, lossless, no special tokens from text.

Independent references: Hugging Face's `tokenizers`, `sentencepiece` on Mistral's own model, and
`mistral-common` on its tekken files.
"""

import base64
import copy
import json
import pathlib
import random
import shutil

import pytest
from given import given, settings, st

from bench.public_models import (
    ALPHABETS,
    MINI,
    MINI_JSON,
    MISTRAL,
    added,
    reference_of,
    sentencepiece_json,
    some_texts,
    spaces_by,
    with_words,
    write,
)
from data.tokenizer import Tokenizer, byte_alphabet, merge_pair, protobuf, train_bpe

mistral_common = pytest.importorskip("mistral_common")
sentencepiece = pytest.importorskip("sentencepiece")
tokenizers = pytest.importorskip("tokenizers")

text = st.one_of(st.text(max_size=40), st.text(st.sampled_from("".join(ALPHABETS)), max_size=60))


@pytest.fixture(scope="module")
def mini():
    return Tokenizer.from_pretrained(MINI)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(MISTRAL / "tokenizer.model.v1", folder / "tokenizer.model")
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sp():
    return sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL / "tokenizer.model.v1"))


MINI_REFERENCE = reference_of(MINI_JSON)


# -------------------------------------------------------------------------------- byte-level BPE


@settings(max_examples=300, deadline=None)
@given(text=text)
def test_miniature_ids_equal_tokenizers_and_text_comes_back(mini, text):
    ids = mini.encode(text)
    assert ids == MINI_REFERENCE(text)
    assert mini.decode(ids) == text
    assert mini.encode(text, start=False) == ids


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")  # fmt: skip


@pytest.mark.parametrize("kind", ["smollm2 (single digits)", "llama 3 (its own pattern)"])
def test_other_ways_to_cut_words_equal_tokenizers(kind, tmp_path):
    blanks = [
        "a  b   c    d\n\n\n  e\t\tf",
        "12  345   6",
        "x \n y\r\n",
    ] * 9  # for tokens of many blanks
    spec, last = train_bpe(blanks, vocab_size=300), MINI_JSON["pre_tokenizer"]
    first = {"type": "Digits", "individual_digits": True}
    if kind.startswith("llama"):
        first = {
            "type": "Split",
            "pattern": {"Regex": LLAMA3},
            "behavior": "Isolated",
            "invert": False,
        }
        last = last | {"use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, last]}
    ours = Tokenizer.from_pretrained(write(tmp_path, spec))
    reference = reference_of(spec)
    for text in some_texts(1500):
        ids = ours.encode(text)
        assert ids == reference(text), text
        assert ours.decode(ids) == text


def test_byte_without_a_token_is_left_out_as_tokenizers_does(tmp_path):
    spec = copy.deepcopy(MINI_JSON)
    gone = spec["model"]["vocab"].pop(byte_alphabet()[0x8D])  # the second byte of "č"
    ours, reference = Tokenizer.from_pretrained(write(tmp_path, spec)), reference_of(spec)
    for text in ("č", "čas a čaj", "cat"):
        assert ours.encode(text) == reference(text)
        assert gone not in ours.encode(text)


def test_word_without_its_tokenless_bytes_is_joined_as_tokenizers_does(tmp_path):
    spec, alphabet = copy.deepcopy(MINI_JSON), byte_alphabet()
    for byte in "č".encode():
        spec["model"]["vocab"].pop(alphabet[byte])
    ours, reference = Tokenizer.from_pretrained(write(tmp_path, spec)), reference_of(spec)
    assert ours.encode("cačt") == ours.encode("cat") and ours.encode("čč") == []
    some = "".join(ALPHABETS) + "č" * 40
    rng = random.Random(5)
    for text in ["cačt", " č.", "a č b", *("".join(rng.choices(some, k=20)) for _ in range(500))]:
        assert ours.encode(text) == reference(text), text


def test_letters_newer_than_the_librarys_unicode_cut_words_as_in_tokenizers(tmp_path):
    spec, alphabet = copy.deepcopy(MINI_JSON), byte_alphabet()
    new = "\u209e"  # a letter to `regex`, but not to tiktoken and tokenizers
    for byte in new.encode():
        spec["model"]["vocab"].pop(alphabet[byte])
    ours, reference = Tokenizer.from_pretrained(write(tmp_path, spec)), reference_of(spec)
    for text in (f"ca{new}t", f"the cat{new}s {new}dog {new}", f"{new}čt"):
        assert ours.encode(text) == reference(text), text


def test_training_learns_the_commonest_pair_first():
    spec = train_bpe(["aab aab aab ab"] * 3, vocab_size=3 + 256 + 3)
    assert spec["model"]["merges"][0] == ["a", "b"]
    assert [len(pair) for pair in spec["model"]["merges"]] == [2, 2, 2]
    assert list(spec["model"]["vocab"])[:3] == ["<unk>", "<s>", "</s>"]
    assert merge_pair(("a", "a", "b", "a", "b"), ("a", "b")) == ("a", "ab", "ab")
    few = train_bpe(["ab"], vocab_size=10_000)  # stops when every word is one piece
    assert len(few["model"]["vocab"]) == 3 + 256 + 1


def test_training_on_text_gives_what_tokenizers_reads_the_same(tmp_path):
    corpus = ["the cat sat on the mat", "the dog sat on the log", "12 cats, 3 dogs"] * 5
    spec = train_bpe(corpus, vocab_size=300)
    ours, reference = Tokenizer.from_pretrained(write(tmp_path, spec)), reference_of(spec)
    for text in [*corpus, *some_texts(200)]:
        assert ours.encode(text) == reference(text)


# --------------------------------------------------------------------------------- SentencePiece


def test_sentencepiece_ids_equal_sentencepiece(mistral, sp):
    for text in some_texts(6000, seed=1):
        ids = mistral.encode(text)
        assert ids == sp.encode(text), text
        assert mistral.decode(ids) == sp.decode(ids) == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(text=text)
def test_sentencepiece_ids_equal_sentencepiece_on_any_unicode(mistral, sp, text):
    assert mistral.encode(text) == sp.encode(text)


def test_sentencepiece_runs_of_one_character(mistral, sp):
    for character in " \n\tae0-=.█é你😀":
        for n in (*range(1, 40), 63, 64, 65, 150):
            for text in (character * n, "a" + character * n + "b", character * n + " " + character):
                assert mistral.encode(text) == sp.encode(text), (character, n)


def test_sentencepiece_of_a_whole_book(mistral, sp):
    book = pathlib.Path(__file__).parents[1].joinpath("LICENSE").read_text()
    assert mistral.encode(book) == sp.encode(book)
    assert mistral.decode(mistral.encode(book)) == book


def test_text_that_goes_on_gets_no_space_before_it(mistral):
    whole = mistral.encode("What is this? a cat ")
    assert mistral.encode("What is this?") + mistral.encode(" a cat ", start=False) == whole
    assert mistral.encode("cat")[0] != mistral.encode("cat", start=False)[0]
    assert mistral.encode("") == mistral.encode("", start=False) == []


def test_any_text_can_be_cut_before_a_space(mistral, sp):
    for text in some_texts(1500, seed=2):
        head, space, tail = text.replace("▁", " ").partition(" ")
        if head and space:
            ids = mistral.encode(head) + mistral.encode(space + tail, start=False)
            assert ids == sp.encode(text)


def test_bytes_decode_and_broken_bytes_become_the_replacement_character(mistral):
    euro = [3 + byte for byte in "€".encode()]  # after <unk>, <s> and </s> come the bytes
    assert mistral.decode(euro) == "€"
    assert mistral.decode(euro[:2] + mistral.encode("cat", start=False)) == "\ufffdcat"
    assert mistral.decode([3 + ord("A")]) == "A"  # though "A" has a piece of its own
    assert mistral.decode([10**6, *mistral.encode("cat")]) == "cat"  # an id that does not exist


def test_later_models_of_mistral_read_too(tmp_path):
    file = MISTRAL / "mistral_instruct_tokenizer_240323.model.v3"
    shutil.copy(file, tmp_path / "tokenizer.model")
    ours = Tokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert ours.vocab_size == 32768 and ours.special["[INST]"] == 3
    for text in some_texts(500):
        if "[INST]" not in text:  # sentencepiece recognises [INST] in text, we do not
            assert ours.encode(text) == reference.encode(text)


def test_sentencepiece_in_a_tokenizer_json_gives_the_same_ids(mistral, sp, tmp_path):
    spec = sentencepiece_json(sp)
    ours, reference = Tokenizer.from_pretrained(write(tmp_path, spec)), reference_of(spec)
    assert ours.vocab_size == mistral.vocab_size == 32000
    for text in some_texts(1000, seed=3):
        assert ours.encode(text) == mistral.encode(text) == reference(text)
        assert ours.encode(text, start=False) == mistral.encode(text, start=False)


SCHEMES = pytest.mark.parametrize("scheme", ["Prepend", "always", "first", "never"])


@SCHEMES
def test_space_before_a_text_is_as_in_tokenizers(scheme, sp, tmp_path):
    spec = spaces_by(sp, scheme)
    ours, theirs = Tokenizer.from_pretrained(write(tmp_path, spec)), reference_of(spec)
    decode = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []})).decode
    for text in [" x", "▁x", "  x", "▁", " ", "x", *some_texts(1500, seed=6)]:
        ids = ours.encode(text)
        assert ids == theirs(text), text
        assert ours.decode(ids) == decode(ids), text


def test_metaspace_of_transformers_itself(sp, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = sentencepiece_json(sp)["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    for prefix in (True, False):
        theirs = transformers.LlamaTokenizer(model["vocab"], merges, add_prefix_space=prefix)
        theirs.save_pretrained(tmp_path)
        ours = Tokenizer.from_pretrained(tmp_path)
        for text in [" x", "▁x", "x", *some_texts(300, seed=7)]:
            if not any(mark in text for mark in ("<s>", "</s>", "<unk>")):
                ids = theirs.encode(text, add_special_tokens=False)
                assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids), text


@pytest.mark.parametrize("change, complaint", [
    (dict(split=True), "Metaspace with split True is not known here"),
    (dict(replacement="_"), "Metaspace with replacement '_' is not known"),
    (dict(prepend_scheme="last"), "prepend_scheme 'last' is not known here, only always and first"),
    (dict(type="Whitespace"), "in a way not known here .*Whitespace"),
])  # fmt: skip
def test_other_ways_to_write_spaces_are_refused_by_name(change, complaint, sp, tmp_path):
    spec = spaces_by(sp, "first")
    spec["pre_tokenizer"] |= change
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.from_pretrained(write(tmp_path, spec))
    spec = spaces_by(sp, "Prepend")
    spec["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})
    with pytest.raises(ValueError, match="in a way not known here .*NFKC"):
        Tokenizer.from_pretrained(write(tmp_path, spec))


# ----------------------------------------------------------------------------------- added tokens


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "Prepend", "always", "first", "never"])
def test_added_tokens_are_words_as_in_tokenizers(kind, normalized, sp, tmp_path):
    spec = copy.deepcopy(MINI_JSON) if kind == "bytes" else spaces_by(sp, kind)
    spec, words = with_words(spec, normalized=normalized)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    names = [added(name, i, special=True) for i, name in enumerate(("<unk>", "<s>", "</s>"))]
    ours = Tokenizer.from_pretrained(
        write(tmp_path, spec | {"added_tokens": names + spec["added_tokens"]})
    )
    rng, found = random.Random(8), set()
    for _ in range(800):
        text = "".join(rng.choices([*words, *words, " ", "▁", "a", "b ", "č", "\n"], k=9))
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
        found.update(ids)
    assert {token["id"] for token in spec["added_tokens"]} <= found


def test_added_tokens_near_a_tokenizer_model_are_read(tmp_path, sp):
    """OpenHermes and Hermes-2 bring tokenizer.model and added_tokens.json."""
    shutil.copy(MISTRAL / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    names = {"<|im_end|>": 32000, "<|im_start|>": 32001, "<think>": 32002}
    (tmp_path / "added_tokens.json").write_text(json.dumps(names))
    flags = {str(i): {"content": name, "special": False} for name, i in names.items()}
    config = dict(eos_token="<|im_end|>", added_tokens_decoder=flags)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert (ours.bos, ours.eos, ours.special["<|im_start|>"]) == (1, 32000, 32001)
    assert ours.encode("a<think>b c") == [*sp.encode("a"), 32002, *ours.encode("b c", start=False)]
    assert ours.decode(ours.encode("a<think>b c")) == "a<think>b c"
    assert not {32000, 32001} & set(ours.encode("<|im_start|>user<|im_end|>"))
    assert [file.name for file in ours.files] == ["tokenizer.model", "tokenizer_config.json",
                                                  "added_tokens.json"]  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": True}))
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("a<think>b c") == [*sp.encode("a"), 32002, *sp.encode("b c")]


@pytest.mark.parametrize("content, special, fits", [
    ("<think>", False, False), ("<pad>", True, True), ("[PAD]", True, True),
    ("<|im_end|>", True, False), ("</s>2", True, False)])  # fmt: skip
def test_more_pieces_than_the_model_has_rows_are_refused_but_a_lone_padding_token_is_not(
    content, special, fits, tmp_path
):
    rows = len(MINI_JSON["model"]["vocab"])
    tokens = MINI_JSON["added_tokens"] + [added(content, rows, special=special)]
    eos = content if content == "</s>2" else "</s>"
    write(tmp_path, MINI_JSON | {"added_tokens": tokens}, eos_token=eos)
    for more in (0, 1):
        (tmp_path / "config.json").write_text(json.dumps({"vocab_size": rows + more}))
        if fits or more:
            Tokenizer.from_pretrained(tmp_path)
            continue
        with pytest.raises(ValueError, match=f"tokenizer.json: writes ids up to {rows}, and the "
                           f"model has rows for {rows} .* take the tokenizer"):  # fmt: skip
            Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 500}))
    with pytest.raises(ValueError, match="the model has rows for 500"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_flags_of_words_that_we_do_not_follow_are_refused(flag, tmp_path):
    spec = MINI_JSON | {"added_tokens": MINI_JSON["added_tokens"] + [added("<x>", 9, **{flag: 1})]}
    with pytest.raises(ValueError, match=f"the added token '<x>' has {flag}, .* special tokens"):
        Tokenizer.from_pretrained(write(tmp_path, spec))


def test_a_byte_order_mark_is_no_reason_to_refuse(tmp_path, mini):
    text = (MINI / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8-sig")
    assert Tokenizer.from_pretrained(tmp_path).encode("a cat") == mini.encode("a cat")


# ----------------------------------------------------------------------------------------- tekken


@pytest.fixture(scope="module", params=["240911", pytest.param("240718", marks=pytest.mark.slow)])
def tekken(request, tmp_path_factory):
    """(our tokenizer, mistral-common's) of one tekken file."""
    folder = tmp_path_factory.mktemp("tekken")
    library = pytest.importorskip("mistral_common.tokens.tokenizers.tekken")
    shutil.copy(MISTRAL / f"tekken_{request.param}.json", folder / "tekken.json")
    return Tokenizer.from_pretrained(folder), library.Tekkenizer.from_file(folder / "tekken.json")


def test_tekken_ids_equal_mistral_common_and_text_comes_back(tekken):
    ours, reference = tekken
    for text in [*some_texts(3000, seed=4), "a" * 500, "\n" * 70, "HelloWorld's 2024"]:
        ids = ours.encode(text)
        assert ids == reference.encode(text, bos=False, eos=False), text
        assert ours.decode(ids) == text
        assert ours.encode(text, start=False) == ids


def test_tekken_special_tokens_have_their_ids_but_are_never_found_in_text(tekken):
    ours, reference = tekken
    assert ours.vocab_size == reference.n_words == 131072
    assert ours.special == reference._special_tokens_reverse_vocab
    assert (ours.bos, ours.eos, ours.special["[INST]"]) == (1, 2, 3)
    for typed in ("</s>", "[INST] x [/INST]", "<s><unk>", "<SPECIAL_20>"):
        ids = ours.encode(typed)
        assert min(ids) >= 1000 and ours.decode(ids) == typed
    assert ours.decode([1, 3, *ours.encode("a cat"), 4, 2]) == "a cat"


def small_tekken(folder, **changes):
    """A tekken file: the bytes, " a", "bb", an unused "cc"; 5 special tokens, 4 of them named."""
    pieces = [*(bytes([b]) for b in range(256)), b" a", b"bb", b"cc"]
    vocab = [{"rank": i, "token_bytes": base64.b64encode(p).decode(), "token_str": None}
             for i, p in enumerate(pieces)]  # fmt: skip
    names = ("<unk>", "<s>", "</s>", "[THINK]")
    listed = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    config = dict(pattern=r"\s?\S+|\s+", default_vocab_size=263, default_num_special_tokens=5)
    spec = {"config": config, "vocab": vocab, "special_tokens": listed} | changes
    (folder / "tekken.json").write_text(json.dumps(spec))
    return folder


def test_tekken_file_of_a_later_version_lists_its_own_special_tokens(tmp_path):
    ours = Tokenizer.from_pretrained(small_tekken(tmp_path))
    assert (ours.vocab_size, ours.special["[THINK]"], ours.special["<SPECIAL_4>"]) == (263, 3, 4)
    assert "[INST]" not in ours.special
    assert ours.encode("A abb") == [5 + ord("A"), 5 + 256, 5 + 257]
    assert ours.encode("cc") == [5 + ord("c")] * 2  # "cc" is beyond the vocabulary's size


def test_tekken_comes_before_tokenizer_json_and_a_damaged_one_is_refused(tmp_path):
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    assert Tokenizer.from_pretrained(small_tekken(tmp_path)).vocab_size == 263
    for damage in (
        dict(vocab=[]),
        dict(config={}),
        dict(vocab=[{"rank": 3, "token_bytes": "YQ=="}]),
        dict(vocab=[{"rank": 0, "token_bytes": "YQ="}]),
        dict(vocab=[{"rank": 0, "token_bytes": "▁"}]),
        dict(config=dict(pattern=".", default_vocab_size=9, default_num_special_tokens=2**63)),
        dict(config=dict(pattern="(", default_vocab_size=263, default_num_special_tokens=5)),
    ):
        with pytest.raises(ValueError, match="tekken.json: (is damaged|its pieces|cannot have)"):
            Tokenizer.from_pretrained(small_tekken(tmp_path, **damage))


@pytest.mark.parametrize("pattern", ["", "(?=a)", "a*"])
def test_pattern_that_cuts_out_nothing_is_refused_when_it_meets_such_a_text(pattern, tmp_path):
    config = dict(pattern=pattern, default_vocab_size=263, default_num_special_tokens=5)
    with pytest.raises(ValueError, match="tekken.json: its pattern .* does not cut every text"):
        Tokenizer.from_pretrained(small_tekken(tmp_path, config=config)).encode("bab")


@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json", "tokenizer_config.json"])
def test_json_nested_10_000_deep_is_one_clear_error(name, tmp_path):
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text("[" * 10_000 + "]" * 10_000)
    with pytest.raises(ValueError, match=f"{name}: is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("which", ["mini", "mistral"])
def test_special_tokens_are_got_by_name_and_never_from_text(which, request):
    tokenizer = request.getfixturevalue(which)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.special["<unk>"]) == (1, 2, 0)
    for typed in ("</s>", "<s>", "<unk>", "[INST] x [/INST]", "<0x0A>", "a</s><s>b"):
        ids = tokenizer.encode(typed)
        assert not set(ids) & set(tokenizer.special.values())
        assert tokenizer.decode(ids) == typed
    assert tokenizer.decode([1, *tokenizer.encode("a cat"), 2, 0]) == "a cat"


def test_names_of_bos_and_eos_come_from_the_models_own_config(tmp_path):
    added = MINI_JSON["added_tokens"]
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    spec = MINI_JSON | {"added_tokens": [t | {"content": n} for t, n in zip(added, names)]}
    with pytest.raises(ValueError, match="no special token '<s>'.*tokenizer_config.json"):
        Tokenizer.from_pretrained(write(tmp_path, spec))
    config = dict(bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, spec, **config))
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)
    assert [file.name for file in tokenizer.files] == ["tokenizer.json", "tokenizer_config.json"]


# ------------------------------------------------------------------------------------- bad files


def test_folder_without_tokenizer_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer.model, tekken.json, tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"not a model", b"\xff" * 100, b"\x0a\x7fshort", b"\x12\x00"]
)
def test_damaged_tokenizer_model_is_one_clear_error(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.model: is "):
        Tokenizer.from_pretrained(tmp_path)


def test_cut_off_tokenizer_model_is_refused(tmp_path):
    whole = (MISTRAL / "tokenizer.model.v1").read_bytes()
    for size in (1000, 200_000, len(whole) - 1):
        (tmp_path / "tokenizer.model").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged"):
            Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, complaint", [
    ({"model": {"type": "Unigram"}}, "is a Unigram tokenizer"),
    ({"model": {}}, "damaged"),
    ({"normalizer": {"type": "NFC"}}, "not known here .*after a normalizer"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "not known here .Whitespace"),
    ({"pre_tokenizer": None}, "damaged"),
    ({"added_tokens": []}, "no special token '<s>'"),
    *(({"model": MINI_JSON["model"] | {"vocab": MINI_JSON["model"]["vocab"] | {"a": i}}},
       "damaged .*is no token id") for i in (1.5, -1, True, "5", 2**40)),
])  # fmt: skip
def test_tokenizer_json_of_an_unknown_kind_is_refused(change, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        Tokenizer.from_pretrained(write(tmp_path, MINI_JSON | change))


def test_invalid_json_is_one_clear_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: is not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.from_pretrained(tmp_path)


def test_protobuf_reads_all_wire_types():
    message = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1d\x00\x00\x80\x3f" + b"\x21" + b"\x01" * 8
    assert list(protobuf(message)) == [
        (1, 150),
        (2, b"abc"),
        (3, b"\x00\x00\x80\x3f"),
        (4, b"\x01" * 8),
    ]
    with pytest.raises(IndexError):
        list(protobuf(b"\x12\x05abc"))  # five bytes are promised
