"""A chat of 100,000 tokens with a sliding-window model: do time and memory a token grow?

    python bench/long_chat.py           # minutes; writes bench/long_chat.json and .png
    python bench/long_chat.py --draw    # only the plot, from bench/long_chat.json

The miniature (out/stage3) gets a sliding window, and one question after another in one
conversation, each about a new picture. Its cache is a ring of one window, so a token at the end
must take the time and memory of one at the beginning. Its answers are not scored: it was trained on
one picture at a time.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from bench.speed import conditions
from data import world
from data.flags import run
from data.tokenizer import Tokenizer
from engine.conversation import Conversation
from extras.plots import COLORS, pyplot, save_figure
from sample import load_model

MINIATURE = str(ROOT / "out" / "stage3")
TYPES = world.KINDS["things"]  # signs and charts are left out, as in earlier results


def resident_mb():
    """Resident memory of this process, MB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def long_conversation(model, tokenizer, tokens, points=50):
    """-> [{tokens so far, ms to the first token, ms a token after it, MB}], `points` rows."""
    talk = Conversation(model, tokenizer, max_new_tokens=48)
    rows, seen, turn = [], 0, 0
    with tqdm(total=tokens, unit="token", desc="chat") as bar:
        while seen < tokens:
            answers = []
            while sum(a.tokens + a.prompt_tokens for a in answers) < tokens / points:
                rng = np.random.default_rng((5, turn))
                scene, kind = world.sample_scene(rng, "new", "things"), TYPES[turn % len(TYPES)]
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
                         "ms_to_first_token": first * 1e3, "mb": resident_mb(),
                         "turns": turn})  # fmt: skip
    assert len(talk.cache.keys[0, 0, 0]) == model.llm.cfg.sliding_window
    return rows


def draw_growth(result, file):
    """Draw each measure along the conversation, and the mean of its first half as a line."""
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
    save_figure(figure, file)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default=MINIATURE)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--draw", action="store_true", help="only draw the plot again")
    args = parser.parse_args()
    file = ROOT / "bench" / "long_chat.json"
    if args.draw:
        return draw_growth(json.loads(file.read_text()), file.with_suffix(".png"))
    model = load_model(args.model, "cpu")
    model.llm.cfg.sliding_window = args.window
    rows = long_conversation(model, Tokenizer.from_pretrained(args.model), args.tokens)
    name = "the miniature" if args.model == MINIATURE else pathlib.Path(args.model).name
    if args == parser.parse_args([]):  # only results of the defaults are published
        result = conditions() | {"command": "python bench/long_chat.py", "window": args.window}
        # float32 is `load_model`'s default
        result |= {"model": name, "precision": "torch.float32", "rows": rows}
        file.write_text(json.dumps(result, indent=1) + "\n")
        draw_growth(result, file.with_suffix(".png"))
    half = len(rows) // 2
    for name in ("ms_a_token", "ms_to_first_token", "mb"):
        first, second = (np.mean([r[name] for r in part]) for part in (rows[:half], rows[half:]))
        print(f"{name}: {first:.3g} in the first half, {second:.3g} in the second")


if __name__ == "__main__":
    run(main)
