"""What a stage leaves on disk, and how it continues after Ctrl-C, a crash or a full disk.

    out/stage2/  train.json       the configuration; "finished"; CRC-32 of the finished weights;
                                  number and hash of the records of --data
                 metrics.jsonl    one line a step
                 resume.pt        while it trains: weights, moments, random state, place in the data
                 resume.old.pt    the resume point before that

The promise: a stage that was stopped anywhere ends with the weights, bit for bit, of a stage that
ran through. So a resume point holds everything that the next step depends on, is written under
another name, flushed and then renamed, and the one before it is kept in case the newest cannot be
read. Lines of metrics.jsonl after the resume point are removed, since these steps run again.

A stage refuses to continue with another configuration, naming the fields that differ, with other
data, and from weights whose CRC-32 is not the one that their stage wrote. With one record less, the
order of all others would change: some would never be used and some twice. While a training runs, a
second one into the same --out is refused.

Before the first step it checks that the resume points and the result fit on the disk, and after it,
it writes the first resume point. So a full disk is known within minutes.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import signal
import time
import zlib
from dataclasses import asdict

try:
    import fcntl
except ImportError:  # Windows: two trainings into one --out are not noticed there
    fcntl = None
import torch

from data import loader
from data.records import progress
from data.weights import check_zip, copy_into, make_folder, publish, sync, write_json
from engine import fsdp
from engine.optim import WEIGHTS, bytes_per_parameter

RESUME = ("resume.pt", "resume.old.pt")  # the newest first
PLACE = ("step", "used", "counts", "seconds")  # attributes of a Trainer: how far it has come


# ------------------------------------------------------------------------------ train.json


def stage_dir(cfg, stage):
    return pathlib.Path(cfg.out) / f"stage{stage}"


def read_state(folder):
    """The train.json of a stage; None if it was not begun. ValueError if it is damaged."""
    file = folder / "train.json"
    if not file.is_file():
        return None
    try:
        state = json.loads(file.read_text())
        dict(state["config"]), dict(state.get("crc32", {})), state["finished"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{file} is damaged; --overwrite begins the stage again") from None
    return state


def has_resume_point(folder):
    """Whether a stage has a resume point."""
    return any((folder / name).is_file() for name in RESUME)


def is_finished(folder, settings=None):
    """Whether a stage is finished. ValueError if it was made with other `settings`."""
    state = read_state(folder)
    if not state or not state["finished"]:
        return False
    refuse_difference(settings or {}, state, folder)
    return True


def begin(folder):
    """Make an empty `folder` for a stage, removing an earlier one. ValueError for files without a
    train.json. The earlier stage is renamed first: a crash cannot leave half of it in place."""
    gone, ours = folder.with_name(folder.name + ".gone"), ("train.json", "train.json.partial")
    if folder.exists():
        files = [file.name for file in folder.iterdir()]
        if files and not any(name in files for name in ours):
            raise ValueError(f"{folder} holds files that no training made; name another --out")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
    folder.mkdir(parents=True)
    shutil.rmtree(gone, ignore_errors=True)


def outdate(cfg):
    """Mark the later stages as not finished: a stage replaces the weights they started from."""
    for stage in range(cfg.stage + 1, 4):
        folder = stage_dir(cfg, stage)
        state = read_state(folder)
        if state and state["finished"] and not state["config"].get("init"):
            write_json(folder / "train.json", state | {"finished": False})
            print(f"{folder} started from the stage that begins again: it has to be trained again")


def differences(settings, state):
    """["lr was 0.1, now 0.2", ...] for each of the `settings` that differs from a stage's."""
    then, now = state["config"], json.loads(json.dumps(settings))
    # A setting that an older train.json lacks counts as off: "", 0, False and null are equal. So
    # are out/stage2 and out/stage2/, as a shell completes it.
    plain = lambda value: (value.rstrip("/") if isinstance(value, str) else value) or None
    differ = [k for k in now if plain(now[k]) != plain(then.get(k))]
    return [f"{k} was {then.get(k)!r}, now {now[k]!r}" for k in differ]


def refuse_difference(settings, state, folder):
    """ValueError that names the `settings` that differ from those of the stage in `folder`."""
    shown = ", ".join(differences(settings, state))
    if shown:
        raise ValueError(f"{folder} was made with another configuration: {shown}. Use the same "
                         "flags, another --out, or --overwrite")  # fmt: skip


