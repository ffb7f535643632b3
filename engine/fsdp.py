"""One model on many GPUs: torchrun --nproc_per_node=N train.py ... with the flags of one process.

Every GPU has a process of its own that runs the same program; PyTorch's FSDP2 (`fully_shard`) makes
them one. It is "data parallel": each process computes other rows of the batch with the same
weights. And it is "fully sharded": each keeps one N-th of every weight, gradient and moment.

    process 0  rows 0, 1  |W0|--.                               .--> gradient of W0 --> AdamW(W0)
    process 1  rows 2, 3  |W1|--+-- block by block: gather all  +--> gradient of W1 --> AdamW(W1)
    process 2  rows 4, 5  |W2|--+   of W, compute, let it go;   +--> gradient of W2 --> AdamW(W2)
    process 3  rows 6, 7  |W3|--'   mean of the gradients, cut  '--> gradient of W3 --> AdamW(W3)

A block's weights are whole only while the block is computed, and the next block's are fetched
meanwhile. So memory falls with N, and what is paid is traffic: three times the weights a step.

The loss is that of one process, to rounding, whatever N is. That needs care: a mean of means is no
mean. Process 0 may have 300 answer tokens to learn and process 1 only 20; a token of process 1 must
not count fifteen times as much. So every mean is taken over all rows: sum * count over processes,
divided by the count over processes (`mean_of_all`). The lm loss counts supervised tokens, CLIP's
and the connector's losses count images, the LLM's count tokens. One is no mean: in the LLM the
whole batch is one sample, and its balance is a product of two means, so these are taken first.
All of it happens once, at the end of `CuMo.forward`; blocks and routers know nothing of processes.

All must enter every exchange in the same order, or they wait for each other for ever. A process
whose rows hold no image, while another's do, sends a blank one through CLIP that no text contains:
its gradients are exactly zero. If no row of the batch has one, no process computes any.

Files are those of one process. `resume.pt` and the finished checkpoint hold whole tensors, gathered
one at a time into the first process's main memory, so a run can go on with another N. A signal to
any process stops all after the same step. torchrun kills what has not ended 30 seconds after a
Ctrl-C; where saving takes longer, give it --shutdown-timeout. runs/multi_node.sbatch shows many
machines.
"""

import atexit
import os
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from cumo import IGNORE, IMAGE_TOKEN, CuMo


def launched(name, alone):
    """A number that torchrun gives to each process it starts."""
    return int(os.environ.get(name, alone))


def start(device):
    """Join the others if torchrun started several processes; only the first one prints."""
    if launched("WORLD_SIZE", 1) == 1:
        return
    gpu, here = torch.device(device).type == "cuda", launched("LOCAL_RANK", 0)
    if gpu and here >= torch.cuda.device_count():
        raise ValueError(f"no GPU is left for process {here} of this machine: "
                         f"--nproc_per_node may be up to {torch.cuda.device_count()}")  # fmt: skip
    if gpu:
        torch.cuda.set_device(here)
    # an hour: the others wait while the first writes a checkpoint
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1))
    atexit.register(dist.destroy_process_group)
    # it warns of blocks that return views, for fear of changes in place; there are none
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    if not first():
        sys.stdout = open(os.devnull, "w")


def world():
    """(number of this process, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def first():
    return world()[0] == 0


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def anyone(flag, device):
    """Whether `flag` is set in any process: all of them get the same answer."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


@contextmanager
def in_turn():
    """What the processes of a machine do one after the other, for want of memory."""
    for turn in range(launched("LOCAL_WORLD_SIZE", 1)):
        if turn == launched("LOCAL_RANK", 0):
            yield
        wait()


# ------------------------------------------------------------------------------ the model


def shard(model, device, bf16):
    """Move `model` to the device, or this process's part of it. Optimizers are made afterwards.

    A model is built whole in main memory, 4 bytes a parameter, by one process of a machine at a
    time (`in_turn`). From there it goes to the GPU block by block, and all but a share is dropped:
    a GPU never holds more than its share and one block.
    """
    if not dist.is_initialized():
        return model.to(device)
    # here and in `like`: a second of imports that a single process does without
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    N, kind = dist.get_world_size(), torch.device(device).type

    def cut(weight):  # experts [E, in, out] are too few for many GPUs: each gets a part of all
        return Shard(1) if weight.dim() == 3 and weight.shape[1] % N == 0 else Shard(0)

    policy = MixedPrecisionPolicy(  # inputs stay as they are: RoPE's angles are float32
        param_dtype=torch.bfloat16 if bf16 and kind == "cuda" else None,
        reduce_dtype=torch.float32, cast_forward_inputs=False,
    )  # fmt: skip
    options = dict(mesh=init_device_mesh(kind, (N,)), mp_policy=policy, shard_placement_fn=cut)
    for module in [*model.vision.layers, *model.llm.model.layers, model.connector, model]:
        fully_shard(module, **options)
    model.reduce_losses = reduce_losses
    return model


