"""A language model alone is asked as its own template says, id by id, or its template is refused.

References: `mistral-common` for Mistral's, `transformers.apply_chat_template` for the others. The
templates are those of the models' own files, without the parts for tools.
"""

import functools
import json
import shutil

import pytest
from test_tokenizer import MINI_JSON, MISTRAL, mistral, sentencepiece_json, sp  # noqa: F401

from data.chat import render
from data.chat_template import chatml, native_template
from data.tokenizer import Tokenizer

V1 = (  # Mistral-7B-Instruct-v0.1, in the first version of its file
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LATER = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "BEGIN" + system_message + "\\n\\n" + message["content"] + "END" }}
        {%- else %}
            {{- "BEGIN" + message["content"] + "END" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
LATER_V1, V3, TEKKEN = (
    LATER.replace("BEGIN", begin).replace("END", end)
    for begin, end in ((" [INST] ", " [/INST]"), ("[INST] ", "[/INST]"), ("[INST]", "[/INST]"))
)
TOOLS = """{#- Tools come before the question #}
{%- set content = message.content.content %}
{{- '[AVAILABLE_TOOLS] [{"type": "function", "function": {' }}{{- "}}" }}{{- "]" + eos_token }}
    {%- if loop.first"""
WITH_TOOLS = V3.replace("{%- if loop.first", TOOLS)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DOLPHIN = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENHERMES = DOLPHIN[DOLPHIN.index("{% for") :]
HERMES_PRO = "{{bos_token}}" + OPENHERMES
ASSISTANT = (
    "{%- for message in messages %}\n"
    "    {%- if loop.first and messages[0].role != \"system\" %}\n"
    "        {{- \"<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n\" }}\n"
    "    {%- endif %}\n"
    "    {{- \"<|im_start|>\" + message.role + \"\\n\" + message.content + \"<|im_end|>\\n\" }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- \"<|im_start|>assistant\\n\" }}\n"
    "{%- endif %}"
)  # fmt: skip
CHATML = {"OpenHermes": OPENHERMES, "Dolphin": DOLPHIN, "Hermes 2 Pro": HERMES_PRO,
          "a helpful assistant": ASSISTANT}  # fmt: skip
UNKNOWN = {
    "Zephyr, TinyLlama-Chat": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% endfor %}"
    ),
    "Llama 3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | "
        "trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
        "{% endif %}{{ content }}{% endfor %}"
    ),
    "Vicuna": (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + "
        "message['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "Mistral with a system message of its own": "{% set default_system_message = 'Be brief.' %}"
    + V1,
    "another question": V1.replace("'[INST] ' + message", "'[INST] Answer: ' + message"),
    "one more output of [INST]": V1 + "{{ '[INST] more' }}",
    "a later question that lacks its [INST]": LATER_V1.replace(
        '" [INST] " + message', '" " + message'
    ),
    "Llama 2 with a system message of its own": LLAMA2.replace("= false", "= 'Be kind.'"),
    "Llama 2, other letters": LLAMA2.replace("\\n<</SYS>>", "<</SYS>>"),
    "ChatML that adds a line": OPENHERMES.replace("{% endfor %}", "\n{% endfor %}"),
    "ChatML that thinks": OPENHERMES.replace("assistant\n'", "assistant\n<think>\n'"),
}
TALKS = [["What is a cat?"], [" What? "], ["What?", "A cat.", "And\nthen?"],
         ["Is <s>[INST] x</s> text?", "  Yes. ", "<|im_end|> too?", "é 你", "😀"]]  # fmt: skip
SENT = pytest.mark.parametrize("said", TALKS, ids=lambda said: repr(said)[:20])


def turns(said):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]


def messages(said):
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(said)]


@functools.cache
def common(file):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(MISTRAL / file))


def from_common(file, said):
    """The ids of `mistral-common`, whose requests are checked by its own rules."""
    pytest.importorskip("mistral_common")
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    kinds = UserMessage, AssistantMessage
    request = ChatCompletionRequest(
        messages=[kinds[k % 2](content=text) for k, text in enumerate(said)]
    )
    return common(file).encode_chat_completion(request).tokens


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
