"""Where the time of a training goes: three steps under PyTorch's profiler.

    python train.py --stage 3 --profile

The first steps of a stage compile, so steps 5 to 7 are recorded. The screen shows the operators
that took the most time. The stage's folder gets

    profile.txt        all operators: times, calls, shapes of the products
    profile.json.gz    the time line of every operator and kernel; https://ui.perfetto.dev draws it

Then training goes on: the weights are those of a training without --profile. Recording slows these
three steps down, since every operator is written down; so read shares from it, not seconds.
"""

import contextlib

import torch
from torch.autograd import DeviceType
from tqdm import tqdm

from engine import fsdp

BEFORE, RECORDED = 4, 3  # steps
SHOWN, WRITTEN = 10, 200  # lines of the tables


def table(events, gpu):
    """The operators, or on a GPU the kernels, that took the most time of their own: a line each."""
    own = "self_device_time_total" if gpu else "self_cpu_time_total"
    if gpu:  # an operator's row repeats the time of its kernels
        on_gpu = (event for event in events if event.device_type == DeviceType.CUDA)
        events = [event for event in on_gpu if not event.is_user_annotation]
    total = sum(getattr(event, own) for event in events) or 1
    rows = [f"{'ms a step':>10} {'share':>6} {'calls':>7}  {'kernel' if gpu else 'operator'}"]
    for event in sorted(events, key=lambda event: -getattr(event, own))[:SHOWN]:
        time = getattr(event, own)
        rows.append(f"{time / 1e3 / RECORDED:10.2f} {time / total:6.1%} "
                    f"{event.count / RECORDED:7.0f}  {event.key:.70}")  # fmt: skip
    return "\n".join(rows)


def write(profiler, folder, gpu):
    """profile.txt and profile.json.gz in a stage's folder, and a short table on the screen."""
    by_shape = profiler.key_averages(group_by_input_shape=True)
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    text = by_shape.table(sort_by=order, row_limit=WRITTEN, max_name_column_width=80)
    (folder / "profile.txt").write_text(text)
    profiler.export_chrome_trace(str(folder / "profile.json.gz"))
    tqdm.write(f"profile of steps {BEFORE + 1} to {BEFORE + RECORDED} -> {folder}/profile.txt, "
               f"profile.json.gz\n{table(profiler.key_averages(), gpu)}")  # fmt: skip


@contextlib.contextmanager
def record(trainer):
    """A function to call after each step of a Trainer, which records some if --profile is given."""
    if not (trainer.cfg.profile and fsdp.is_main()):
        yield lambda: None
        return
    gpu, steps = torch.device(trainer.cfg.device).type == "cuda", []
    kinds = torch.profiler.ProfilerActivity
    activities = [kinds.CPU, kinds.CUDA] if gpu else [kinds.CPU]
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)

    def step():
        steps.append(1)
        if len(steps) == BEFORE:
            profiler.start()
        if len(steps) == BEFORE + RECORDED:
            profiler.stop()
            write(profiler, trainer.folder, gpu)

    try:
        yield step
    finally:
        if len(steps) < BEFORE + RECORDED:
            if len(steps) >= BEFORE:
                profiler.stop()
            tqdm.write(f"no profile: it needs {BEFORE + RECORDED} steps, and there were only "
                       f"{len(steps)}; give more --samples")  # fmt: skip
