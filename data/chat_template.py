"""The prompt templates, and which of them a language model alone wants.

A model brings its `chat_template`, a program in Jinja, which we do not run. We rewrite what it
prints in the words of FORMS, and refuse one that prints anything else around a question (with
control tokens, other texts may belong to its tools):

    mistral_v1   Mistral-7B-Instruct v0.1 and v0.2, Mixtral-8x7B: [INST] is ordinary text
    mistral_v3   Mistral-7B-Instruct v0.3, Mixtral-8x22B, Nemo: [INST] is a control token
    llama2       Llama-2-chat: as mistral_v1, but each question begins with <s>
    chatml       OpenHermes, Hermes-2, Dolphin, SmolLM2, each with its own system message or none

A template that sets a system message of its own is recognised only in ChatML.
"""

import functools
import re

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SMOL_SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n"
)
INST = "[INST] {} [/INST]"
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# template -> the first question, later ones, an answer, what follows it and is not learned. A turn
# is written as it is {}, without blanks around it {strip}, or without those at its end {rstrip}.
FORMS = {
    "plain": ("<s>{}", "", "{}\n", ""),
    "mistral_instruct": (f"<s><s>{INST}", INST, " {} </s>", ""),  # CuMo: twice <s>
    "mistral_instruct_system": (f"<s><s>[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{{}} [/INST]",
                                INST, " {} </s>", ""),
    "chatml": (ASK, ASK, "{}<|im_end|>", "\n"),  # a system message comes before
    "mistral_v1": (f"<s>{INST}", INST, " {}</s>", ""),
    "mistral_v3": ("<s>[INST]{}[/INST]", "[INST]{}[/INST]", "{rstrip}</s>", ""),
    "llama2": ("<s>[INST] {strip} [/INST]", "<s>[INST] {strip} [/INST]", " {strip} </s>", ""),
    "vicuna": (f"<s>{SYSTEM} USER: {{}} ASSISTANT:", "USER: {} ASSISTANT:", " {}</s>", ""),
}  # fmt: skip
TEMPLATES = tuple(FORMS)
CONTROL = {"chatml": ("<|im_start|>", "<|im_end|>"), "mistral_v3": ("[INST]", "[/INST]")}

# A tag of Jinja, with the blanks that Jinja drops (transformers: trim_blocks, lstrip_blocks).
TAG = re.compile(r"(?:\s*{([%{#])-|^[ \t]*{([%#])|{([%{#]))\s*(.*?)\s*(?:-[%}#]}\s*|[%#]}\n?|}})",
                 re.S | re.M)  # fmt: skip
IN_FORMS = {"bos_token": "'<s>'", "eos_token": "'</s>'", "system_message+'\n\n'+": "",
            "message['content']|trim": "'{strip}'", "content.strip()": "'{strip}'",
            "message['content']": "'{}'", "message['role']": "'{role}'"}  # fmt: skip
CHATML = ["<|im_start|>{role}\n{}<|im_end|>\n", "<|im_start|>assistant\n"]
BEFORE_CHATML = r"(<s>)?(<\|im_start\|>system\n[^{}<+|=]*<\|im_end\|>\n)?"
CHATML_TAGS = {"if not add_generation_prompt is defined", "set add_generation_prompt=false",
               "for message in messages", "if loop.first and messages[0]['role']!='system'",
               "if add_generation_prompt", "endif", "endfor"}  # fmt: skip
LLAMA2_TAGS = {"set content='{}'",
               "set content='<<SYS>>\n'+system_message+'\n<</SYS>>\n\n{}'"}  # fmt: skip


def in_one_way(tag):
    """A tag of Jinja: the text that it prints, in the words of FORMS, or else its code."""
    *kinds, code = tag.groups(default="")
    code = re.sub(r"\s*([+|]|[!=]?=)\s*", r"\1", code.replace("\\n", "\n").replace('"', "'"))
    code = re.sub(r"\b(messages?(?:\[0\])?)\.(role|content)\b", r"\1['\2']", code)
    for jinja, form in IN_FORMS.items():
        code = code.replace(jinja, form)
    code = code.replace("'+'", "")
    if "%" in kinds:
        return f"{{%{code}%}}"
    if "#" in kinds or code.startswith("raise_exception("):
        return ""
    return code[1:-1] if re.fullmatch("'[^']*'", code) else f"{{{{{code}}}}}"


@functools.cache
def read(template):
    """A Jinja template -> ([the texts that it prints], {its other tags})."""
    parts = re.split("{%(.*?)%}", TAG.sub(in_one_way, template.strip()), flags=re.S)
    return [text for text in parts[::2] if text], {*parts[1::2]}


def chatml(tokenizer):
    """What the model's own ChatML prints before the first turn; None: its template is another."""
    prints, tags = read(tokenizer.chat_template)
    before, known = "".join(prints[:-2]), prints[-2:] == CHATML and tags <= CHATML_TAGS
    return before if known and re.fullmatch(BEFORE_CHATML, before) else None


def recognise(tokenizer):
    """The template of ours that the model's own one means; None: it is not known here."""
    own, control = tokenizer.chat_template, "[INST]" in tokenizer.special
    if own in FORMS:  # named on the command line
        return own
    if not own and control:  # Mistral's own files
        return "mistral_v3"
    if chatml(tokenizer) is not None:
        return "chatml"
    prints, tags = read(own)
    names = ["mistral_v3"] if control else ["mistral_v1"]
    if not control and {tag for tag in tags if tag.startswith("set content=")} <= LLAMA2_TAGS:
        names.append("llama2")
    if any(re.match(r"set \w*system\w*='", tag) for tag in tags) or "SYSTEM_PROMPT" in own:
        return None  # a system message that we would leave out
    asks = {text if control else text.removeprefix(" ") for text in prints if "INST]" in text}
    bare = lambda text: re.sub(r"{\w+}", "{}", text.strip())
    rest = {bare(text) for text in prints if "INST]" not in text} - {"", "<s>", "</s>"}
    for name in names:
        first, question, answer, _ = FORMS[name]
        if not control and not rest <= {bare(answer)}:
            continue  # it prints a text that we would leave out
        begins = ("<s>" in prints) == (first != question)
        if tokenizer.mark:  # SentencePiece puts this space itself
            question = question.replace("]{", "] {")
        if asks == {question} and begins and bare(answer) in map(bare, prints):
            return name
    return None


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
