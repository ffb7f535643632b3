"""How a language model alone wants to be asked: the template of ours that its own file means.

A model brings its `chat_template`, a program in Jinja, which we do not run. We recognise by its
text what these models have, and refuse everything else:

    mistral_v1   Mistral-7B-Instruct v0.1 and v0.2, Mixtral-8x7B: [INST] is ordinary text
    mistral_v3   Mistral-7B-Instruct v0.3, Mixtral-8x22B, Nemo: [INST] is a control token
    llama2       Llama-2-chat: as mistral_v1, but each question begins with <s>
    chatml       OpenHermes, Hermes-2, Dolphin, SmolLM2, each with its own system message or none

A template that sets a system message of its own is recognised only in ChatML.
"""

import functools
import re

TEMPLATES = ("plain", "mistral_instruct", "mistral_instruct_system", "chatml", "mistral_v1",
             "mistral_v3", "llama2", "vicuna")  # fmt: skip
MESSAGE = r"message\['content'\]"
QUESTION = rf"'( ?\[INST\] ?)'\+{MESSAGE}\+'( ?\[/INST\])'"
WITH_SYSTEM = QUESTION.replace(r"'\+", r"'\+system_message\+'\n\n'\+", 1)
ANSWER = rf"{{{{(?:' '\+)?{MESSAGE}(?:\|trim)?\+eos_token(?:\+' ')?}}}}"
OWN_SYSTEM = r"set \w*system\w*\s*=\s*'|SYSTEM_PROMPT"  # a default that we would leave out
LLAMA2 = (
    "{{bos_token+'[INST] '+content.strip()+' [/INST]'}}",
    "{{' '+content.strip()+' '+eos_token}}",
)
LLAMA2_CONTENT = {"message['content']",
                  "'<<SYS>>\n'+system_message+'\n<</SYS>>\n\n'+message['content']"}  # fmt: skip
CHATML = re.compile(
    r"(?P<bos>{{bos_token}})?"
    r"(?:{%if not add_generation_prompt is defined%}"
    r"{%set add_generation_prompt ?= ?false%}{%endif%})?"
    r"{%for message in messages%}"
    r"(?:{%if loop\.first and messages\[0\]\['role'\] ?!= ?'system'%}"
    r"{{'<\|im_start\|>system\n(?P<system>[^{}'+|]*)<\|im_end\|>\n'}}{%endif%})?"
    r"{{'<\|im_start\|>'\+message\['role'\]\+'\n'\+message\['content'\]\+'<\|im_end\|>(?:'\+')?\n'}}"
    r"{%endfor%}"
    r"{%if add_generation_prompt%}{{'<\|im_start\|>assistant\n'}}{%endif%}"
)


@functools.cache
def in_one_way(text):
    """A Jinja template, written in one way: blanks that Jinja drops, quotes, names of fields."""
    text = re.sub(r"\s+(?={[%{]-)|(?<=-[%}]})\s+", "", text)
    text = re.sub(r"%}\n", "%}", text)  # transformers: trim_blocks, and lstrip_blocks:
    text = re.sub(r"^[ \t]+(?={%)|(?<=%})[ \t]+(?={%)", "", text, flags=re.M)
    text = re.sub(r"({[%{])-?\s*", r"\1", text)
    text = re.sub(r"\s*-?([%}]})", r"\1", text).strip()
    text = text.replace("\\n", "\n").replace('"', "'")
    text = re.sub(r"\b(messages?(?:\[0\])?)\.(role|content)\b", r"\1['\2']", text)
    return re.sub(r"\s*([+|])\s*", r"\1", text)


def chatml(tokenizer):
    """The match of CHATML with the model's own template, or None."""
    return CHATML.fullmatch(in_one_way(tokenizer.chat_template))


def recognise(tokenizer):
    """The template of ours that the model's own one means; None: it is not known here."""
    text, control = in_one_way(tokenizer.chat_template), "[INST]" in tokenizer.special
    if text in TEMPLATES:  # named on the command line
        return text
    if not text and control:  # Mistral's own files
        return "mistral_v3"
    if chatml(tokenizer):
        return "chatml"
    if re.search(OWN_SYSTEM, text):
        return None
    if all(written in text for written in LLAMA2):
        sets = {*re.findall(r"{%set content ?= ?(.*?)%}", text, re.S)}
        known = sets <= LLAMA2_CONTENT and text.count("[INST]") == 1 and not control
        return "llama2" if known else None
    asks = {*re.findall(QUESTION, text)}
    others = "[INST]" in re.sub(f"{QUESTION}|{WITH_SYSTEM}", "", text)
    if len(asks) != 1 or others or "{{bos_token}}" not in text or not re.search(ANSWER, text):
        return None
    begin, end = asks.pop()
    if not control:
        return "mistral_v1" if (begin.lstrip(), end) == ("[INST] ", " [/INST]") else None
    spaced = "[INST] " if tokenizer.mark else "[INST]"  # SentencePiece puts the space itself
    return "mistral_v3" if (begin, end) == (spaced, "[/INST]") else None


def native_template(tokenizer):
    """The template of ours with which a language model alone is asked. ValueError if we do not
    know it; the way out is to name one."""
    found = recognise(tokenizer)
    if found is None:
        own, names = tokenizer.chat_template, ", ".join(TEMPLATES[1:])
        why = f"its chat_template is not known here ({own!r:.60})" if own else (
            "it has no chat_template and may be a base model")  # fmt: skip
        raise ValueError(f"how this language model wants to be asked is unclear: {why}; name the "
                         f"nearest with --template: {names}")  # fmt: skip
    return found
