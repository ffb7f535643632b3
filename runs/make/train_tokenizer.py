"""Train the miniature's tokenizer, a byte-level BPE, in seconds.

    python runs/make/train_tokenizer.py    # writes out/llm/tokenizer.json

It learns from captions, questions and answers of the emoji world, but from no sign: each letter of
a word on a sign stays a token of its own.

The shipped tokenizer is older than signs and charts: of its 881 tokens, this gives 872. A language
model belongs to its tokenizer, so pretrain it again (pretrain_llm.py) to use another one.
"""

import json
import pathlib
import sys
from dataclasses import dataclass

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data import world
from data.flags import parse, run
from data.tokenizer import train_bpe


@dataclass
class TokenizerConfig:
    out: str = "out"  # folder; llm/tokenizer.json is written there


def corpus(n=6000):
    """Text for the tokenizer: captions, questions and answers in their template, and names."""
    for i in range(n):
        rng = np.random.default_rng((9, i))
        scene = world.sample_things(rng, "train")
        yield from (world.caption(scene) + "\n", world.short_caption(scene) + "\n")
        several = world.conversation(world.sample_scenes(rng, "train", 3, "things"), rng, 4)
        turns = world.questions(scene, rng, 4) + several
        yield from (f"[INST] {q} [/INST] {a} " for _, q, a in turns)
        yield " ".join(["", world.DESCRIBE, *(o.name for o in scene.objects), scene.background])


def main():
    cfg, _ = parse(TokenizerConfig, description=__doc__)
    folder = pathlib.Path(cfg.out, "llm")
    if weights := sorted(folder.glob("*.safetensors")):
        raise ValueError(f"--out {cfg.out}: {weights[0]} belongs to the tokenizer next to it; name "
                         "another --out, or remove it")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(train_bpe(corpus(), 1024)))


if __name__ == "__main__":
    run(main)
