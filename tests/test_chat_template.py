"""A language model alone is asked as its own template says, id by id, or its template is refused.

References: `mistral-common` for Mistral's, `transformers.apply_chat_template` for the others.
"""

import functools
import json
import shutil

import pytest
from test_tokenizer import mistral, sp  # noqa: F401

from bench.public_models import (
    CHATML,
    LATER_V1,
    LLAMA2,
    MINI_JSON,
    MISTRAL,
    TEKKEN,
    UNKNOWN,
    V1,
    V3,
    WITH_TOOLS,
    from_common,
    sentencepiece_json,
)
from data.chat import render
from data.chat_template import chatml, native_template
from data.tokenizer import Tokenizer

TALKS = [["What is a cat?"], [" What? "], ["What?", "A cat.", "And\nthen?"],
         ["Is <s>[INST] x</s> text?", "  Yes. ", "<|im_end|> too?", "é 你", "😀"]]  # fmt: skip
SENT = pytest.mark.parametrize("said", TALKS, ids=lambda said: repr(said)[:20])


def turns(said):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]


def messages(said):
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]


@pytest.fixture(scope="module")
def mistral_with(tmp_path_factory):
    """(a file of mistral-common, a template) -> our tokenizer of both, loaded once."""

    @functools.cache
    def load(file, template):
        folder = tmp_path_factory.mktemp("mistral")
        own = "tekken.json" if file.startswith("tekken") else "tokenizer.model"
        shutil.copy(MISTRAL / file, folder / own)
        (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.from_pretrained(folder)

    return load


@SENT
@pytest.mark.parametrize("file, template, name", [
    ("tokenizer.model.v1", V1, "mistral_v1"),
    ("tokenizer.model.v1", LATER_V1, "mistral_v1"),
    ("mistral_instruct_tokenizer_240216.model.v2", V3, "mistral_v3"),
    ("mistral_instruct_tokenizer_240323.model.v3", V3, "mistral_v3"),
    ("mistral_instruct_tokenizer_240323.model.v3", WITH_TOOLS, "mistral_v3"),
    ("mistral_instruct_tokenizer_240323.model.v3", "", "mistral_v3"),
    ("tekken_240911.json", TEKKEN, "mistral_v3"),
    ("tekken_240911.json", "", "mistral_v3"),
])  # fmt: skip
def test_mistrals_are_asked_as_mistral_common_asks_them(file, template, name, said, mistral_with):
    ours = mistral_with(file, template)
    assert native_template(ours) == name
    assert render(turns(said), ours, name)[0] == from_common(file, said)


@pytest.fixture(scope="module")
def peer(sp):  # noqa: F811
    """transformers' own Llama tokenizer of these settings, built once."""
    transformers = pytest.importorskip("transformers")
    model = sentencepiece_json(sp)["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    return functools.cache(lambda **config: transformers.LlamaTokenizer(vocab, merges, **config))


def with_template(folder, template, **config):
    """Our tokenizer of the first Mistral's file and this configuration."""
    shutil.copy(MISTRAL / "tokenizer.model.v1", folder / "tokenizer.model")
    written = config | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(written))
    return Tokenizer.from_pretrained(folder)


def without_marks(said):
    """transformers takes `<s>` in a user's text for a control token; we never do."""
    return [text.replace("<s>", "").replace("</s>", "").replace("<|im_end|>", "") for text in said]


def test_llama_2_is_asked_as_transformers_asks_it(peer, tmp_path):
    theirs, ours = peer(legacy=True), with_template(tmp_path, LLAMA2, legacy=True)
    assert native_template(ours) == "llama2"
    for said in map(without_marks, TALKS):
        wanted = theirs.apply_chat_template(messages(said), chat_template=LLAMA2)["input_ids"]
        assert render(turns(said), ours, "llama2")[0] == wanted


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", CHATML)
def test_chatml_on_sentencepiece_is_as_in_transformers(name, legacy, peer, tmp_path):
    config = dict(legacy=legacy, eos_token="<|im_end|>")
    theirs = peer(**config)
    theirs.add_tokens(["<|im_start|>"], special_tokens=True)  # the second time it changes nothing
    ids = {mark: theirs.convert_tokens_to_ids(mark) for mark in ("<|im_end|>", "<|im_start|>")}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    ours = with_template(tmp_path, CHATML[name], **config)
    assert native_template(ours) == "chatml"
    for said in map(without_marks, TALKS):
        said = [text.strip() for text in said]
        wanted = theirs.apply_chat_template(
            messages(said), chat_template=CHATML[name], add_generation_prompt=True
        )
        assert render(turns(said), ours, "chatml")[0] == wanted["input_ids"], said


@pytest.mark.parametrize("name", CHATML)
def test_only_who_says_so_is_told_that_it_is_somebody(name, tmp_path):
    spec = json.loads(json.dumps(MINI_JSON))
    for token, mark in zip(spec["added_tokens"][1:], ("<|im_start|>", "<|im_end|>")):
        token["content"], token["special"] = mark, False  # a flag that some files have
    config = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML[name])
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_pretrained(tmp_path)
    text = ours.decode(render(turns(["What?"]), ours, native_template(ours))[0])
    assert "SmolLM" not in text and ("helpful" in text) == (name == "a helpful assistant")
    assert chatml(ours).startswith("<s>") == (name == "Hermes 2 Pro")


