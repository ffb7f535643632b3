"""Packing: whole conversations end to end in rows of one fixed length.

    row      | sample 1          | sample 2     | sample 3       |..|
    segments | 1 1 1 1 1 1 1 1 1 | 2 2 2 2 2 2  | 3 3 3 3 3 3 3  |00|

`segments` numbers the samples of a row; 0 is padding. Attention stays inside a segment and
positions restart with it, so a packed row gives the same numbers as its samples alone. Shapes never
change, and few tokens are padding.
"""

import numpy as np
import torch

from data.chat import IGNORE, IMAGE_TOKEN

PAD = 0  # token id under padding; its value does not matter


def pack(samples, rows, length):
    """First-fit packing of `samples` [(ids, labels, images)] into batches of `rows` rows.

    A sample goes into the first row with enough room. If no row has room, the batch is finished and
    the sample opens the next one, so the batches use the samples in their order. An empty sample
    stands for a rejected one: it takes no room but is counted. ValueError for a sample longer than
    `length`. Yields the batches of `assemble`.
    """
    batch, used = [[] for _ in range(rows)], [0] * rows
    for ids, labels, images in samples:
        if len(ids) > length:
            raise ValueError(f"a sample of {len(ids)} tokens does not fit in a row of {length}; "
                             f"use longer rows: --row-tokens {len(ids)}")  # fmt: skip
        row = next((r for r in range(rows) if used[r] + len(ids) <= length), None)
        if row is None:
            yield assemble(batch, length)
            batch, used, row = [[] for _ in range(rows)], [0] * rows, 0
        batch[row].append((ids, labels, images))
        used[row] += len(ids)
    if any(batch):
        yield assemble(batch, length)


def assemble(batch, length):
    """Rows of samples -> {"tokens", "labels", "segments": [rows, length] int64, "images":
    [n, 3, S, S] in reading order, "samples": how many}."""
    tokens = torch.full((len(batch), length), PAD)
    labels = torch.full((len(batch), length), IGNORE)
    segments = torch.zeros(len(batch), length, dtype=torch.long)
    images = []
    for r, row in enumerate(batch):
        at = 0
        for k, (ids, targets, pictures) in enumerate(row):
            here = slice(at, at + len(ids))
            tokens[r, here], labels[r, here] = torch.tensor(ids), torch.tensor(targets)
            labels[r, at : at + 1] = IGNORE  # nothing predicts the first token of a conversation
            segments[r, here] = k + 1
            images.extend(pictures)
            at += len(ids)
    images = torch.from_numpy(np.stack(images)) if images else torch.empty(0, 3, 0, 0)
    return {"tokens": tokens, "labels": labels, "segments": segments, "images": images,
            "samples": sum(map(len, batch))}  # fmt: skip


def collate(batch, image_tokens, rank=0, world=1, device="cpu"):
    """A packed batch -> the arguments of CuMo.forward for the rows of `rank` out of `world` ranks
    (see `check_rows`), on `device`; a GPU copies them while the CPU goes on.

    "images" is missing if the batch has none, and empty if only rows of other ranks have some.
    """
    rows = len(batch["tokens"])
    mine = slice(rank * rows // world, (rank + 1) * rows // world)
    given = {name: batch[name][mine] for name in ("tokens", "labels", "segments")}
    if len(batch["images"]):
        ends = (batch["tokens"] == IMAGE_TOKEN).sum(1).cumsum(0) // image_tokens
        ends = [0, *ends.tolist()]  # ends[r]: images of the rows before r
        given["images"] = batch["images"][ends[mine.start] : ends[mine.stop]]
    if not str(device).startswith("cuda"):
        return {name: tensor.to(device) for name, tensor in given.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True)
            for name, tensor in given.items()}  # fmt: skip


def step_shares(batches):
    """The weight of each batch in the losses of a step, [{"lm", "clip", "mlp", "llm"}: 0 to 1].

    A mean over a step counts what it is a mean of: learned tokens for the LM loss, images for the
    router losses of CLIP and the connector, tokens for those of the language model. So a step has
    the same loss however it is split into batches. CuMo: micro-batches weigh the same.
    """
    counts = [
        {"lm": int((batch["labels"][:, 1:] != IGNORE).sum()), "clip": len(batch["images"]),
         "mlp": len(batch["images"]), "llm": int((batch["segments"] > 0).sum())}
        for batch in batches
    ]  # fmt: skip
    totals = {name: max(1, sum(count[name] for count in counts)) for name in counts[0]}
    return [{name: n / totals[name] for name, n in count.items()} for count in counts]


def step_metrics(rows, shares):
    """Each number, or list of numbers, of a step: the sum of its batches' by their shares.

    rows: [{name: tensor}]. All are read at once, because a GPU has to be waited for each time.
    """
    total = {}
    for row, share in zip(rows, shares):
        for key, value in row.items():  # lm_loss, clip_balance, ...; "loss" has its shares already
            weighed = share.get(key.split("_")[0], 1) * value.double()
            total[key] = total[key] + weighed if key in total else weighed
    numbers = torch.cat([value.flatten() for value in total.values()]).cpu()
    parts = numbers.split([value.numel() for value in total.values()])
    return {key: part.view(value.shape).numpy().round(6).tolist()
            for (key, value), part in zip(total.items(), parts)}  # fmt: skip


def check_positions(row_tokens, positions, window=None):
    """ValueError if a conversation as long as a row has places that the language model does not
    know. With a sliding window only the distance within the window counts."""
    if row_tokens > positions and not window:
        raise ValueError(f"--row-tokens {row_tokens} is longer than the {positions} positions of "
                         f"the language model; take {positions} or less")  # fmt: skip


def check_rows(rows, world):
    """ValueError unless every one of `world` ranks gets the same number of rows."""
    if rows % world:
        raise ValueError(f"--rows {rows} cannot be shared evenly by {world} processes; use a "
                         f"multiple of {world}: --rows {-(-rows // world) * world}")  # fmt: skip
