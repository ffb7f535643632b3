"""Loading: the same samples with any number of workers and after a resume; broken pictures."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from given import given, settings, st
from PIL import Image
from refused import refusal
from tiny import command

import train
from data.chat import Rejected
from data.llava import Encoded, LlavaData, Unreadable, encode
from data.loader import KINDS, Loader, data_order, default_workers, in_steps, summary
from data.packing import pack
from data.tokenizer import Tokenizer

MINI = Path(__file__).parents[1] / "data" / "mini" / "llm"
LENGTH = 96  # tokens a row


def talk(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    """30 records: with and without a picture, too long, without an answer that fits, one broken."""
    records = []
    for k in range(30):
        Image.new("RGB", (9 + k, 20), (8 * k, 0, 0)).save(tmp_path / f"{k}.png")
        turns = talk("<image>\nWhat?", f"number {k}") if k % 3 else talk("Hi", f"ho {k}")
        turns += talk("And?", "one two " * (60 if k % 7 == 2 else k % 5 + 1))
        turns = talk("Q " * 200, "A") if k == 6 else turns
        records.append({"id": f"n{k}", "conversations": turns})
        records[-1] |= {"image": f"{k}.png"} if "<image>" in turns[0]["value"] else {}
    (tmp_path / "13.png").write_text("no picture")
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def loader(folder, workers=0, samples=70, counts=None, image_size=16):
    data = LlavaData(folder / "data.json", folder)
    code = partial(encode, tokenizer=Tokenizer.from_pretrained(MINI), template="mistral_instruct",
                   image_tokens=4, image_size=image_size, max_tokens=LENGTH)  # fmt: skip
    order = data_order(len(data), samples, seed=1)
    return Loader(data, order, code, workers, counts, folder / "skipped.jsonl")


def same(a, b):
    return a[:2] == b[:2] and len(a[2]) == len(b[2]) and all(map(np.array_equal, a[2], b[2]))


# ---------------------------------------------------------------------- order, workers, resuming


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
def test_samples_are_the_same_with_any_number_of_workers(folder):
    alone = loader(folder)
    expected = list(alone.samples())
    assert all(alone.counts.values()), "there are samples of every kind"
    log = (folder / "skipped.jsonl").read_text()
    assert len(expected) == sum(alone.counts.values()) == 70
    for workers in (1, 3):
        with_workers = loader(folder, workers)
        assert all(map(same, expected, list(with_workers.samples())))
        assert with_workers.counts == alone.counts
        assert (folder / "skipped.jsonl").read_text() == log


def test_random_state_of_the_training_is_left_alone(folder):
    before = torch.get_rng_state()
    for workers in (0, 1):
        next(loader(folder, workers).samples())
        assert torch.equal(torch.get_rng_state(), before)


def packed(folder, workers, counts, used):
    return pack(loader(folder, workers, counts=counts).samples(used), 2, LENGTH)


def alike(one, two):
    tensors = all(torch.equal(one[k], two[k]) for k in ("tokens", "labels", "segments"))
    return tensors and torch.equal(one["images"], two["images"])


@pytest.mark.parametrize("workers", [0, 1])
def test_stopping_after_any_batch_and_starting_anew_gives_the_same_rest(workers, folder):
    counts = dict.fromkeys(KINDS, 0)
    batches = list(packed(folder, 0, counts, 0))
    log = (folder / "skipped.jsonl").read_text()
    for stop in range(0, len(batches), 4 if workers else 1):
        (folder / "skipped.jsonl").unlink()
        again = dict.fromkeys(KINDS, 0)
        first = list(islice(packed(folder, 0, again, 0), stop))
        used = sum(batch["samples"] for batch in first)
        assert sum(again.values()) == used, "a sample that pack holds back is not counted"
        rest = list(packed(folder, workers, again, used))
        assert all(map(alike, batches, first + rest)) and len(first + rest) == len(batches)
        assert again == counts
        assert (folder / "skipped.jsonl").read_text() == log


def test_loader_can_be_sent_to_workers_that_are_no_forks(folder):
    sent = pickle.loads(pickle.dumps(loader(folder)))
    assert all(map(same, loader(folder).samples(), sent.samples()))


def test_every_epoch_is_a_new_permutation_of_all_samples():
    order = data_order(50, 120, seed=3).tolist()
    assert sorted(order[:50]) == sorted(order[50:100]) == list(range(50))
    assert order[:50] != order[50:100] and len(order) == 120
    assert order == data_order(50, 120, seed=3).tolist() != data_order(50, 120, 4).tolist()


def test_workers_are_for_gpus_and_shared_by_the_processes_of_a_machine(monkeypatch):
    assert default_workers("cpu") == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert default_workers("cuda:0") == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers("cuda") == 2
    assert train.resolve({"device": "cpu"}, 1).workers == 0
    assert train.resolve({"device": "cpu", "workers": 3}, 1).workers == 3


# --------------------------------------------------------------------------------- broken pictures


def coded(i, broken):
    """A sample whose only token is its number."""
    if i in broken:
        raise Unreadable(f"n{i}", f"{i}.png", f"{i}.png: is no image")
    return Encoded([i], [i], [], 0)


def serve(n, broken, start=0, log=None, epochs=1, counts=None):
    code = partial(coded, broken=broken)
    order = torch.arange(n).repeat(epochs)
    return Loader(range(n), order, code, 0, counts, log).samples(start)


def test_broken_picture_is_skipped_counted_and_listed_with_id_path_and_reason(folder):
    served = loader(folder, samples=30)
    samples = list(served.samples())
    at = served.order.tolist().index(13)
    assert samples[at] == ([], [], []) and served.counts["skipped"] == 1
    (line,) = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    path = str(folder / "13.png")
    reason = f"{path}: is no image Pillow can read; make it a PNG or JPEG"
    assert line == {"place": at, "id": "n13", "path": path, "reason": reason}
    assert summary(served.counts, served.data, 96)[-1].startswith(
        "1 samples had a picture that cannot"
    )


def test_every_kind_of_broken_picture_is_skipped(folder):
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "1.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])  # cut short
    bomb = Image.new("1", (40_000, 9_000))  # 360 million pixels in 45 kB
    bomb.save(folder / "2.png")
    Image.new("L", (20_000, 1)).save(folder / "4.png")  # its square would take a gigabyte
    served = loader(folder, samples=30)
    (folder / "5.png").unlink()  # after the check at the beginning
    (folder / "7.png").unlink()
    (folder / "7.png").mkdir()
    list(served.samples())
    lines = [json.loads(x) for x in (folder / "skipped.jsonl").read_text().splitlines()]
    reasons = {Path(line["path"]).name: line["reason"] for line in lines}
    expected = {"1.png": "cannot be read as an image", "2.png": "pixels", "4.png": "too narrow",
                "5.png": "no such image", "7.png": "folder", "13.png": "is no image"}  # fmt: skip
    assert reasons.keys() == expected.keys() and served.counts["skipped"] == 6
    assert all(
        text in reasons[name] and "\n" not in reasons[name] for name, text in expected.items()
    )


def test_picture_is_listed_once_though_it_comes_every_epoch(tmp_path):
    log, counts = tmp_path / "skipped.jsonl", dict.fromkeys(KINDS, 0)
    list(serve(200, {3, 50}, log=log, epochs=3, counts=counts))
    assert counts["skipped"] == 6
    assert [json.loads(x)["id"] for x in log.read_text().splitlines()] == ["n3", "n50"]


@settings(max_examples=60, deadline=None)
@given(broken=st.sets(st.integers(0, 59), max_size=9), data=st.data())
def test_resume_lists_no_picture_twice_and_loses_none(broken, data, tmp_path_factory):
    """For every place of the kill and of the resume point before it."""
    log = tmp_path_factory.getbasetemp() / "skipped.jsonl"
    log.unlink(missing_ok=True)
    resume = data.draw(st.integers(0, 60))
    killed = data.draw(st.integers(resume, 60))
    list(islice(serve(60, broken, log=log), killed))
    if log.is_file() and data.draw(st.booleans()):
        with open(log, "a") as file:
            file.write('{"place": 59, "id": "n')  # killed while writing
    list(serve(60, broken, resume, log))
    lines = log.read_text().splitlines() if log.is_file() else []
    assert [json.loads(line)["id"] for line in lines] == [f"n{i}" for i in sorted(broken)]


@pytest.mark.parametrize("n, broken, stops", [
    (100, range(9), False),  # 9 %, but fewer than 10
    (100, range(10), True),
    (2000, range(1990, 2000), False),  # 10, but half a percent
    (2000, range(100, 2000, 101), False),  # just below 1 %
    (3000, range(100, 3000, 90), True),  # just above 1 %
])  # fmt: skip
def test_more_than_one_percent_of_broken_pictures_ends_the_run(n, broken, stops, tmp_path):
    log, met = tmp_path / "skipped.jsonl", []
    try:
        met.extend(serve(n, set(broken), log=log))
    except ValueError as error:
        skipped = len(log.read_text().splitlines())
        assert stops and skipped >= 10 and "\n" not in str(error)
        first = "; ".join(f"{i}.png: is no image" for i in list(broken)[:3])
        assert f"{skipped} of the first " in str(error) and first in str(error)
        assert str(log) in str(error)
    else:
        assert not stops and len(met) == n


def test_nothing_left_to_learn_from_is_said():
    with pytest.raises(ValueError, match="none of the 5 samples holds .*; 3 of them were skipped"):
        summary(dict(used=0, cut=0, rejected=2, skipped=3), [], 96)


# ------------------------------------------------------------------------------- faults, processes


def children(pid):
    """Process ids of the running children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:  # it has just ended
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=300):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="reads /proc")


