"""Packing: no sample lost or doubled, and no label that nothing could predict."""

import numpy as np
import pytest
import torch
from given import given, settings, st

from data.chat import IGNORE
from data.packing import PAD, pack, step_metrics


def samples_of(lengths, images=()):
    """Sample k: `lengths[k]` tokens k+1, all of them learned, and pictures whose pixels are the
    sample's number, the picture's number and 0, [3, 1, 1]."""
    for k, n in enumerate(lengths):
        n_images = images[k] if images else 0
        pictures = [np.array([k, i, 0]).reshape(3, 1, 1) for i in range(n_images)]
        yield [k + 1] * n, [k + 1] * n, pictures


def unpacked(batch):
    """Samples of a batch in reading order: [(tokens, labels)], found by their segments."""
    found = []
    for tokens, labels, segments in zip(batch["tokens"], batch["labels"], batch["segments"]):
        for k in range(1, int(segments.max()) + 1):
            found.append((tokens[segments == k].tolist(), labels[segments == k].tolist()))
    return found


lengths = st.lists(st.integers(1, 16), max_size=40)


@settings(max_examples=200, deadline=None)
@given(lengths=lengths, rows=st.integers(1, 4), length=st.integers(16, 30))
def test_every_sample_is_there_once_and_whole(lengths, rows, length):
    batches = list(pack(samples_of(lengths), rows, length))
    found = [sample for batch in batches for sample in unpacked(batch)]
    assert sorted(tokens for tokens, _ in found) == sorted(
        [k + 1] * n for k, n in enumerate(lengths)
    )
    assert all(labels == [IGNORE] + tokens[1:] for tokens, labels in found)
    for batch in batches:
        assert {
            k: tuple(batch[k].shape) for k in ("tokens", "labels", "segments")
        } == dict.fromkeys(("tokens", "labels", "segments"), (rows, length))
        assert all(batch[k].dtype == torch.int64 for k in ("tokens", "labels", "segments"))


@settings(max_examples=200, deadline=None)
@given(lengths=lengths, rows=st.integers(1, 4))
def test_batches_use_the_samples_in_their_order(lengths, rows):
    used = 0
    for batch in pack(samples_of(lengths), rows, 16):
        numbers = sorted(tokens[0] for tokens, _ in unpacked(batch))
        assert numbers == list(range(used + 1, used + 1 + batch["samples"]))
        used += batch["samples"]
    assert used == len(lengths)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), lengths=lengths, rows=st.integers(1, 4))
def test_images_stand_in_reading_order(data, lengths, rows):
    counts = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    for batch in pack(samples_of(lengths, counts), rows, 20):
        order = [tokens[0] - 1 for tokens, _ in unpacked(batch)]
        assert batch["images"].flatten(1).tolist() == [
            [k, i, 0] for k in order for i in range(counts[k])
        ]


def test_padding_is_segment_0_and_never_learned():
    (batch,) = pack(samples_of([3, 4]), 2, 5)
    assert batch["segments"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    empty = batch["segments"] == 0
    assert (batch["tokens"][empty] == PAD).all() and (batch["labels"][empty] == IGNORE).all()


def test_first_fit_fills_the_gaps_of_earlier_rows():
    (batch,) = pack(samples_of([5, 6, 3, 2]), 2, 8)
    assert batch["segments"].tolist() == [[1] * 5 + [2] * 3, [1] * 6 + [2] * 2]
    assert batch["samples"] == 4


def test_first_token_of_a_sample_is_never_learned():
    (batch,) = pack(samples_of([2, 2, 1]), 1, 6)
    assert batch["labels"].tolist() == [[IGNORE, 1, IGNORE, 2, IGNORE, IGNORE]]


def test_rows_are_mostly_full():
    lengths = torch.randint(20, 200, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = list(pack(samples_of(lengths), 8, 512))[:-1]
    filled = torch.cat([batch["segments"] for batch in batches]) > 0
    assert filled.float().mean() > 0.85


def test_same_samples_give_the_same_batches():
    one, two = (list(pack(samples_of([4, 9, 2, 7, 7, 1] * 5), 2, 12)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("tokens", "labels", "segments"))


def test_samples_are_taken_only_as_far_as_a_batch_needs():
    taken = []
    stream = (taken.append(k) or sample for k, sample in enumerate(samples_of([5] * 100)))
    next(pack(stream, 2, 10))
    assert len(taken) == 5  # four fill the batch, the fifth shows that it is full


def test_too_long_sample_names_the_way_out():
    with pytest.raises(ValueError, match="9 tokens does not fit in a row of 8; .*--row-tokens 9"):
        list(pack(samples_of([3, 9]), 2, 8))


def test_no_samples_give_no_batches():
    assert list(pack([], 2, 8)) == []


def test_metrics_of_a_step_are_sums_by_share_at_full_precision():
    generator = torch.Generator().manual_seed(0)
    rows = [{"loss": torch.rand((), generator=generator), "clip_load": torch.rand(3, 4)}
            for _ in range(3)] + [{"loss": torch.tensor(2.0)}]  # fmt: skip
    shares = [{"clip": 0.25}, {"clip": 0.5}, {"clip": 0.25}, {"clip": 0.0}]
    said = step_metrics(rows, shares)
    assert said["loss"] == round(sum(row["loss"].double().item() for row in rows), 6)
    load = sum(s["clip"] * row["clip_load"].double() for row, s in zip(rows, shares[:3]))
    assert said["clip_load"] == load.numpy().round(6).tolist()
