"""One model on N GPUs: torchrun --nproc_per_node=N train.py ..., with --rows a multiple of N.

Each GPU has a process, a rank, that runs the same program; PyTorch's FSDP2 (`fully_shard`) connects
them. Training is data parallel: ranks compute different rows of a batch with the same weights. And
it is fully sharded: a rank stores only one N-th of every weight, gradient and moment.

    rank 0  rows 0, 1  |W0|--.                                .--> gradient of W0 --> AdamW(W0)
    rank 1  rows 2, 3  |W1|--+-- block by block: all-gather   +--> gradient of W1 --> AdamW(W1)
    rank 2  rows 4, 5  |W2|--+   W, compute, free W; average  +--> gradient of W2 --> AdamW(W2)
    rank 3  rows 6, 7  |W3|--'   and shard the gradients      '--> gradient of W3 --> AdamW(W3)

Memory falls with N, at the price of sending three times the weights a step.

The loss equals that of one process, up to rounding. A mean of the ranks' means would be wrong: with
300 supervised tokens on rank 0 and 20 on rank 1, a token of rank 1 would count fifteen times as
much. `mean_over_ranks` therefore divides the sum over all ranks by the count over all ranks. This
happens once, at the end of `CuMo.forward`; blocks and routers do not know about ranks.

All ranks must call the same collective operations in the same order; otherwise they wait without
end. So if any rank has an image, a rank without one sends a blank image through CLIP. No text uses
its features, so its gradients are exactly zero.

Checkpoints hold whole tensors, gathered one by one into the main memory of rank 0, so a run can
continue with another N. A signal to one rank stops all of them after the same step.
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

from cumo import IGNORE, CuMo


def from_torchrun(name, default):
    """A number that torchrun sets in the environment of every process that it starts."""
    return int(os.environ.get(name, default))


def launcher():
    """The words before train.py in the command that started this process."""
    n, here = from_torchrun("WORLD_SIZE", 1), from_torchrun("LOCAL_WORLD_SIZE", 1)
    several = f"--nnodes={n // here} ... " if n > here else ""
    return f"torchrun {several}--nproc_per_node={here}" if n > 1 else "python"


def start(device):
    """Join the other ranks if torchrun started several processes; only rank 0 prints."""
    if from_torchrun("WORLD_SIZE", 1) == 1:
        return
    gpu, here = torch.device(device).type == "cuda", from_torchrun("LOCAL_RANK", 0)
    if gpu and here >= torch.cuda.device_count():
        raise ValueError(f"no GPU is left for process {here} of this machine: "
                         f"--nproc_per_node may be up to {torch.cuda.device_count()}")  # fmt: skip
    if gpu:
        torch.cuda.set_device(here)
    # an hour, because the other ranks wait while rank 0 writes a checkpoint
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1))
    atexit.register(dist.destroy_process_group)
    # FSDP2 warns of outputs that are views and are changed in place; we change none in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    if not is_main():
        sys.stdout = open(os.devnull, "w")


def world():
    """(rank of this process, number of ranks)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main():
    """Whether this is rank 0, which prints and writes the files."""
    return world()[0] == 0