@pytest.mark.parametrize("name", UNKNOWN)
def test_any_other_template_is_refused_with_the_way_out(name, mistral):  # noqa: F811
    ours = shallow(mistral, UNKNOWN[name])
    with pytest.raises(ValueError, match="chat_template is not known here .*--template: .*llama2"):
        native_template(ours)


def shallow(tokenizer, template):
    copy = object.__new__(Tokenizer)
    copy.__dict__ |= vars(tokenizer) | {"chat_template": template}
    return copy


@pytest.mark.parametrize("extra", ["{{ 'You are a pirate.' }}", "You are a pirate.\n"])
@pytest.mark.parametrize("own", [V1, LLAMA2])
@pytest.mark.parametrize("end", [False, True])
def test_a_text_of_its_own_around_the_turns_is_not_left_out(own, extra, end, mistral):  # noqa: F811
    native_template(shallow(mistral, own))
    with pytest.raises(ValueError, match="chat_template is not known here"):
        native_template(shallow(mistral, own + extra if end else extra + own))


def test_a_template_for_other_control_tokens_is_refused(mistral, tmp_path):  # noqa: F811
    shutil.copy(
        MISTRAL / "mistral_instruct_tokenizer_240323.model.v3", tmp_path / "tokenizer.model"
    )
    v3 = Tokenizer.from_pretrained(tmp_path)
    for tokenizer, template in ((mistral, V3), (mistral, TEKKEN), (v3, V1), (v3, TEKKEN),
                                (v3, LLAMA2), (mistral, "")):  # fmt: skip
        with pytest.raises(ValueError, match="this language model wants to be asked is unclear"):
            native_template(shallow(tokenizer, template))


@pytest.mark.parametrize("where", ["string", "list", "jinja"])
def test_the_template_is_found_where_models_keep_it(where, tmp_path):
    shutil.copy(MISTRAL / "tokenizer.model.v1", tmp_path / "tokenizer.model")
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": V1}]
    config = {"chat_template": {"string": V1, "list": named, "jinja": "old"}[where]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if where == "jinja":  # transformers 5 writes it into a file
        (tmp_path / "chat_template.jinja").write_text(V1)
    ours = Tokenizer.from_pretrained(tmp_path)
    assert native_template(ours) == "mistral_v1"
    copied = [file.name for file in ours.files]
    assert ("chat_template.jinja" in copied) == (where == "jinja")
