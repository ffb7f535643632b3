"""How well a model does on a LLaVA file that it was not trained on.

    train.py --val val.json     the loss, in metrics.jsonl (`val_loss`) at each --save-every
    eval.py --data val.json     the loss and the share of answers that are exactly right

The loss is the language model's, in nats: the mean over all learned tokens of the file, so it does
not depend on how the file is packed. An answer is right if greedy decoding gives its text, blanks
at its ends aside. Each question of a conversation is asked after the true answers to those before
it, in the very tokens of the training.
"""

import math
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from tqdm import tqdm

from data.chat import IGNORE, IMAGE_TOKEN, Rejected, check_turns, end_tokens
from data.llava import LlavaData, Unreadable, encode
from data.packing import collate, pack
from engine import fsdp, resume

ROWS = 8  # rows of a batch in `judge`
MORE = 8  # tokens that an answer may be longer than the true one before it is cut


class Answer(NamedTuple):
    id: str  # the record's
    question: str
    truth: str
    answer: str

    @property
    def right(self):
        return self.answer == self.truth


# ------------------------------------------------------------------------------ loss


def readable(data, code, left_out, places):
    """Yields (sample, its Encoded) of the records at `places` that can be used; the reasons of the
    others go to the list `left_out`."""
    for i in places:
        try:
            sample = data[i]
            yield sample, code(sample)
        except (Rejected, Unreadable) as reason:
            left_out.append(str(reason))


@torch.no_grad()
def loss_of(model, batches, device, autocast):
    """(sum of the loss over the learned tokens of packed batches, number of these tokens)."""
    total, learned, before = 0.0, 0, model.training
    model.train()  # then the loss is computed in chunks, and nothing else differs
    for batch in batches:
        given = collate(batch, model.image_tokens, *fsdp.world(), device)
        n = int((batch["labels"] != IGNORE).sum())
        with autocast():
            out = model(**given)
        if n:
            total, learned = total + n * out.lm_loss.item(), learned + n
    model.train(before)
    return total, learned


class Validation:
    """The file of train.py --val, encoded by `code` as the training data is. ValueError if no
    record of it can be used."""

    def __init__(self, cfg, code):
        self.cfg, self.code = cfg, code
        self.data, left_out = LlavaData(cfg.val, cfg.image_folder, template=cfg.template), []
        if not any(readable(self.data, code, left_out, range(len(self.data)))):
            raise ValueError(f"--val {cfg.val}: no record can be used; the first: "
                             f"{[*self.data.rejected, *left_out][0]}")  # fmt: skip

    def samples(self):
        for sample in readable(self.data, self.code, [], range(len(self.data))):
            yield sample[1][:3]

    def loss(self, model):
        """Mean loss of a learned token. ValueError if the pictures have gone."""
        cfg = self.cfg
        cast = partial(
            torch.autocast, cfg.device, torch.bfloat16, cfg.bf16 and cfg.weights == "fp32"
        )
        batches = pack(self.samples(), cfg.rows, cfg.row_tokens)
        total, learned = loss_of(model, batches, cfg.device, cast)
        if not learned:
            raise ValueError(f"--val {cfg.val}: none of its records can be used any more")
        return total / learned


def open_file(cfg, code):
    """The Validation of --val, or None without it."""
    return Validation(cfg, code) if cfg.val else None


def log(trainer):
    """{"val_loss": ...} whenever a resume point is due, and after the last sample. Else {}."""
    due = resume.is_due(trainer) or trainer.used == len(trainer.order)
    if not trainer.validation or not due:
        return {}
    found = round(trainer.validation.loss(trainer.model), 6)
    if fsdp.is_main():
        tqdm.write(f"stage {trainer.cfg.stage}: step {trainer.step}, held-out loss {found:.4f}")
    return {"val_loss": found}


# ------------------------------------------------------------------------------ answers