def faulty(i, kind):
    if i == 5 and kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 5:
        raise {"value": ValueError, "os": OSError, "bug": KeyError}[kind]("sample 5: a fault")
    return Encoded([i], [i], [], 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["value", "os"])
def test_fault_in_a_worker_is_the_same_line_as_without(kind, workers):
    served = Loader(range(9), torch.arange(9), partial(faulty, kind=kind), workers).samples()
    with pytest.raises((ValueError, OSError)) as error:
        list(served)
    assert str(error.value) == "sample 5: a fault"


@needs_proc
def test_bug_in_a_worker_keeps_its_traceback():
    before = children(os.getpid())
    with pytest.raises(KeyError, match="in faulty") as bug:
        list(Loader(range(9), torch.arange(9), partial(faulty, kind="bug"), 1).samples())
    assert bug and children(os.getpid()) == before, "and leaves no process behind"


@pytest.mark.slow  # DataLoader checks its workers every 5 seconds
def test_dead_worker_is_one_clear_line():
    served = Loader(range(9), torch.arange(9), partial(faulty, kind="kill"), 1).samples()
    with pytest.raises(ValueError, match="a process that reads the data has died .*--workers"):
        list(served)


@needs_proc
def test_workers_end_with_the_loader(folder):
    before = set(children(os.getpid()))
    served = loader(folder, 2).samples()
    next(served)
    pids = set(children(os.getpid())) - before
    assert len(pids) == 2
    served.close()
    until(lambda: not any(map(alive, pids)), 3)


