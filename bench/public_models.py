"""Tiny models, tokenizers and chat templates like those of public families.

For bench/families.py and the tests. Weights are random and made by transformers; the templates are
those of the models' own files, most without the parts for tools.
"""

import functools
import importlib.util
import json
import pathlib
import random
import shutil

import torch

from cumo import IMAGE_TOKEN
from data.weights import read_config, read_tensors, write_json, write_tensors

# ------------------------------------------------------------------------------- chat templates

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


@functools.cache
def common(file):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(MISTRAL / file))


def from_common(file, said):
    """The ids of `mistral-common`, whose requests are checked by its own rules."""
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    kinds = UserMessage, AssistantMessage
    request = ChatCompletionRequest(
        messages=[kinds[k % 2](content=text) for k, text in enumerate(said)]
    )
    return common(file).encode_chat_completion(request).tokens


# ----------------------------------------------------------------------------------- tokenizers

MINI = pathlib.Path(__file__).parents[1] / "data" / "mini" / "llm"
MINI_JSON = json.loads((MINI / "tokenizer.json").read_text())
COMMON = importlib.util.find_spec("mistral_common")  # it brings Mistral's own tokenizers
MISTRAL = COMMON and pathlib.Path(COMMON.origin).parent / "data"
# Words, digits, runs of blanks, marks, joined emoji, scripts with and without pieces.
ALPHABETS = [
    "abcdefghij THE 's 're ", "0123456789½²٣Ⅷ ", "   \t\n\r\u00a0\u3000", "<s></s>[INST]<0x41>",
    "éüñß\u0301\u0308", "привет Ελλάδα", "你好世界　が한국어", "😀👩\u200d🚀\ufe0f𐍈𓀀",
    "▁\u2581 -_=.,#*/",
]  # fmt: skip


def some_texts(n, seed=0):
    """Thousands of such texts, faster than hypothesis draws them."""
    rng = random.Random(seed)
    for _ in range(n):
        letters = "".join(rng.choices(ALPHABETS, k=3))
        yield "".join(rng.choices(letters, k=rng.randrange(60)))


def write(folder, spec, **config):
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reference_of(spec):
    """The encoder of `tokenizers`, kept from recognising special tokens in text."""
    import tokenizers

    library = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
    return lambda text: library.encode(text, add_special_tokens=False).ids


@functools.cache
def pieces_and_merges(sp):
    """The vocabulary of a tokenizer.model, and the merges that Hugging Face's converter finds."""
    vocab = {sp.id_to_piece(i): i for i in range(len(sp))}
    merges = []
    for piece, i in vocab.items():
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)) if i > 258)
        cuts = sorted((vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab)
        merges += [(sp.get_score(i), [a, b]) for _, _, a, b in cuts]
    merges.sort(key=lambda merge: -merge[0])
    return vocab, [pair for _, pair in merges]


def sentencepiece_json(sp):
    """Mistral's tokenizer.json, made from its tokenizer.model."""
    vocab, merges = pieces_and_merges(sp)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
             "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": True,
             "vocab": vocab, "merges": merges}  # fmt: skip
    prepend = {"type": "Prepend", "prepend": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [prepend, replace]}
    return MINI_JSON | {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": None,
        "model": model,
    }


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
WRITTEN_BACK = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]  # fmt: skip


def spaces_by(sp, scheme):
    """Mistral's tokenizer.json as transformers 5 saves it, or transformers 4 (Prepend)."""
    spec = sentencepiece_json(sp)
    steps = WRITTEN_BACK + [STRIP] * (scheme != "never")
    spec["decoder"] = {"type": "Sequence", "decoders": steps}
    if scheme != "Prepend":
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "split": False,
                                 "prepend_scheme": scheme}  # fmt: skip
    return spec


def added(content, i, **flags):
    usual = dict(special=False, normalized=True, single_word=False, lstrip=False, rstrip=False)
    return {"id": i, "content": content} | usual | flags


def with_words(spec, **flags):
    """Non-special added tokens, one of which begins like another."""
    n, texts = len(spec["model"]["vocab"]), ["<think>", "<think>!", "éë¿", "a b", "</think>"]
    words = [added(text, n + k, **flags) for k, text in enumerate(texts)]
    return spec | {"added_tokens": words}, texts


# ---------------------------------------------------------------------------------------- LLaVA

IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[1, 5, *[IMAGE_TOKEN] * 9, 7, 9], [1, *[IMAGE_TOKEN] * 9, 11, 3, 8]])
PLACE = 1025  # llava-hf's id of a visual token
ASKED = dict(input_ids=TOKENS.masked_fill(TOKENS == IMAGE_TOKEN, PLACE), pixel_values=IMAGES,
             attention_mask=torch.ones_like(TOKENS))  # fmt: skip
TOWER = "model.vision_tower.vision_tower.vision_model."


def llava_hf(folder, family):
    """A tiny llava-hf checkpoint with random weights -> the model of transformers."""
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
        image_size=24, patch_size=8)  # fmt: skip
    text = getattr(transformers, f"{family}Config")(
        vocab_size=1032, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.15)  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=PLACE
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    shutil.copy(MINI / "tokenizer.json", folder)
    return model


def in_original_layout(folder, family, whole):
    """Write the checkpoint in `folder` as LLaVA does; `whole`: with its CLIP in the same file."""
    names = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
             "multi_modal_projector.linear_1.": "model.mm_projector.0.",
             "multi_modal_projector.linear_2.": "model.mm_projector.2.",
             "vision_tower.": TOWER}  # fmt: skip
    tensors = {}
    for name, tensor in read_tensors(folder):
        (old,) = (old for old in names if name.startswith(old))
        tensors[names[old] + name.removeprefix(old)] = tensor
    config = read_config(folder)
    clip = folder / "openai"
    if not whole:
        ours = [name for name in tensors if name.startswith(TOWER)]
        write_tensors(clip, {name.removeprefix(TOWER): tensors.pop(name) for name in ours})
    else:
        tensors["model.image_newline"] = torch.zeros(32)  # LLaVA-1.6 has it; one tile needs none
    write_tensors(folder, tensors)
    write_json(clip / "config.json", config["vision_config"])
    write_json(folder / "config.json", config["text_config"] | {
        "model_type": "llava_mistral" if family == "Mistral" else "llava_llama",
        "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True,
        "mm_hidden_size": 24, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat", "image_grid_pinpoints": [[336, 672]],
        "mm_resampler_type": None, "mm_use_im_start_end": False, "mm_vision_tower": str(clip)},
    )  # fmt: skip
