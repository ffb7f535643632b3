"""Two and four processes on one CPU train the same model as a single process."""

import functools
import json
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_cumo

import train
from cumo import IGNORE, IMAGE_TOKEN, CuMo
from data.packing import collate
from engine import compiling, fsdp

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "data" / "mini" / "llm" / "tokenizer.json"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_fsdp", "torch._dynamo", "torch.distributed.fsdp"])


@pytest.fixture(scope="module", autouse=True)
def server():
    """A process that imports everything once and forks, so that the next ones start at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()


TRACED = functools.partialmethod(torch.nn.Module.compile, backend="eager")  # not translated
SPARSE_LLM = dict(upcycle="clip,mlp,llm", accumulate=1, samples=48)


def enter(rank, n, port, work, args):
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": n}
    where |= {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
    os.environ |= {k: str(v) for k, v in where.items()}
    torch.set_num_threads(1)
    fsdp.start("cpu")
    work(*args)


def begin(n, work, *args):
    """Start work(*args) in n processes, as torchrun would."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    started = [FORKS.Process(target=enter, args=(r, n, port, work, args)) for r in range(n)]
    for process in started:
        process.start()
    return started


def end(started):
    """Wait for the processes; all of them must exit with 0."""
    deadline = time.time() + 300
    while any(p.is_alive() for p in started) and time.time() < deadline:
        if any(p.exitcode for p in started):
            break  # the others would wait for it until the deadline
        time.sleep(0.02)
    for process in started:
        process.kill()
        process.join()
    assert [p.exitcode for p in started] == [0] * len(started)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags that train a tiny model on ten pictures and ten texts of different lengths."""
    folder = tmp_path_factory.mktemp("start")
    tiny_cumo(vocab=1024).save_pretrained(folder)
    shutil.copy(TOKENIZER, folder)
    samples = []
    for i in range(10):
        Image.radial_gradient("L").rotate(36 * i).convert("RGB").save(folder / f"{i}.png")
        picture = [f"<image>\nWhat is {i}?", "a red circle"], {"image": f"{i}.png"}
        text = ["Tell me a story of two cats", " ".join(["the cat sees a cat"] * (3 + i))], {}
        for (asked, answer), more in (picture, text):
            turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            samples.append({"id": str(len(samples)), "conversations": turns} | more)
    (folder / "data.json").write_text(json.dumps(samples))
    return dict(init=str(folder), data=str(folder / "data.json"), image_folder=str(folder),
                template="mistral_instruct",
                rows=4, row_tokens=72, accumulate=2, lr=1e-3, weight_decay=0.1, device="cpu",
                bf16=False, save_every=3, samples=80)  # fmt: skip


def configured(flags, out, stage=3, **more):
    return train.resolve(flags | dict(out=str(out)) | more, stage)


def work(cfg, stop_at=None):
    """Train a stage; in step `stop_at` a signal stops the last rank."""
    step = train.Trainer.train_step

    def interrupted(self, *args):
        rank, n = fsdp.world()
        if self.step + 1 == stop_at and rank == n - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "train_step", interrupted)
        cfg.plot = False  # drawing takes seconds
        assert train.train_stage(cfg) == (stop_at is None)


def metrics(folder, stage=3):
    lines = (folder / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_training(one, many, stage=3):
    """The same numbers in every step, and the same weights in the checkpoint."""
    rows, others = metrics(one, stage), metrics(many, stage)
    assert len(rows) == len(others) >= 5
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for name in row.keys() - {"tokens_per_s", "samples_per_s", "mfu", "memory_gb"}:
            got, expected = torch.tensor(other[name]), torch.tensor(row[name])
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)
    a, b = (load_file(out / f"stage{stage}/model.safetensors") for out in (one, many))
    assert a.keys() == b.keys()
    for name, weight in a.items():
        # Adam scales up rounding errors here: the exact gradient of the keys' bias is 0, because
        # softmax does not change when all scores of a query shift
        most = 1e-4 if name.endswith("k_proj.bias") else 1e-6
        assert (b[name] - weight).norm() <= most * weight.norm(), name


@pytest.fixture(scope="module")
def one(flags, tmp_path_factory):
    """The trainings of one process: with CLIP and connector sparse, and with the LLM as well."""
    out = tmp_path_factory.mktemp("one")
    work(configured(flags, out))
    work(configured(flags, out / "llm", **SPARSE_LLM))
    return out


def test_a_signal_to_one_process_stops_both_and_one_alone_goes_on(flags, one, tmp_path):
    cfg = configured(flags, tmp_path)
    end(begin(2, work, cfg, 4))
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]
    work(cfg)
    assert_same_training(one, tmp_path)


def test_two_processes_go_on_where_one_stopped_with_a_sparse_llm_too(flags, one, tmp_path):
    cfg = configured(flags, tmp_path, **SPARSE_LLM)
    work(cfg, stop_at=2)
    end(begin(2, work, cfg))
    assert_same_training(one / "llm", tmp_path)
    CuMo.from_pretrained(tmp_path / "stage3")


@pytest.mark.slow
def test_four_processes_train_like_one_and_some_have_no_picture(flags, one, tmp_path):
    cfg = configured(flags, tmp_path, **SPARSE_LLM)
    train.choose_precision(cfg)
    pictures = [(x["tokens"] == IMAGE_TOKEN).any(1) for x in train.Trainer(cfg).batches()]
    assert any(rows.any() and not rows.all() for rows in pictures)  # each rank gets one row
    end(begin(4, work, cfg))
    assert_same_training(one / "llm", tmp_path)


def test_stage_1_trains_the_connector_alone_in_two_processes_too(flags, tmp_path):
    folder = Path(flags["init"])
    captions = json.loads((folder / "data.json").read_text())[::2]
    (folder / "captions.json").write_text(json.dumps(captions))
    own = dict(stage=1, data=str(folder / "captions.json"), accumulate=1, row_tokens=30,
               template="plain")  # fmt: skip
    work(configured(flags, tmp_path / "one", **own))
    end(begin(2, work, configured(flags, tmp_path / "many", **own)))
    assert_same_training(tmp_path / "one", tmp_path / "many", stage=1)


def test_two_processes_log_the_held_out_loss_of_one(flags, tmp_path):
    own = dict(val=flags["data"], samples=40)
    work(configured(flags, tmp_path / "one", **own))
    end(begin(2, work, configured(flags, tmp_path / "many", **own)))
    one, many = ([row.get("val_loss") for row in metrics(tmp_path / k)] for k in ("one", "many"))
    assert [x is None for x in one] == [x is None for x in many]
    assert [x for x in many if x] == pytest.approx([x for x in one if x], rel=1e-5)


def compiled_work(cfg):
    """Train with compiled blocks (traced, not translated); after the warm-up a new trace fails."""
    warm_up = compiling.warm_up

    def then_no_more(trainer, most):
        warm_up(trainer, most)
        torch.compiler.set_stance("fail_on_recompile")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", TRACED)
        patch.setattr(compiling, "warm_up", then_no_more)
        work(cfg)


def test_nothing_compiles_after_the_warm_up_in_two_processes(flags, one, tmp_path):
    cfg = configured(flags, tmp_path, compile=True)
    end(begin(2, compiled_work, cfg))
    assert_same_training(one, tmp_path)


def stopped_in_the_warm_up(cfg):
    """A signal reaches the last rank in the first pass of its warm-up."""
    assemble = compiling.assemble

    def interrupted(*args):
        rank, n = fsdp.world()
        if rank == n - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return assemble(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", TRACED)
        patch.setattr(compiling, "assemble", interrupted)
        cfg.plot = False
        assert not train.train_stage(cfg)


def test_a_signal_in_the_warm_up_stops_two_processes_before_the_first_step(flags, tmp_path):
    end(begin(2, stopped_in_the_warm_up, configured(flags, tmp_path, compile=True)))
    assert not metrics(tmp_path)


def tiny_batch():
    """Four rows with 1, 0, 0 and 2 pictures, and answers of very different lengths."""
    torch.manual_seed(1)
    tokens, segments = torch.randint(97, (4, 32)), torch.ones(4, 32, dtype=torch.int64)
    segments[:, 25:] = 0
    tokens[0, 3:12] = tokens[3, 3:12] = tokens[3, 13:22] = IMAGE_TOKEN
    labels = tokens.masked_fill((tokens == IMAGE_TOKEN) | (segments == 0), IGNORE)
    labels[:, 0], labels[0, :20] = IGNORE, IGNORE
    images = torch.randn(3, 3, 24, 24)
    return dict(tokens=tokens, segments=segments, labels=labels, images=images)


def compare_steps(llm_experts, recompute):
    """On each rank: losses and whole gradients of three steps equal those of one process."""
    alone, sharded = (tiny_cumo(8, llm_experts).train() for _ in range(2))
    sharded = fsdp.shard(sharded, "cpu", bf16=False)
    sharded.vision.recompute = sharded.llm.recompute = 9 * recompute  # all layers, or none
    batch, seen = tiny_batch(), []
    text = batch | {"tokens": batch["tokens"].clamp(min=0), "images": batch["images"][:0]}

    def watched(lm_loss, aux, *counts):
        seen.append((aux, counts[0]))
        return fsdp.reduce_losses(lm_loss, aux, *counts)

    sharded.reduce_losses = watched
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    for given in (batch, text, batch):
        for model in (sharded, alone):
            model.zero_grad()
        out = sharded(**collate(given, alone.image_tokens, *fsdp.world()))
        images = given["images"] if len(given["images"]) else None
        expected = alone(**given | {"images": images})
        for result in (out, expected):
            result.loss.backward()
        close(out.loss, expected.loss)
        close(out.aux, expected.aux)
        close(out.load, expected.load)
        for (name, p), q in zip(sharded.named_parameters(), alone.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if q.grad is not None:
                close(p.grad.full_tensor(), q.grad, msg=name)
                for weight in (p, q):
                    weight.data.add_(weight.grad, alpha=-0.1)
    (rank, n), (aux, n_images) = fsdp.world(), seen[-1]
    assert n_images == {2: [1, 2], 4: [1, 0, 0, 2]}[n][rank]
    if rank == 0:  # rank 0's picture uses fewer experts than all pictures together
        assert ((aux["clip"].load == 0) & (expected.load["clip"] > 0)).any()


@pytest.mark.parametrize(
    "n, llm_experts, recompute", [(4, 4, True), pytest.param(2, 0, False, marks=pytest.mark.slow)]
)
def test_losses_and_gradients_are_those_of_one_process(n, llm_experts, recompute):
    end(begin(n, compare_steps, llm_experts, recompute))


def test_processes_share_the_rows_and_their_pictures():
    batch = tiny_batch()
    for n in (1, 2, 4):
        shares = [collate(batch, 9, rank, n) for rank in range(n)]
        for name, whole in batch.items():
            assert torch.equal(torch.cat([share[name] for share in shares]), whole)
    assert "images" not in collate(batch | {"images": batch["images"][:0]}, 9)


def test_rows_that_cannot_be_shared_evenly_are_refused(monkeypatch, flags, tmp_path):
    monkeypatch.setattr(fsdp, "world", lambda: (0, 3))
    with pytest.raises(ValueError, match="--rows 4 .* by 3 processes; use a multiple of 3.* 6"):
        train.train_stage(configured(flags, tmp_path))


@pytest.mark.slow
def test_torchrun_starts_the_ordinary_command(flags, one, tmp_path):
    valued = {k: v for k, v in flags.items() if k != "bf16"}
    options = [f for k, v in valued.items() for f in (f"--{k.replace('_', '-')}", str(v))]
    options.append("--no-bf16")
    go = ["torch.distributed.run", "--nproc_per_node=2", ROOT / "train.py", *options]
    go = [sys.executable, "-m", *go, "--stage", "3", "--out", tmp_path]
    done = subprocess.run(go, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("stage 3: finished") == 1, done.stderr
    assert_same_training(one, tmp_path)