def threads(i):
    return Encoded([torch.get_num_threads()], [0], [], 0)


def test_worker_uses_one_thread(monkeypatch):
    torch.set_num_threads(2)
    try:
        ((ids, *_),) = Loader(range(1), torch.arange(1), threads, 1).samples()
    finally:
        torch.set_num_threads(1)
    assert ids == [1]


@needs_proc
def test_workers_die_with_a_parent_that_is_killed(folder):
    code = ("import sys; sys.path[:0] = ['tests', '.']; import test_loader as t, time\n"
            f"s = t.loader(t.Path({str(folder)!r}), 2, 10**6, None, 224).samples(); next(s)\n"
            "print('ready', flush=True); time.sleep(60)")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1],
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    pids = children(process.pid)
    assert len(pids) == 2
    time.sleep(0.3)  # now both wait to hand over samples that are never taken
    process.kill()
    process.wait()
    until(lambda: not any(map(alive, pids)), 3)


@needs_proc
def test_signals_to_the_whole_group_save_and_exit_130_without_orphans(weights, tmp_path):
    go = command(weights | dict(samples=4000, workers=2), tmp_path, "--stage", "1")
    process = subprocess.Popen(go, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    until(lambda: process.poll() is None and (tmp_path / "stage1" / "resume.pt").is_file())
    pids = children(process.pid)
    assert len(pids) == 2
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):  # both at once
        os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 130 and "to continue: " in output
    assert "Traceback" not in errors and not any(map(alive, pids))
    state = torch.load(tmp_path / "stage1" / "resume.pt", weights_only=True)
    assert sum(state["counts"].values()) == state["used"] > 0


