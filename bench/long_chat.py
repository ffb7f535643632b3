"""A chat of 100,000 tokens with a windowed model: does it get slower, or larger?

    python bench/long_chat.py           # minutes; writes bench/long_chat.json and .png
    python bench/long_chat.py --draw    # only the picture again, of what was measured before

The miniature (out/stage3) is given a sliding window and shown picture after picture, with a
question each, in one conversation. Its cache is a ring of one window, so a token at the end must
take the time and memory of one at the beginning. (It was trained on one picture at a time, so the
answers are no test of its sight.)
"""

import argparse
import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
MINIATURE = str(ROOT / "out" / "stage3")

from tqdm import tqdm  # noqa: E402

from bench.speed import machine  # noqa: E402
from data import world  # noqa: E402
from data.flags import run  # noqa: E402
from data.tokenizer import Tokenizer  # noqa: E402
from engine.conversation import Conversation  # noqa: E402
from extras.plots import COLORS, pyplot, save  # noqa: E402
from sample import load  # noqa: E402


def resident():
    """Megabytes of memory that this process holds now."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def chat(model, tokenizer, tokens, points=50):
    """-> [{tokens so far, milliseconds to the first token and from then on a token, MB}]."""
    talk = Conversation(model, tokenizer, max_new_tokens=48, temperature=0.0)
    rows, seen, turn = [], 0, 0
    with tqdm(total=tokens, unit="token", desc="chat") as bar:
        while seen < tokens:
            answers = []
            while sum(a.tokens + a.prompt_tokens for a in answers) < tokens / points:
                rng = np.random.default_rng((5, turn))
                scene, kind = world.sample_scene(rng, "seen"), world.QUESTION_TYPES[turn % 8]
                turn += 1
                pair = world.ASK[kind](scene, rng)
                if not pair:
                    continue
                answers.append(talk.ask(pair[0], [world.draw(scene)], write=lambda text: None))
            read = sum(a.tokens + a.prompt_tokens for a in answers)
            made = sum(a.tokens - 1 for a in answers)
            seconds = sum(a.seconds - a.first_token_seconds for a in answers)
            first = sum(a.first_token_seconds for a in answers) / len(answers)
            seen += read
            bar.update(read)
            rows.append({"tokens": seen, "ms_a_token": seconds / made * 1e3,
                         "ms_to_first_token": first * 1e3, "mb": resident(),
                         "turns": turn})  # fmt: skip
    assert len(talk.cache.keys[0, 0, 0]) == model.llm.cfg.sliding_window
    return rows


def draw(result, file):
    """Each measure along the conversation, and a line through its first half's mean."""
    plt, rows = pyplot(), result["rows"]
    if not plt:
        return
    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    x = [row["tokens"] / 1e3 for row in rows]
    for axis, (name, title) in zip(axes, (
        ("ms_a_token", "ms a token of an answer"), ("mb", "memory of the process, MB"),
        ("ms_to_first_token", "ms until the first token")), strict=True):  # fmt: skip
        values = [row[name] for row in rows]
        axis.plot(x, values, color=COLORS[0])
        axis.axhline(np.mean(values[: len(rows) // 2]), color="black", linestyle=":",
                     label="mean of the first half")  # fmt: skip
        axis.set(xlabel="thousand tokens said and seen", ylim=(0, 1.3 * max(values)))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.suptitle(
        f"One conversation with {result['model']}, which sees the last {result['window']} tokens\n"
        f"{result['machine']}, {result['threads']} threads, {result['precision'][6:]}",
        fontsize=10,
    )
    save(figure, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=MINIATURE)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured before")
    args = parser.parse_args()
    file = ROOT / "bench" / "long_chat.json"
    if args.draw:
        return draw(json.loads(file.read_text()), file.with_suffix(".png"))
    model = load(args.model, "cpu")
    model.llm.cfg.sliding_window = args.window
    rows = chat(model, Tokenizer.from_pretrained(args.model), args.tokens)
    name = "the miniature" if args.model == MINIATURE else pathlib.Path(args.model).name
    if args == parser.parse_args([]):  # the published ones; others are printed only
        result = machine() | {"command": "python bench/long_chat.py", "window": args.window}
        result |= {"model": name, "precision": "torch.float32", "rows": rows}  # as `load` gives it
        file.write_text(json.dumps(result, indent=1) + "\n")
        draw(result, file.with_suffix(".png"))
    half = len(rows) // 2
    for name in ("ms_a_token", "ms_to_first_token", "mb"):
        first, last = (
            sum(r[name] for r in part) / len(part) for part in (rows[:half], rows[half:])
        )
        print(f"{name}: {first:.3g} in the first half, {last:.3g} in the second")


if __name__ == "__main__":
    run(main)
