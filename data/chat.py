"""Conversations to token ids and labels, segment by segment, in the templates of the original.

    plain              <s><image>ANSWER\\n
    mistral_instruct   <s><s>[INST] <image>\\nQUESTION [/INST] ANSWER </s>[INST] NEXT [/INST] ...
    chatml             <|im_start|>system\\n...<|im_end|>\\n
                       <|im_start|>user\\n<image>\\nQUESTION<|im_end|>\\n
                       <|im_start|>assistant\\nANSWER<|im_end|>\\n<|im_start|>user\\n ...

(`mistral_instruct_system` puts a system prompt before the first question; `chatml` is SmolLM2's,
with the system message that its own template adds.) Labels are made while tokenizing: what the
assistant says, its closing `</s>` or `<|im_end|>` included, is learned, everything else is IGNORE.
So no text, whatever it contains, can shift them.

CuMo: the original finds its labels afterwards, by counting tokens between the `</s>` and `[/INST] `
of the finished text. Where the text itself holds such a mark, or an answer is empty, it silently
learns nothing from the sample. Here a mark is text like any other, and a sample with an empty turn
is `Rejected`.
"""

IGNORE = -100  # label of a token that is not learned
IMAGE_TOKEN = -200  # one of these stands for each visual token of an image
IMAGE_TAG = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATES = ("plain", "mistral_instruct", "mistral_instruct_system", "chatml")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class Rejected(ValueError):
    """A sample from which nothing can be learned; a training leaves it out and counts it."""


def check(conversation, n_images, where):
    """The turns of a conversation, or a ValueError with the sample's name (`where`) and its fault.

    CuMo: a first turn that is the assistant's is dropped (such samples are cut out of longer ones).
    """
    if not isinstance(conversation, list):
        raise ValueError(f"{where}: a conversation is a list of turns, not {conversation!r:.60}")
    for k, turn in enumerate(conversation):
        if (
            not isinstance(turn, dict)
            or "from" not in turn
            or not isinstance(turn.get("value"), str)
        ):
            raise ValueError(f'{where}: turn {k} needs "from" and a text "value", got {turn!r:.80}')
        if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
            raise ValueError(f"{where}: turn {k} is from {turn['from']!r:.40}, which is no role; "
                             "turns are from human and gpt")  # fmt: skip
    turns = conversation
    if turns and ROLES[turns[0]["from"]] == "assistant":
        turns = turns[1:]
    for k, turn in enumerate(turns):
        if ROLES[turn["from"]] != ("user", "assistant")[k % 2]:
            raise ValueError(f"{where}: {turn['from']} speaks twice in a row, at "
                             f"{turn['value']!r:.40}; human and gpt must alternate")  # fmt: skip
        if k % 2 and IMAGE_TAG in turn["value"]:
            raise ValueError(f"{where}: answer {k // 2 + 1} holds {IMAGE_TAG}; only questions can")
    tags = sum(turn["value"].count(IMAGE_TAG) for turn in turns)
    if tags != n_images:
        raise ValueError(f"{where}: the number of images is {n_images}, of {IMAGE_TAG} tags in the "
                         f"questions {tags}; each image needs one tag")  # fmt: skip
    return turns


def lacks(turns):
    """What keeps these turns from teaching anything, or None."""
    for k, turn in enumerate(turns):
        if not turn["value"].strip():
            return f"{('question', 'answer')[k % 2]} {k // 2 + 1} is empty"
    return None if len(turns) > 1 else "it has no answer" if turns else "it has no question"


def place_tags(text):
    """Image tags first, each followed by a line break, as the original orders them."""
    n = text.count(IMAGE_TAG)
    return (f"{IMAGE_TAG}\n" * n + text.replace(IMAGE_TAG, "").strip()).strip() if n else text


def template_of(tokenizer):
    """The template of a bare language model's conversations, from the tokens it has."""
    return "chatml" if "<|im_start|>" in tokenizer.special else "mistral_instruct"


def check_template(template, tokenizer):
    """ValueError for a template that is unknown, or needs tokens that the tokenizer lacks."""
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; choose from {', '.join(TEMPLATES)}")
    for mark in ("<|im_start|>", "<|im_end|>") if template == "chatml" else ():
        if mark not in tokenizer.special:
            raise ValueError(f"template chatml needs the token {mark}, which this tokenizer lacks; "
                             "take mistral_instruct")  # fmt: skip


