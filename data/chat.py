"""Conversations to token ids and labels, in the prompt templates of data/chat_template.py.

    mistral_instruct   <s><s>[INST] <image>\\nQUESTION [/INST] ANSWER </s>[INST] NEXT [/INST] ...

In a conversation without a picture `<image>` is text ("docker run <image>"). CuMo: a question's
only tag moves to its front. Several keep their places; the original keeps one of them.

The assistant's answers and their closing `</s>` or `<|im_end|>` are learned; every other token has
the label IGNORE. Labels are made while tokenizing, segment by segment, so nothing in the text can
shift them.

CuMo: the original makes labels from the finished text, by counting tokens between `</s>` and
`[/INST] `. If the text itself holds such a mark, or an answer is empty, it silently learns nothing
from the sample. Here a mark is ordinary text, and a sample with an empty turn is `Rejected`.
"""

import re
from functools import partial

from data.chat_template import CONTROL, FORMS, SMOL_SYSTEM, TEMPLATES, chatml

IGNORE = -100  # label of a token that is not learned
IMAGE_TOKEN = -200  # id of every visual token of an image
IMAGE_TAG = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"}


class Rejected(ValueError):
    """A sample from which nothing can be learned; training leaves it out and counts it."""


def template_of(tokenizer):
    """The template with which a CuMo learns to answer, guessed from its special tokens."""
    return "chatml" if "<|im_start|>" in tokenizer.special else "mistral_instruct"


def end_tokens(tokenizer, template):
    """The ids that end an answer: first the one that the template teaches, then the tokenizer's own
    (a base model's is not `<|im_end|>`)."""
    taught = tokenizer.special.get("<|im_end|>") if template == "chatml" else None
    return list(dict.fromkeys([tokenizer.eos if taught is None else taught, tokenizer.eos]))


def check_template(template, tokenizer):
    """ValueError if the template is unknown or the tokenizer lacks its special tokens."""
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is unknown; choose from {', '.join(TEMPLATES)}")
    for mark in CONTROL.get(template, ()):
        if mark not in tokenizer.special:
            raise ValueError(f"template {template} needs the token {mark}, which this tokenizer "
                             "lacks; take mistral_instruct")  # fmt: skip


