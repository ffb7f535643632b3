"""Conversations to token ids and labels, segment by segment, in the templates of the original.

    plain              <s><image>ANSWER\\n
    mistral_instruct   <s><s>[INST] <image>\\nQUESTION [/INST] ANSWER </s>[INST] NEXT [/INST] ANSWER </s>

Labels are made while tokenizing: what the assistant says (its closing `</s>` included) is learned,
everything else is IGNORE. So no text, whatever it contains, can shift them.
"""

IGNORE = -100  # label of a token that is not learned
IMAGE_TOKEN = -200  # one of these stands for each visual token of an image
IMAGE_TAG = "<image>"
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
          "helpful, detailed, and polite answers to the user's questions.")  # fmt: skip
TEMPLATES = ("plain", "mistral_instruct", "mistral_instruct_system")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


def check(conversation, n_images, where):
    """Raise a ValueError that names the sample (`where`) unless turns and image tags are in order."""
    if not conversation:
        raise ValueError(f"{where}: the conversation is empty; it needs a question and an answer")
    for k, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise ValueError(f'{where}: turn {k} needs "from" and a text "value", got {turn!r:.80}')
        if turn["from"] not in ROLES:
            raise ValueError(f"{where}: turn {k} is from {turn['from']!r}; known roles are human and gpt")
        if ROLES[turn["from"]] != ("user", "assistant")[k % 2]:
            raise ValueError(f"{where}: turn {k} is from {turn['from']!r}; human and gpt must alternate")
        if k % 2 and IMAGE_TAG in turn["value"]:
            raise ValueError(f"{where}: turn {k} is an answer and cannot hold {IMAGE_TAG}")
    tags = sum(turn["value"].count(IMAGE_TAG) for turn in conversation)
    if tags != n_images:
        raise ValueError(f"{where}: {tags} {IMAGE_TAG} tags for {n_images} images; each needs one tag")


def render(conversation, tokenizer, template="mistral_instruct", image_tokens=0, n_images=0, where="sample"):
    """A conversation `[{"from", "value"}, ...]` as (ids, labels), two lists of equal length.

    Each `<image>` becomes `image_tokens` IMAGE_TOKENs. A conversation that ends with a question is a
    prompt: its ids end where the answer begins. Raises ValueError, naming `where`, for unknown roles,
    tags that do not match `n_images`, empty questions and answers.
    """
    check(conversation, n_images, where)
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; choose from {', '.join(TEMPLATES)}")
    ids, labels = [tokenizer.bos], [IGNORE]

    def add(text, learn=False, start=True):
        for k, chunk in enumerate(text.split(IMAGE_TAG)):
            new = [IMAGE_TOKEN] * image_tokens if k else []
            labels.extend([IGNORE] * len(new))
            chunk_ids = tokenizer.encode(chunk, start=start) if chunk else []
            ids.extend(new + chunk_ids)
            labels.extend(chunk_ids if learn else [IGNORE] * len(chunk_ids))

    if template == "plain":
        if len(conversation) > 2:
            raise ValueError(f"{where}: the template plain is for one caption, not {len(conversation)} turns")
        add(IMAGE_TAG * n_images)
        if len(conversation) == 2:
            add(conversation[1]["value"] + "\n", learn=True, start=False)
        return ids, labels

    ids, labels = ids + [tokenizer.bos], labels + [IGNORE]  # CuMo: the template's <s> makes a second bos
    for k, turn in enumerate(conversation):
        text = normalize_tags(turn["value"])
        if not text.strip():
            raise ValueError(f"{where}: turn {k} is empty; every question and answer needs text")
        if ROLES[turn["from"]] == "user":
            system = f"<<SYS>>\n{SYSTEM}\n<</SYS>>\n\n" if k == 0 and template.endswith("system") else ""
            add(f"[INST] {system}{text} [/INST]")
        else:
            add(f" {text} ", learn=True, start=False)
            ids.append(tokenizer.eos)
            labels.append(tokenizer.eos)
    return ids, labels


def normalize_tags(text):
    """Image tags first, each followed by a line break, as the original orders them."""
    n = text.count(IMAGE_TAG)
    return f"{IMAGE_TAG}\n" * n + text.replace(IMAGE_TAG, "").strip() if n else text