# ---------------------------------------------------------------------------------- in a training


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2")
@pytest.mark.parametrize("workers", (0, 2))
def test_step_read_ahead_has_the_batches_and_counts_of_one_that_is_not(workers, folder):
    def steps(ahead, used=0, counts=None):
        counts = dict(counts or dict.fromkeys(KINDS, 0))
        read = loader(folder, workers, counts=counts)
        return in_steps(pack(read.samples(used), 2, LENGTH), 3, counts, ahead)

    plain, ahead = list(steps(False)), list(steps(True))
    assert len(plain) == len(ahead) > 3
    for (some, counts), (same, also) in zip(plain, ahead):
        assert counts == also and len(some) == len(same) and all(map(alike, some, same))
    # stopped after any step, the counts are those of the samples used: a resumed training reads on
    for stop in range(1, len(plain)):
        with closing(steps(True)) as stream:
            used = sum(b["samples"] for batches, _ in islice(stream, stop) for b in batches)
            counts = plain[stop - 1][1]
        assert used == sum(counts.values())
        rest = list(steps(True, used, counts))
        assert [c for _, c in rest] == [c for _, c in plain[stop:]]


def test_fault_in_a_step_read_ahead_comes_after_the_step_before():
    def batches():
        yield "first"
        raise ValueError("a fault")

    stream = in_steps(batches(), 1, {}, ahead=True)
    assert next(stream) == (["first"], {})
    with pytest.raises(ValueError, match="a fault"):
        next(stream)


def test_training_sees_the_same_batches_with_workers(weights, tmp_path):
    batches = []
    for workers in (0, 2):
        cfg = train.resolve(weights | dict(out=str(tmp_path), workers=workers), 1)
        train.choose_precision(cfg)
        batches.append(list(train.Trainer(cfg).batches()))
    assert len(batches[0]) == len(batches[1]) > 1 and all(map(alike, *batches))


def test_stopped_training_lists_a_broken_picture_once(weights, folder, capsys, monkeypatch):
    own = dict(data=str(folder / "data.json"), image_folder=str(folder), out=str(folder / "out"))
    own |= dict(template="mistral_instruct", row_tokens=120, samples=60, workers=1, save_every=2)
    cfg = train.resolve(weights | own, 1)
    step = train.Trainer.train_step
    for stop in (3, 7, 1000):

        def interrupted(self, *args, stop=stop):
            self.stop = self.step == stop
            return step(self, *args)

        monkeypatch.setattr(train.Trainer, "train_step", interrupted)
        assert train.train_stage(cfg) == (stop == 1000)
    lines = (folder / "out" / "stage1" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["n13"]
    said = capsys.readouterr().out
    assert "stage 1: 2 samples had a picture that cannot be read; skipped.jsonl lists" in said
    assert "stage 1: 2 samples had nothing to learn" in said and "lost their last turns" in said


def test_row_too_short_for_an_image_is_said_before_the_first_step(weights, tmp_path):
    cfg = train.resolve(weights | dict(out=str(tmp_path), row_tokens=16), 1)
    with pytest.raises(ValueError, match="--row-tokens 16 is too short: an image takes 16 tokens"):
        train.train_stage(cfg)
    assert not any(tmp_path.iterdir())


def test_limit_is_refused_for_the_emoji_world(weights, tmp_path, monkeypatch, capsys):
    given_flags = command(weights, tmp_path, "--limit", "5")[2:]
    line = refusal(train.main, given_flags, monkeypatch, capsys)
    assert "--limit 5 is for --data; the emoji world has --samples" in line


def test_rejected_is_no_unreadable_and_both_are_one_line():
    assert not issubclass(Rejected, Unreadable) and not issubclass(Unreadable, Rejected)
    assert str(Unreadable("n1", "a.png", "a.png: is no image")) == "sample n1: a.png: is no image"