def check_turns(conversation, n_images, where, template=""):
    """The turns of a conversation. `where` names the sample in errors.

    ValueError for a faulty conversation, `Rejected` for one with an empty turn or no question.
    CuMo: if the assistant speaks first, that turn is dropped (such samples are cut from longer
    conversations).
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
                             "the roles are human and gpt")  # fmt: skip
    late = conversation and ROLES[conversation[0]["from"]] == "assistant"
    turns = conversation[1:] if late else conversation
    for k, turn in enumerate(turns):
        if ROLES[turn["from"]] != ("user", "assistant")[k % 2]:
            raise ValueError(f"{where}: {turn['from']} speaks twice in a row, at "
                             f"{turn['value']!r:.40}; human and gpt must alternate")  # fmt: skip
        if n_images and k % 2 and IMAGE_TAG in turn["value"]:
            raise ValueError(f"{where}: answer {k // 2 + 1} holds {IMAGE_TAG}; only questions can")
    tags = sum(turn["value"].count(IMAGE_TAG) for turn in turns)
    if n_images and tags != n_images:
        raise ValueError(f"{where}: the number of images is {n_images}, of {IMAGE_TAG} tags in the "
                         f"questions {tags}; each image needs one tag")  # fmt: skip
    for k, turn in enumerate(turns):
        if not turn["value"].strip():
            raise Rejected(f"{where}: {('question', 'answer')[k % 2]} {k // 2 + 1} is empty")
    if not turns:
        raise Rejected(f"{where}: it has no question")
    if template == "plain" and (len(turns) > 2 or n_images == 0):
        raise ValueError(f"{where}: template plain takes an image and its caption, not "
                         f"{len(turns)} turns and {n_images} images; remove the record, or take "
                         "--template mistral_instruct")  # fmt: skip
    return turns


def place_tags(text):
    """The text of a question about pictures. A single tag goes first, followed by a line break;
    several keep their places."""
    n = text.count(IMAGE_TAG)
    if n == 1:
        text = f"{IMAGE_TAG}\n" + text.replace(IMAGE_TAG, "").strip()
    return text.strip() if n else text


def with_tags(question, n_images):
    """A question that is asked about `n_images` pictures, with a tag for each: those that it has,
    or else one for each picture before it. ValueError for any other number of tags."""
    n = question.count(IMAGE_TAG)
    if n not in (0, n_images):
        raise ValueError(f"the question has {n} {IMAGE_TAG} tags and {n_images} pictures; give a "
                         "picture for each tag, or leave out the tags")  # fmt: skip
    return question if n else f"{IMAGE_TAG}\n" * n_images + question


def encode_prompt(text, tokenizer, image_tokens, start=True):
    """The ids of a text, each `<image>` in it as `image_tokens` IMAGE_TOKENs (None: as text)."""
    first, *rest = [text] if image_tokens is None else text.split(IMAGE_TAG)
    ids = tokenizer.encode(first, start)
    for chunk in rest:
        ids += [IMAGE_TOKEN] * image_tokens + tokenizer.encode(chunk)
    return ids


def encode_form(form, said, marks, encode):
    """The ids of one of FORMS with a turn in it. A mark in the turn stays ordinary text."""
    words, ids = {"{}": said, "{strip}": said.strip(), "{rstrip}": said.rstrip()}, []
    for part in filter(None, re.split(f"({'|'.join(map(re.escape, marks))})", form)):
        text = re.sub(r"{\w*}", lambda gap: words[gap[0]], part)
        ids += [marks[part]] if part in marks else encode(text)
    return ids


def write(turns, tokenizer, template, image_tokens):
    """Turns that `check_turns` has accepted -> (ids, labels). image_tokens: as many for each
    picture; None: the conversation has no picture, and `<image>` is text."""
    first, question, answer, after = FORMS[template]
    if template == "chatml":  # a CuMo has learned SmolLM2's system message by default
        first = (chatml(tokenizer) or "" if tokenizer.chat_template else SMOL_SYSTEM) + first
    marks = {"<s>": tokenizer.bos, "</s>": tokenizer.eos}
    marks |= {mark: tokenizer.special[mark] for mark in CONTROL.get(template, ())}
    # SentencePiece puts a space before some texts: (after a mark, before an answer)
    start = template != "chatml" or tokenizer.again, template in ("plain", "mistral_v3")
    asked, answered = (partial(encode_prompt, tokenizer=tokenizer, image_tokens=image_tokens,
                               start=spaced) for spaced in start)  # fmt: skip
    ids, labels = [], []
    for k, turn in enumerate(turns):
        said = turn["value"] if image_tokens is None else place_tags(turn["value"])
        if k % 2 == 0:
            said = IMAGE_TAG * said.count(IMAGE_TAG) if template == "plain" else said
            new = encode_form(question if k else first, said, marks, asked)
            learned = []
        else:
            learned = encode_form(answer, said, marks, answered)
            new = encode_form(after, said, marks, asked)
        ids += learned + new
        labels += learned + [IGNORE] * len(new)
    return ids, labels


def render(conversation, tokenizer, template="mistral_instruct", image_tokens=0, n_images=0,
           where="sample"):  # fmt: skip
    """A conversation `[{"from", "value"}, ...]` as (ids, labels), two lists of equal length.

    If there are images, each `<image>` becomes `image_tokens` IMAGE_TOKENs. If the last turn is a
    question, the ids end where the answer would begin. Errors: those of `check_template` and
    `check_turns`.
    """
    check_template(template, tokenizer)
    turns = check_turns(conversation, n_images, where, template)
    return write(turns, tokenizer, template, image_tokens if n_images else None)


def render_next(question, tokenizer, template, image_tokens=0, n_images=0, where="sample"):
    """The ids that one more question appends to a conversation: from the end token of the last
    answer (not included) to where the next answer begins."""
    turns = [{"from": who, "value": "-"} for who in ("human", "gpt")]
    turns.append({"from": "human", "value": question})
    ids, labels = render(turns, tokenizer, template, image_tokens, n_images, where)
    end = max(i for i, label in enumerate(labels) if label != IGNORE)
    return ids[end + 1 :]
