"""Co-upcycling: a dense model becomes a sparse one that gives the same answers (section 3.2).

Experts that start from random weights have to learn everything at once; the paper's CLIP-MoE did
not converge that way. So each expert starts as a copy of the trained MLP it replaces:

    dense          sparse, step 0                        after training
    x -> MLP       x -> router -> MLP, MLP, MLP, MLP     x -> router -> MLP1, MLP2, MLP3, MLP4

With identical experts the router's weights, which sum to 1, cancel out, whatever the router says:
y = sum_k w_k MLP(x) = MLP(x). So step 0 loses nothing, and because the router starts random, each
expert then sees other tokens and grows apart from its copies. No noise is added.

    python upcycle.py SRC DST --parts clip,mlp --experts 4 --top-k 2

`--parts llm` upcycles the language model too (paper, Table 3c), `--scratch clip` leaves the experts
of that part random: the rows of the ablation that show why copies matter.
"""

import argparse
import copy
import pathlib
import shutil
from dataclasses import replace

import torch

from cumo import CuMo
from data.flags import READ, Parser, run
from data.hub import TOKENIZERS, local_folder
from data.weights import load_into
from mlp_moe import Experts, Router

PARTS = ("clip", "mlp", "llm")


def sparse_config(cfg, parts, num_experts, top_k):
    """`cfg` with the given parts sparse. ValueError for unknown or already sparse parts."""
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


def dense_source(name):
    """The dense weight an expert's weight is copied from; None for a router; else the name itself.

    model.vision_tower...layers.0.experts.3.fc1.weight         <- ...layers.0.mlp.fc1.weight
    model.mm_projector.experts.3.0.weight                      <- model.mm_projector.0.weight
    model.layers.0.block_sparse_moe.experts.3.w1.weight        <- ...layers.0.mlp.gate_proj.weight
    """
    if name.endswith(".gate.weight"):
        return None
    if ".experts." not in name:
        return name
    before, after = name.split(".experts.")
    leaf = after.split(".", 1)[1]
    if before.startswith("model.vision_tower."):
        return f"{before}.mlp.{leaf}"
    if before == "model.mm_projector":
        return f"{before}.{leaf}"
    projection = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[leaf.split(".")[0]]
    return f"{before.removesuffix('.block_sparse_moe')}.mlp.{projection}.weight"


def part_of(name):
    """The part that a public weight name belongs to."""
    return {"vision_tower": "clip", "mm_projector": "mlp"}.get(name.split(".")[1], "llm")


@torch.no_grad()
def upcycle(model, parts=("clip", "mlp"), num_experts=4, top_k=2, seed=0, scratch=()):
    """A sparse CuMo from a dense one: every expert a copy of the MLP it replaces, routers fresh.

    `seed` draws the routers (the original leaves them unseeded). Of the parts in `scratch` the
    experts stay random, only the rest is copied. ValueError for unknown or already sparse parts.
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
        for kind in (Router, Experts) if scratch else (Router,):  # routers first: the same for both
            for module in (m for m in sparse.modules() if isinstance(m, kind)):
                module.reset_parameters()
    dense = model.public_state_dict()
    targets = sparse.public_state_dict()
    copied = {n: view for n, view in targets.items()
              if n in dense or (dense_source(n) and part_of(n) not in scratch)}  # fmt: skip
    source = {name: dense[name if name in dense else dense_source(name)] for name in copied}
    load_into(copied, source, source="the dense model")
    return sparse


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    parser.add_argument("src", help="directory of a dense model (stage 2)")
    parser.add_argument("dst", help="directory to write; must not exist yet")
    parser.add_argument("--parts", default="clip,mlp", help="what to upcycle: clip, mlp, llm")
    parser.add_argument("--experts", type=int, default=4, help="experts of each sparse block")
    parser.add_argument("--top-k", type=int, default=2, help="experts that each token uses")
    parser.add_argument("--seed", type=READ["seed"], default=0, help="draws the routers")
    parser.add_argument("--scratch", default="", help="of --parts, those with random experts")
    args = parser.parse_args()
    src, dst = local_folder(args.src), pathlib.Path(args.dst)
    if dst.exists():
        raise ValueError(f"{dst} exists already; name a new directory")
    dense = CuMo.from_pretrained(src)
    parts, scratch = (tuple(filter(None, x.split(","))) for x in (args.parts, args.scratch))
    sparse = upcycle(dense, parts, args.experts, args.top_k, args.seed, scratch)
    try:
        sparse.save_pretrained(dst)
        for name in (*TOKENIZERS, "tokenizer_config.json"):
            if (src / name).is_file():
                shutil.copy(src / name, dst)
    except BaseException:  # a full disk, Ctrl-C
        shutil.rmtree(dst, ignore_errors=True)
        raise
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, sparse))
    print(f"{src}: {before:,} parameters -> {dst}: {after:,}")


if __name__ == "__main__":
    run(main)