def barrier():
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(flag, device):
    """Whether `flag` is set on any rank; all ranks get the same answer."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


@contextmanager
def in_turn():
    """Run the block on one rank of a machine after another, because it takes much main memory."""
    for turn in range(from_torchrun("LOCAL_WORLD_SIZE", 1)):
        if turn == from_torchrun("LOCAL_RANK", 0):
            yield
        barrier()


# ------------------------------------------------------------------------------ the model


def shard(model, device, bf16):
    """Move the model to the device, or only this rank's shard. Make the optimizer afterwards.

    Each rank builds the whole model in main memory, 4 bytes a parameter, one rank of a machine at a
    time (`in_turn`). Blocks then go to the GPU one by one, and each is cut down to a shard there: a
    GPU never holds more than its shards and one block.
    """
    if not dist.is_initialized():
        return model.to(device)
    # imported here and in `shard_like`: one second that a single process does not need to spend
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    (_, n), kind = world(), torch.device(device).type

    def axis(weight):  # experts [E, in, out]: E is too small to be cut into many shards
        return Shard(1) if weight.dim() == 3 and weight.shape[1] % n == 0 else Shard(0)

    policy = MixedPrecisionPolicy(  # no cast of inputs: RoPE's angles stay float32
        param_dtype=torch.bfloat16 if bf16 and kind == "cuda" else None,
        reduce_dtype=torch.float32, cast_forward_inputs=False,
    )  # fmt: skip
    options = dict(mesh=init_device_mesh(kind, (n,)), mp_policy=policy, shard_placement_fn=axis)
    for module in [*model.vision.layers, *model.llm.model.layers, model.connector, model]:
        fully_shard(module, **options)
    model.reduce_losses = reduce_losses
    return model


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of all ranks' x. Every rank computes the same loss from it and FSDP averages their
    gradients, so the gradient of x is multiplied by the number of ranks here."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (x - x.detach())


def mean_over_ranks(x: Tensor, count: Tensor) -> Tensor:
    """x, this rank's mean over `count` tokens or images -> the mean over those of all ranks."""
    return sum_over_ranks(x * count) / sum_over_ranks(count).clamp(min=1)


def reduce_losses(lm_loss, aux, n_images, labels, segments):
    """(lm loss, {part: Aux}) of this rank's rows -> of the whole batch.

    The lm loss is a mean over supervised tokens, the losses of CLIP and the connector are means
    over images, and those of the LLM are means over tokens. The LLM's balance loss is a product of
    two means over the batch, so both are reduced before they are multiplied.
    """
    images = torch.full((), float(n_images), device=labels.device)  # no wait for the GPU
    tokens = (segments > 0).sum().float()
    counts = {"clip": images, "mlp": images, "llm": tokens}
    reduced = dict(aux)
    for part, ours in aux.items():
        if ours is None:
            continue
        count = counts[part]
        balance, z, load, entropy = (
            mean_over_ranks(x, count) for x in (ours.balance, ours.z, ours.load, ours.entropy)
        )
        if part == "llm":
            prob_LBE, share_LBE = (mean_over_ranks(x, count) for x in (ours.prob, ours.share))
            balance = prob_LBE.shape[-1] * (prob_LBE * share_LBE).sum(-1).mean()
        reduced[part] = ours._replace(balance=balance, z=z, load=load, entropy=entropy)
    return mean_over_ranks(lm_loss, (labels[:, 1:] != IGNORE).sum().float()), reduced


# ------------------------------------------------------------------------------ files


def full(x):
    """A sharded tensor -> the whole one; anything else unchanged. All ranks must call this."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gather(state):
    """Nested dicts of sharded tensors -> of whole ones in the main memory of rank 0. Other ranks
    get None for each of these tensors."""
    if isinstance(state, dict):
        return {name: gather(value) for name, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    whole = state.full_tensor()
    return whole.cpu() if is_main() else None


def shard_like(whole, sharded):
    """Cut a whole tensor as `sharded` is cut: each rank keeps its shard of its own copy."""
    if not hasattr(sharded, "full_tensor") or whole.shape != sharded.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    where = sharded.device_mesh, sharded.placements
    return distribute_tensor(whole.to(sharded.device), *where, src_data_rank=None)


def load_shards(model, optimizer, state):
    """Fill model and optimizer with the whole tensors of a resume.pt."""
    now, weights = model.state_dict(), state["model"].items()
    model.load_state_dict({name: shard_like(whole, now[name]) for name, whole in weights})
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        i: {name: shard_like(x, weights[i]) for name, x in entry.items()}
        for i, entry in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})


def gather_model(model):
    """A whole copy of a sharded model in the main memory of rank 0, None on other ranks. A model
    that is not sharded is returned unchanged."""
    if not dist.is_initialized():
        return model
    state = gather(model.state_dict())
    if not is_main():
        return None
    with torch.device("meta"):
        copy = CuMo(model.cfg)
    copy.load_state_dict(state, assign=True)
    return copy
