"""`eval.py --data`: how well a model answers your own held-out records (engine/held_out.py)."""

import sys
from functools import partial
from pathlib import Path

import torch

from data.llava import LlavaData
from data.tokenizer import Tokenizer
from data.weights import write_json
from engine import held_out
from engine.rate import has_fast_bf16
from extras import plots


def evaluate(cfg, limit, open_model):
    """Loss and exact answers of the first `limit` records (0: all), and the experts' load.

    cfg: an eval.EvalConfig; open_model(cfg) -> (folder, model, ask), as in eval.py.
    """
    records = LlavaData(cfg.data, cfg.image_folder, limit)
    path, model, _ = open_model(cfg)
    cast = partial(torch.autocast, model.device.type, torch.bfloat16, has_fast_bf16(model.device))
    load = plots.own_load(model, records)
    if cfg.experts:
        plots.draw_load(load, cfg.experts)
    found = held_out.judge(model, Tokenizer.from_pretrained(path), records, cfg.batch, cast)
    print(held_out.report(cfg.data, found))
    rows = [one._asdict() for one in found.pop("answers")]
    about = {"model": str(path), "data": cfg.data, "expert_load": load} | found
    write_json(Path(cfg.out, "own_data.json"), about | {"answers": rows})
    print(f"wrote {Path(cfg.out, 'own_data.json')}", file=sys.stderr)
    if load and not cfg.experts:
        plots.draw_load(load, Path(cfg.out, "own_experts.png"))
