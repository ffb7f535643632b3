"""Questions about the second and the third picture of one conversation.

    python bench/several_pictures.py            # a minute; needs a finished demo in out/

Each conversation of three new scenes (the split of eval.py) asks three questions about each picture
when it is shown. The same questions are asked in a conversation about this picture alone. Writes
bench/several_pictures.json: the share of right answers by the place of the picture.
"""

import argparse
import pathlib
import sys

import numpy as np
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from bench.speed import conditions
from data import exam, world
from data.tokenizer import Tokenizer
from data.weights import write_json
from engine.conversation import Conversation
from sample import find_model, load_model

KINDS = ("what", "background", "list")  # guessing does not help with these


def scenes(n, seed):
    """[(picture, [(question, answer), ...])] of new scenes that allow all questions."""
    found, i = [], 0
    while len(found) < n:
        rng = np.random.default_rng((seed, 7, i))
        scene, i = world.sample_scene(rng, exam.SPLITS[0]), i + 1
        asked = [world.ASK[kind](scene, rng) for kind in KINDS]
        if all(asked):
            found.append((world.draw(scene), asked))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="", help="a checkpoint; empty: the last stage in out/")
    parser.add_argument("--conversations", type=int, default=60)
    args = parser.parse_args()
    path = pathlib.Path(args.model) if args.model else find_model()
    model, tokenizer = load_model(path, "cpu"), Tokenizer.from_pretrained(path)
    talks = {name: Conversation(model, tokenizer, max_new_tokens=48, several=name == "in_place")
             for name in ("together", "in_place", "alone")}  # fmt: skip
    right = {name: [[], [], []] for name in talks}
    pictures = scenes(3 * args.conversations, seed=5)
    for k, (picture, asked) in enumerate(tqdm(pictures, unit="picture")):
        for name, conversation in talks.items():
            if k % 3 == 0 or name == "alone":
                conversation.reset()
            for q, (question, answer) in enumerate(asked):
                said = conversation.ask(question, [picture] * (q == 0), write=lambda text: None)
                right[name][k % 3].append(said.answer == answer)
    shares = {name: [round(float(np.mean(x)), 4) for x in rows] for name, rows in right.items()}
    for name, row in shares.items():
        print(f"{name:10}" + "".join(f"{share:8.1%}" for share in row))
    about = {"questions": 3 * args.conversations, "kinds": KINDS, "model": str(path)}
    write_json(ROOT / "bench" / "several_pictures.json", conditions() | about | shares)


if __name__ == "__main__":
    main()
