"""SmolLM2 with the miniature CLIP: is training the connector enough to name pictures?

    python train.py --preset smol-mini --stage 1 --samples 600 --out out/smol_mini
    python bench/smol_mini.py out/smol_mini/stage1 --captions 100

Writes bench/smol_mini.json: the training loss by tenths. With `--captions N` also the loss and the
share of exactly right greedy captions on N held-out pictures of single objects: before the stage,
after it, and after it with blank pictures.
"""

import argparse
import json
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
import train
from cumo import CuMo
from data.chat import IGNORE
from data.llava import encode
from data.tokenizer import Tokenizer
from data.world import World

BATCH = 20


def pad_right(rows, fill):
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


@torch.no_grad()
def caption_scores(model, tokenizer, samples, blank=False):
    """-> {loss: mean over captions, exact: share of right captions, said: the first five}."""
    model.eval()
    size, loss, captions = model.cfg.vision.image_size, 0.0, []
    for k in range(0, len(samples), BATCH):
        some = samples[k : k + BATCH]
        coded = [encode(s, tokenizer, "plain", model.image_tokens, size) for s in some]
        images = torch.stack([torch.from_numpy(image) for _, _, (image,), _ in coded])
        images = torch.zeros_like(images) if blank else images
        ids, labels = pad_right([c[0] for c in coded], 0), pad_right([c[1] for c in coded], IGNORE)
        segments = pad_right([[1] * len(c[0]) for c in coded], 0)
        logits = model(ids, images, segments=segments).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none"
        )
        loss += (losses.sum(1) / (labels != IGNORE).sum(1)).sum().item()
        prompts = ids[:, : 1 + model.image_tokens]
        answers = model.generate(prompts, images, max_new_tokens=12).tolist()
        captions += [tokenizer.decode(answer).split("\n")[0] for answer in answers]
    right = [s["conversations"][1]["value"] == text for s, text in zip(samples, captions)]
    return {"loss": round(loss / len(samples), 3), "exact": sum(right) / len(right),
            "said": captions[:5]}  # fmt: skip


def curve(folder):
    """[[samples used, mean loss]] of each tenth of the training's steps."""
    metrics = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    tenth = -(-len(metrics) // 10)
    parts = [metrics[k : k + tenth] for k in range(0, len(metrics), tenth)]
    return [[p[-1]["samples"], round(sum(m["lm_loss"] for m in p) / len(p), 3)] for p in parts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=pathlib.Path, help="a finished stage 1 of smol-mini")
    parser.add_argument("--captions", type=int, default=0, help="pictures to caption [0]")
    args = parser.parse_args()
    state = json.loads((args.folder / "train.json").read_text())
    cfg = train.TrainConfig(**state["config"])
    content = {
        "command": f"python train.py --preset smol-mini --stage 1 --samples {cfg.samples}",
        "seconds": state["seconds"],
        "peak_memory_gb": state.get("peak_memory_gb"),
        "training_loss_by_samples": curve(args.folder),
    }
    if args.captions:
        tokenizer, world = Tokenizer.from_pretrained(args.folder), World("new", "name", 10_000)
        samples = [world[i] for i in range(args.captions)]
        torch.manual_seed(cfg.seed)  # the connector starts as in the training
        model = train.build(cfg)[0]
        rows = {"before": caption_scores(model, tokenizer, samples)}
        model = CuMo.from_pretrained(args.folder)
        rows["after"] = caption_scores(model, tokenizer, samples)
        rows["after, blank pictures"] = caption_scores(model, tokenizer, samples, blank=True)
        wanted = [s["conversations"][1]["value"] for s in samples[:5]]
        content |= {"captions": args.captions, "wanted": wanted} | rows
    (ROOT / "bench" / "smol_mini.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