class Transcript:
    """Token ids and labels of a conversation while it is written, piece by piece."""

    def __init__(self, tokenizer, image_tokens):
        self.tokenizer, self.image_tokens, self.ids, self.labels = tokenizer, image_tokens, [], []

    def text(self, text, learn=False, start=True):
        """Each `<image>` in it becomes `image_tokens` IMAGE_TOKENs. `start`: as in `encode`."""
        for k, chunk in enumerate(text.split(IMAGE_TAG)):
            image = [IMAGE_TOKEN] * self.image_tokens if k else []
            ids = self.tokenizer.encode(chunk, start=start)
            self.ids += image + ids
            self.labels += [IGNORE] * len(image) + (ids if learn else [IGNORE] * len(ids))

    def token(self, token, learn=False):
        self.ids.append(token)
        self.labels.append(token if learn else IGNORE)


def render(conversation, tokenizer, template="mistral_instruct", image_tokens=0, n_images=0,
           where="sample"):  # fmt: skip
    """A conversation `[{"from", "value"}, ...]` as (ids, labels), two lists of equal length.

    Each `<image>` becomes `image_tokens` IMAGE_TOKENs. A conversation that ends with a question is
    a prompt: its ids end where the answer begins. Raises ValueError, naming `where`, for unknown
    roles, tags that do not match `n_images`, empty questions and answers.
    """
    check_template(template, tokenizer)
    turns = check(conversation, n_images, where)
    fault = lacks(turns)
    if fault and not (len(turns) == 1 and turns[0]["value"].strip()):
        raise Rejected(f"{where}: {fault}")
    out = Transcript(tokenizer, image_tokens)
    if template == "plain":
        if len(turns) > 2 or n_images == 0:
            raise ValueError(f"{where}: template plain takes an image and its caption; here are "
                             f"{len(turns)} turns and images: {n_images}")  # fmt: skip
        out.token(tokenizer.bos)
        out.text(IMAGE_TAG * n_images)
        if len(turns) == 2:
            out.text(turns[1]["value"] + "\n", learn=True)
    elif template == "chatml":
        write_chatml(out, turns)
    else:
        write_mistral(out, turns, SYSTEM if template.endswith("system") else "")
    return out.ids, out.labels


def render_next(question, tokenizer, template, image_tokens=0, n_images=0, where="sample"):
    """The ids of one more question, from behind the last answer's end token to where the next
    answer begins: what `render` would append to such a conversation."""
    turns = [{"from": who, "value": "-"} for who in ("human", "gpt")]
    turns.append({"from": "human", "value": question})
    ids, labels = render(turns, tokenizer, template, image_tokens, n_images, where)
    end = max(i for i, label in enumerate(labels) if label != IGNORE)
    return ids[end + 1 :]


def write_mistral(out, turns, system):
    """`[INST]` and `[/INST]` are letters, as they were to Mistral-7B v0.1 and v0.2."""
    out.token(out.tokenizer.bos)
    out.token(out.tokenizer.bos)  # CuMo: the tokenizer's <s>, and a second one from the template
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for k, turn in enumerate(turns):
        if k % 2 == 0:
            out.text(f"[INST] {'' if k else system}{place_tags(turn['value'])} [/INST]")
        else:
            out.text(f" {turn['value']} ", learn=True, start=False)
            out.token(out.tokenizer.eos, learn=True)


def write_chatml(out, turns):
    """The ids are those of `transformers` with SmolLM2's own template, with one exception: an
    answer is a text of its own here, as it is when the model writes it. `transformers` tokenizes it
    with the line break before it, to which blanks at the answer's beginning may be joined."""
    begin, end = (out.tokenizer.special[mark] for mark in ("<|im_start|>", "<|im_end|>"))

    def message(text):
        out.token(begin)
        out.text(text)
        out.token(end)
        out.text("\n")

    message(f"system\n{SMOL_SYSTEM}")
    for k, turn in enumerate(turns):
        if k % 2 == 0:
            message(f"user\n{place_tags(turn['value'])}")
            out.token(begin)
            out.text("assistant\n")
        else:
            out.text(turn["value"], learn=True)
            out.token(end, learn=True)
            out.text("\n")
