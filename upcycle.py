"""Co-upcycling: a dense model becomes a sparse one that gives the same answers (section 3.2).

Experts that start from random weights have to learn everything at once; the paper's CLIP-MoE did
not converge that way. So each expert starts as a copy of the trained MLP that it replaces:

    dense          sparse, step 0                        after training
    x -> MLP       x -> router -> MLP, MLP, MLP, MLP     x -> router -> MLP1, MLP2, MLP3, MLP4

With identical experts the weights w_k that mix them, which sum to 1, cancel out:
y = sum_k w_k MLP(x) = MLP(x). So step 0 loses nothing. The router starts random, so the experts
then see different tokens and grow apart. No noise is added.

    python upcycle.py SRC DST --parts clip,mlp --experts 4 --top-k 2

`--parts clip,mlp,llm` upcycles the language model too (Table 3c). `--scratch clip` leaves the
experts of that part random, for the ablation that shows why copies matter (docs/RESULTS.md).
"""

import data  # noqa: F401  isort: skip  before torch: sets how OpenMP waits
import argparse
import copy
import pathlib
import shutil
from dataclasses import replace

import torch

from cumo import CuMo
from data.flags import READ, Parser, run
from data.hub import NEAR_TOKENIZERS, TOKENIZERS, local_folder
from mlp_moe import Experts, Router

PARTS = ("clip", "mlp", "llm")


def sparse_config(cfg, parts, num_experts, top_k):
    """`cfg` with `parts` sparse. ValueError for unknown or already sparse parts."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"parts {','.join(parts)!r}: choose from {', '.join(PARTS)}")
    experts_now = {"clip": cfg.vision.num_experts, "mlp": cfg.mlp_experts,
                   "llm": cfg.llm.num_experts}  # fmt: skip
    sparse = [part for part in parts if experts_now[part]]
    if sparse:
        raise ValueError(
            f"{', '.join(sparse)} is sparse already; upcycle a dense (stage 2) model, or "
            "train this one as it is: train.py --upcycle none"
        )
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}: a sparse block needs at least one expert")
    cfg = copy.deepcopy(cfg)
    if "clip" in parts:
        cfg.vision = replace(cfg.vision, num_experts=num_experts, top_k=top_k)
    if "mlp" in parts:
        cfg.mlp_experts, cfg.mlp_top_k = num_experts, top_k
    if "llm" in parts:
        cfg.llm = replace(cfg.llm, num_experts=num_experts, top_k=top_k)
    return cfg


def copy_to_experts(experts, fc1, fc2, fc3=None):
    """Make each of the E experts a copy of one MLP: [D, F] is broadcast over [E, D, F]."""
    experts.w1.copy_(fc1.weight.T)
    experts.w2.copy_(fc2.weight.T)
    if fc3 is None:
        experts.b1.copy_(fc1.bias)
        experts.b2.copy_(fc2.bias)
    else:  # SwiGLU has a third matrix and no bias: (silu(x w1) * (x w3)) w2
        experts.w3.copy_(fc3.weight.T)


@torch.no_grad()
def upcycle(model, parts=("clip", "mlp"), num_experts=4, top_k=2, seed=0, scratch=()):
    """A sparse CuMo from a dense one: every expert a copy of the MLP it replaces, routers fresh.

    `seed` fixes the routers' random weights (the original is unseeded). The experts of the parts in
    `scratch` are random, too.
    ValueError for unknown or already sparse parts.
    """
    if not set(scratch) <= set(parts):
        raise ValueError(f"scratch {','.join(scratch)!r}: choose from {', '.join(parts)}")
    cfg = sparse_config(model.cfg, parts, num_experts, top_k)
    weight = next(model.parameters())
    with torch.device("meta"):
        sparse = CuMo(cfg).to(weight.dtype)
    sparse = sparse.to_empty(device=weight.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # All routers before any experts, so that `scratch` does not change the routers.
        for kind in (Router, Experts) if scratch else (Router,):
            for module in (m for m in sparse.modules() if isinstance(m, kind)):
                module.reset_parameters()

    dense = model.state_dict()  # 1) what stays: attention, norms, embeddings, other parts
    for name, tensor in sparse.state_dict().items():
        if name in dense:
            tensor.copy_(dense[name])
    copied = set(parts) - set(scratch)  # 2) what is upcycled
    if "clip" in copied:
        for new, old in zip(sparse.vision.layers, model.vision.layers):
            copy_to_experts(new.moe.experts, old.mlp.fc1, old.mlp.fc2)
    if "mlp" in copied:
        fc1, _, fc2 = model.connector.mlp
        copy_to_experts(sparse.connector.moe.experts, fc1, fc2)
    if "llm" in copied:
        for new, old in zip(sparse.llm.model.layers, model.llm.model.layers):
            experts, mlp = new.block_sparse_moe.experts, old.mlp
            copy_to_experts(experts, mlp.gate_proj, mlp.down_proj, mlp.up_proj)
    return sparse


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("src", help="directory of a dense model (stage 2)")
    parser.add_argument("dst", help="directory to write; must not exist yet")
    parser.add_argument("--parts", default="clip,mlp", help="what to upcycle: clip, mlp, llm")
    parser.add_argument("--experts", type=int, default=4, help="experts of each sparse block")
    parser.add_argument("--top-k", type=int, default=2, help="experts that each token uses")
    parser.add_argument(
        "--seed", type=READ["seed"], default=0, help="of the routers and of random experts"
    )
    parser.add_argument("--scratch", default="", help="those of --parts whose experts start random")
    args = parser.parse_args()
    src, dst = local_folder(args.src), pathlib.Path(args.dst)
    if src.is_file():
        raise ValueError(f"{src} is a file; name its directory, {src.parent}")
    exists = ValueError(f"{dst} exists already; name a new directory")
    if dst.exists():
        raise exists
    dense = CuMo.from_pretrained(src)
    parts, scratch = (tuple(filter(None, x.split(","))) for x in (args.parts, args.scratch))
    sparse = upcycle(dense, parts, args.experts, args.top_k, args.seed, scratch)
    try:
        dst.mkdir(parents=True)
    except FileExistsError:  # by now
        raise exists from None
    try:
        sparse.save_pretrained(dst)
        for name in (*TOKENIZERS, *NEAR_TOKENIZERS):
            if (src / name).is_file():
                shutil.copy(src / name, dst)
    except BaseException:  # a full disk or Ctrl-C: leave nothing half-written
        shutil.rmtree(dst, ignore_errors=True)
        raise
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, sparse))
    print(f"{src}: {before:,} parameters -> {dst}: {after:,}")


if __name__ == "__main__":
    run(main)