def collate(batch, image_tokens):
    """A packed batch -> what the model needs of it, for this process's share of the rows.

    "images" is missing if the batch has none, and empty if only other rows have some.
    ValueError if the rows cannot be shared evenly.
    """
    (rank, N), rows = world(), len(batch["tokens"])
    check_rows(rows)
    mine = slice(rank * rows // N, (rank + 1) * rows // N)
    given = {name: batch[name][mine] for name in ("tokens", "labels", "segments")}
    if len(batch["images"]):
        ends = (batch["tokens"] == IMAGE_TOKEN).sum(1).cumsum(0) // image_tokens
        ends = [0, *ends.tolist()]  # ends[r]: images of the rows before r
        given["images"] = batch["images"][ends[mine.start] : ends[mine.stop]]
    return given


def check_rows(rows):
    _, N = world()
    if rows % N:
        raise ValueError(f"--rows {rows} cannot be shared evenly by {N} processes; use a multiple "
                         f"of {N}, such as --rows {-(-rows // N) * N}")  # fmt: skip


def sum_of_all(x: Tensor) -> Tensor:
    """x summed over the processes. Each goes on to compute the same loss from the sum, and FSDP
    takes the mean of their gradients; so that these add up, each counts N times here."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())


def mean_of_all(x: Tensor, count: Tensor) -> Tensor:
    """x, a mean over `count` things of this process, as a mean over those of all processes."""
    return sum_of_all(x * count) / sum_of_all(count).clamp(min=1)


def reduce_losses(lm_loss, aux, n_images, labels, segments):
    """(lm loss, {part: Aux}) of this process's rows -> of all rows of the batch."""
    images = torch.full((), float(n_images), device=labels.device)  # no wait for the GPU
    tokens = (segments > 0).sum().float()
    counts = {"clip": images, "mlp": images, "llm": tokens}
    whole = dict(aux)
    for part, said in aux.items():
        if said is None:
            continue
        count = counts[part]
        balance, z, load, entropy = (
            mean_of_all(x, count) for x in (said.balance, said.z, said.load, said.entropy)
        )
        if part == "llm":
            prob_LBE, share_LBE = mean_of_all(said.prob, count), mean_of_all(said.share, count)
            balance = prob_LBE.shape[-1] * (prob_LBE * share_LBE).sum(-1).mean()
        whole[part] = said._replace(balance=balance, z=z, load=load, entropy=entropy)
    return mean_of_all(lm_loss, (labels[:, 1:] != IGNORE).sum().float()), whole


# ------------------------------------------------------------------------------ files


def full(x):
    """A sharded tensor, whole; anything else as it is. All processes must ask for it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gather(state):
    """Nested dicts of sharded tensors -> of whole ones in main memory, in the first process; what
    the others get is of no use."""
    if isinstance(state, dict):
        return {name: gather(value) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    whole = state.full_tensor()
    return whole.cpu() if first() else None


def like(whole, sharded):
    """A whole tensor, cut as its counterpart is: each process keeps its part of its own copy."""
    if not hasattr(sharded, "full_tensor") or whole.shape != sharded.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    where = sharded.device_mesh, sharded.placements
    return distribute_tensor(whole.to(sharded.device), *where, src_data_rank=None)


def load(model, optimizer, state):
    """Fill both from the whole tensors of a resume.pt."""
    now = model.state_dict()
    model.load_state_dict({name: like(whole, now[name]) for name, whole in state["model"].items()})
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        i: {name: like(x, weights[i]) for name, x in entry.items()}
        for i, entry in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def whole_model(model):
    """The model itself; of a sharded one a whole copy, in the first process's main memory."""
    if not dist.is_initialized():
        return model
    state = gather(model.state_dict())
    if not first():
        return None
    with torch.device("meta"):
        copy = CuMo(model.cfg)
    copy.load_state_dict(state, assign=True)
    return copy