def earlier_state(cfg, folder):
    """The state of a stage that is finished or has a resume point, else None.

    A choice of precision that the flags leave open is taken from that state.
    ValueError if the stage was made with other settings.
    """
    state = read_state(folder)
    if not state or not (state["finished"] or has_resume_point(folder)):
        return None  # nothing to lose
    cfg.weights = cfg.weights or state["config"].get("weights")
    cfg.moments = cfg.moments or state["config"].get("moments")
    refuse_difference(cfg.must_match, state, folder)
    return state


def records_of(data):
    """{"records": how many, "sha256": hash of their content, with the names of the pictures} of a
    LLaVA file; None for the emoji world, which follows from the settings."""
    if not hasattr(data, "records"):
        return None
    digest = hashlib.sha256()
    for i in progress(range(len(data))):
        digest.update(json.dumps(data.record(i), sort_keys=True).encode() + b"\n")
    return {"records": len(data), "sha256": digest.hexdigest()[:16]}


def check_data(cfg, data):
    """`records_of(data)`. ValueError if the stage was begun or finished with other records."""
    folder, now = stage_dir(cfg, cfg.stage), records_of(data)
    state = None if cfg.overwrite else read_state(folder)
    then = (state or {}).get("data")  # None: the emoji world, or an older train.json
    if then and now != then and (state["finished"] or has_resume_point(folder)):
        was, are = then["records"], now["records"]
        differ = f"had {was:,} records, now {are:,}" if was != are else "had other records"
        done = "trained" if state["finished"] else "begun"
        raise ValueError(
            f"{folder} was {done} on other data: {cfg.data} {differ}. Put the file back as it was, "
            "train on the new one with another --out, or begin this stage again with --overwrite"
        )
    return now


def finished_line(cfg, state):
    """What is said of a finished stage, by its train.json `state`. ValueError if its data has
    changed since then, or a file of the model is gone."""
    folder = stage_dir(cfg, cfg.stage)
    line = f"finished in {folder}"
    for name in ("config.json", *state.get("crc32", {})):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is finished, but {name} is missing: copy it again, or "
                             "train it again with --overwrite")  # fmt: skip
    try:
        data = loader.open_data(cfg, "name") if cfg.data else None
    except ValueError as error:
        return f"{line}; whether its data has changed is unknown: {error}"
    if data:
        check_data(cfg, data)
    return line


def crc_of_weights(folder):
    """{file: CRC-32} of the weights of a stage."""
    sums = {}
    for file in sorted(folder.glob("*.safetensors")):
        crc = 0
        with open(file, "rb") as opened:
            while part := opened.read(2**24):
                crc = zlib.crc32(part, crc)
        sums[file.name] = f"{crc:08x}"
    return sums


def refuse_changed_weights(folder):
    """ValueError if the weights of a finished stage are not those that it wrote."""
    folder = pathlib.Path(folder)
    try:
        written = dict(json.loads((folder / "train.json").read_text())["crc32"])
    except (OSError, ValueError, LookupError, TypeError):
        return  # not a stage, or from a version without checksums
    now = crc_of_weights(folder)
    for name in sorted(written.keys() | now):
        if now.get(name) != written.get(name):
            changed = "is not what its stage wrote (its CRC-32 is not the one in train.json)"
            raise ValueError(f"{folder / name} {changed if name in now else 'is missing'}: copy it "
                             "again, or train it again with --overwrite")  # fmt: skip


def finish(trainer, model, **measured):
    """Turn a fully trained stage into a checkpoint: weights, tokenizer, train.json."""
    folder, cfg = trainer.folder, trainer.cfg
    model.save_pretrained(folder)
    for file in trainer.tokenizer.files:
        copy_into(folder, file)
    state = {"finished": True, "seconds": round(trainer.seconds, 1), "samples": trainer.used}
    state |= measured
    state |= {"crc32": crc_of_weights(folder), "data": trainer.records, "config": asdict(cfg)}
    write_json(folder / "train.json", state)
    for file in folder.glob("resume*"):
        file.unlink()


# ------------------------------------------------------------------------------ resume points


def sizes_on_disk(plan):
    """Bytes of a resume point and of the finished weights; plan: a memory.Plan."""
    weight = WEIGHTS[plan.weights].itemsize
    moments = bytes_per_parameter(plan.weights, plan.moments) - 2 * weight
    return plan.parameters * weight + plan.learning * moments, plan.parameters * weight


