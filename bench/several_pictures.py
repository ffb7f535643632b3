"""Questions about the first, second and third picture of one conversation.

    python bench/several_pictures.py            # two minutes; needs a finished demo in out/

Each conversation has three new scenes of things (the split of eval.py) and the same nine plain
questions:

    alone       each picture has a conversation of its own
    in turn     a picture is shown with the first question about it; then comes the next picture
    by number   all three are shown at once, with one question about one of them:
                "In the second picture, what is at the top left?"
    all asked   the same nine questions in one conversation
    which       all three are shown at once: "Which picture has the cat?"

Writes bench/several_pictures.json: the share of right answers by the place of the picture.
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
from data.flags import run
from data.tokenizer import Tokenizer
from data.weights import write_json
from engine.conversation import Conversation
from sample import find_model, load_model

TYPES = ("what", "background", "list")  # guessing does not help with these
WAYS = ("alone", "in turn", "by number", "all asked")


def scenes(n, seed):
    """[(scene, picture, [(type, question, answer)])] of new things that allow all questions."""
    found, i = [], 0
    while len(found) < n:
        rng = np.random.default_rng((seed, 7, i))
        scene, i = world.sample_scene(rng, exam.SPLITS[0], "things"), i + 1
        asked = [(of_type, world.ASK[of_type](scene, rng)) for of_type in TYPES]
        if all(pair for _, pair in asked):
            asked = [(of_type, *pair) for of_type, pair in asked]
            found.append((scene, world.draw(scene), asked))
    return found


def talk(ask, three, rng):
    """Ask about three pictures -> {name: [right answers of a picture] * 3}, and those to "which".
    `ask(question, pictures, first)` -> the answer; `first` begins a conversation."""
    right = {name: [[], [], []] for name in WAYS} | {"which": []}
    pictures = [picture for _, picture, _ in three]
    for name in WAYS:
        for k, (_, picture, asked) in enumerate(three):
            for q, (of_type, question, answer) in enumerate(asked):
                first = name == "by number" or q == 0 and (k == 0 or name == "alone")
                shown = [picture] * (q == 0)
                if name in ("by number", "all asked"):
                    question = world.of_picture(k, of_type, question, rng)
                    shown = pictures * first
                right[name][k].append(ask(question, shown, first) == answer)
    pair = world.ask_which([scene for scene, _, _ in three], rng)
    right["which"] += [ask(pair[0], pictures, True) == pair[1]] if pair else []
    return right


def asked_of(path, three):
    """The talks of one model about groups of three scenes -> [result of `talk`]."""
    model, tokenizer = load_model(path, "cpu"), Tokenizer.from_pretrained(path)
    conversation = Conversation(model, tokenizer, max_new_tokens=48)

    def ask(question, pictures, first):
        if first:
            conversation.reset()
        return conversation.ask(question, pictures, write=lambda text: None).answer

    rng, starts = np.random.default_rng(8), tqdm(range(0, len(three), 3), unit="talk")
    return [talk(ask, three[k : k + 3], rng) for k in starts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=[], help="checkpoints, whose mean is taken; "
                        "not given: the last finished stage in out/")  # fmt: skip
    parser.add_argument("--conversations", type=int, default=60)
    args = parser.parse_args()
    paths, three = args.model or [find_model()], scenes(3 * args.conversations, seed=5)
    talks = [one for path in paths for one in asked_of(pathlib.Path(path), three)]
    shares = {name: [round(float(np.mean(sum((one[name][k] for one in talks), []))), 4)
                     for k in range(3)] for name in WAYS}  # fmt: skip
    shares["which"] = round(float(np.mean(sum((one["which"] for one in talks), []))), 4)
    for name, row in shares.items():
        print(f"{name:10}", row)
    about = {"models": len(paths), "questions": len(TYPES) * args.conversations, "types": TYPES}
    write_json(ROOT / "bench" / "several_pictures.json", conditions() | about | shares)


if __name__ == "__main__":
    run(main)