def questions_of(coded, sample, image_tokens):
    """[(prompt ids, answer ids, images, question)] of an encoded conversation."""
    turns = check_turns(sample["conversations"], len(sample["images"]), "sample")
    learned = [label != IGNORE for label in coded.labels] + [False]
    starts = [i for i, on in enumerate(learned) if on and not learned[i - 1]]
    ends = [i for i in range(1, len(learned)) if learned[i - 1] and not learned[i]]
    found = []
    for k, (start, end) in enumerate(zip(starts, ends)):
        prompt = coded.ids[:start]
        images = coded.images[: prompt.count(IMAGE_TOKEN) // image_tokens]
        found.append((prompt, coded.ids[start:end], images, turns[2 * k]["value"]))
    return found


@torch.no_grad()
def answers(model, tokenizer, asked, autocast):
    """[(true text, greedy text)] for a batch of `questions_of`."""
    prompts, truths, images, _ = zip(*asked)
    stops = end_tokens(tokenizer, model.cfg.template)
    width = max(map(len, prompts))
    left = lambda rows: torch.tensor([[0] * (width - len(row)) + row for row in rows])
    pixels = [torch.as_tensor(x) for some in images for x in some]
    with autocast():
        rows = model.generate(
            left(prompts).to(model.device),
            torch.stack(pixels).to(model.device) if pixels else None,
            left([[1] * len(row) for row in prompts]).to(model.device),
            max_new_tokens=max(map(len, truths)) + MORE, eos_token_id=stops)  # fmt: skip

    def text(ids):
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return tokenizer.decode(ids[:end]).strip()

    pairs = zip(truths, rows.tolist())
    return [(text(truth), text(row[: len(truth) + MORE])) for truth, row in pairs]


def judge(model, tokenizer, data, batch, autocast):
    """A LLaVA file judged -> {"loss", "tokens", "exact", "answers": [Answer], "left_out":
    reasons}. ValueError if no record can be used."""
    code = partial(
        encode, tokenizer=tokenizer, template=model.cfg.template, image_tokens=model.image_tokens,
        image_size=model.cfg.vision.image_size, image_mode=model.cfg.image_mode)  # fmt: skip
    total, learned, found, left_out = 0.0, 0, [], list(data.rejected)
    places = tqdm(range(len(data)), desc="held out", unit="record", leave=False)
    stream = readable(data, code, left_out, places)
    while some := list(islice(stream, batch)):
        longest = max(len(coded.ids) for _, coded in some)
        batches = pack((coded[:3] for _, coded in some), ROWS, longest)
        sums = loss_of(model, batches, model.device, autocast)
        total, learned = total + sums[0], learned + sums[1]
        asked = [(sample["id"], one) for sample, coded in some
                 for one in questions_of(coded, sample, model.image_tokens)]  # fmt: skip
        for k in range(0, len(asked), batch):
            ids, questions = zip(*asked[k : k + batch])
            pairs = answers(model, tokenizer, questions, autocast)
            found += [Answer(i, q[-1], *pair) for i, q, pair in zip(ids, questions, pairs)]
    if not found:
        raise ValueError(f"no record has an answer to compare with; the first: {left_out[0]}")
    exact = sum(one.right for one in found) / len(found)
    return {"loss": total / learned, "tokens": learned, "exact": exact, "answers": found,
            "left_out": left_out}  # fmt: skip


def report(name, result):
    """What eval.py --data prints: two numbers, then the first wrong answers."""
    loss, answers = result["loss"], result["answers"]
    right = sum(one.right for one in answers)
    lines = [f"{name}: {len(answers):,} answers of {len({one.id for one in answers}):,} records",
             f"  loss    {loss:.4f} nats a token (perplexity {math.exp(min(loss, 99)):.2f}), over "
             f"{result['tokens']:,} tokens",
             f"  exact   {result['exact']:.1%}, {right:,} of {len(answers):,}"]  # fmt: skip
    if result["left_out"]:
        lines.append(f"  {len(result['left_out']):,} records left out: {result['left_out'][0]}")
    for one in [one for one in answers if not one.right][:3]:
        question = " ".join(one.question.replace("<image>", "").split())
        lines.append(f"  wrong   {one.id}: {question:.60} -> {one.answer!r:.60}, "
                     f"not {one.truth!r:.60}")  # fmt: skip
    return "\n".join(lines)