def check_disk(cfg, plan, steps):
    """ValueError if a training of so many steps would fill the disk. Two resume points are kept
    while the next one, or the result, is written."""
    point, result = sizes_on_disk(plan)
    saves = 1 + steps // cfg.save_every
    need = max(min(3, saves) * point, min(2, saves) * point + result)
    folder = place = stage_dir(cfg, cfg.stage).absolute()
    while not place.exists():
        place = place.parent
    ours = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())  # replaced
    free = shutil.disk_usage(place).free + ours
    if need > free:
        raise ValueError(
            f"--out {cfg.out}: {free / 1e9:.2f} GB are free on that disk, and stage {cfg.stage} "
            f"writes up to {need / 1e9:.2f}: {min(3, saves)} resume points of {point / 1e9:.2f}, "
            f"a result of {result / 1e9:.2f}. Free some, or name an --out on another disk"
        )


def is_due(trainer):
    """Whether a resume point is written now: after the first step, then each --save-every."""
    return trainer.step == 1 or trainer.step % trainer.cfg.save_every == 0


@contextlib.contextmanager
def alone(out, device):
    """Keep the folder `out` for one training until it ends, even in a crash. ValueError if another
    one has it, on all ranks. Not noticed: another machine on the same network disk."""
    out, new, folder, busy = pathlib.Path(out), [], None, False
    if fcntl and fsdp.is_main():
        new = [place for place in (out, *out.parents) if not place.exists()]
        folder = os.open(out if out.is_dir() else make_folder(out), os.O_RDONLY)
        busy = not locked(folder)
    try:
        if fsdp.any_rank(busy, device):
            raise ValueError(f"another training writes into {out}; let it end, or name another "
                             "--out")  # fmt: skip
        yield
    finally:
        with contextlib.suppress(OSError):  # what is not empty stays
            for place in new:
                place.rmdir()
        if folder is not None:
            os.close(folder)


def locked(folder):
    """Whether `folder`, a file descriptor, could be locked. A second is waited: when a training is
    killed, its data workers keep the lock until they notice."""
    for _ in range(10):
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # a disk without locks
            return True
    return False


def open_stage(trainer, state):
    """Put a Trainer at the resume point of `state`, or begin its folder if that is None."""
    if state:
        load_point(trainer)
        print(f"stage {trainer.cfg.stage}: resumed after {trainer.used:,} samples")
    elif fsdp.is_main():
        begin(trainer.folder)
        outdate(trainer.cfg)
    if fsdp.is_main():
        state = {"finished": False, "data": trainer.records, "config": asdict(trainer.cfg)}
        write_json(trainer.folder / "train.json", state)


def save_point(trainer):
    """Write a resume point of a Trainer, keeping the one before as resume.old.pt."""
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict(),
             "rng": torch.get_rng_state(), **{k: getattr(trainer, k) for k in PLACE}}  # fmt: skip
    state = fsdp.gather(state)
    if not fsdp.is_main():
        return
    newest, older = (trainer.folder / name for name in RESUME)
    aside = trainer.folder / (newest.name + ".partial")
    try:
        sync(trainer.folder / "metrics.jsonl")
        torch.save(state, aside)
        if newest.is_file():
            newest.replace(older)
        publish(newest)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError
        aside.unlink(missing_ok=True)
        raise ValueError(
            f"{newest} cannot be written (is the disk full?): {error!r:.99}; "
            + "the one before is good, and the same command continues"
            * has_resume_point(trainer.folder)
        ) from None


def load_point(trainer):
    """Put a Trainer at the newest resume point that can be read. ValueError if there is none."""
    state = newest_readable(trainer.folder)
    fsdp.load_shards(trainer.model, trainer.optimizer, state)
    for name in PLACE:
        setattr(trainer, name, state[name])
    torch.set_rng_state(state["rng"])
    if not fsdp.is_main():
        return
    log = trainer.folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)[: trainer.step]
    os.truncate(log, sum(map(len, lines)))


@contextlib.contextmanager
def stop_on_signals(trainer):
    """Ctrl-C and SIGTERM only set `trainer.stop`, so that a second one cannot cut a save short."""

    def stop(*_):
        trainer.stop = True

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def newest_readable(folder):
    for name in RESUME:
        file = folder / name
        try:
            check_zip(file)
            mmap = fsdp.world()[1] > 1  # each process then reads only its shards
            return torch.load(file, weights_only=True, map_location="cpu", mmap=mmap)
        except FileNotFoundError:  # the machine stopped between two renames
            continue
        except Exception as error:  # a truncated or damaged file can raise anything
            print(f"{file} cannot be read ({error!r:.99}), trying the one before")
    raise ValueError(f"no resume point in {folder} can be read; --overwrite begins the stage again")
