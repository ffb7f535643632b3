"""Write the tables of README.md and docs/RESULTS.md from bench/, and line counts from the files.

    python runs/results.py                  # rewrite both pages
    python runs/results.py --collect out0 out1 out2   # first take finished demos into bench/
    python runs/results.py --draw out       # first draw the pictures again, with this demo's model

A block of a page stands between `<!-- name -->` and `<!-- /name -->`; tests/test_readme.py checks
that every block is what this script writes.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train
from cumo import CuMo
from data.exam import SPLITS
from data.images import open_image
from data.tokenizer import Tokenizer
from data.world import DESCRIBE
from engine import memory
from eval import answer_batch
from extras import plots
from extras.plots import draw_answers, draw_losses, read_metrics
from runs import tables, verdicts
from runs.pictures import (
    draw_ablations,
    draw_architecture,
    draw_content,
    draw_ratios,
    shown,
    variant,
)
from runs.tables import table

ASKED = {
    "what": "What is at the top left?",
    "existence": "Is there a cat?",
    "count": "How many things are there?",
    "where": "Where is the cat?",
    "kind": "Which fruit do you see?",
    "background": "What color is the background?",
    "side": "Is the cat left or right of the dog?",
    "list": "List all objects.",
    "read": "What does the sign say?",
    "tallest": "Which bar is the tallest?",
    "height": "How high is the red bar?",
    "bars": "How many bars are there?",
    "compare": "Is the red bar higher than the blue bar?",
    "things": "**all about things**",
    "words": "**all about words**",
    "charts": "**all about charts**",
    "all": "**all types**",
}
PICTURES = ("cat.jpg", "dog.jpg", "owl.jpg", "open.jpg", "price.jpg", "chart.jpg")
READING = {
    "mlp_moe.py": "top-K routing, its two losses, all experts at once in grouped products",
    "clip_moe.py": "CLIP's vision transformer, dense or sparse, at one or several scales",
    "llm.py": "a Mistral decoder: RoPE, grouped-query attention, KV cache, loss, generation",
    "cumo.py": "how image tokens enter the text; the total loss; checkpoints",
    "upcycle.py": "from dense to sparse with the same outputs at step 0",
    "train.py": "the settings, the three stages, the training loop",
    "sample.py": "one question, a chat, a map of the experts",
    "eval.py": "accuracy by question type, next to two baselines",
}


def percent(x):
    return f"{100 * x:.0f}"


def reading_block():
    rows = [(f"[`{name}`]({name})", count_lines(name), text) for name, text in READING.items()]
    return table(("file", "lines", "what you learn"), *rows)


def count_lines(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def demos():
    """The measured demos: {precision: content of bench/mini*.json}."""
    files = (ROOT / "bench" / name for name in ("mini.json", "mini_float32.json"))
    runs = (json.loads(file.read_text()) for file in files if file.is_file())
    return {run["precision"]: run for run in runs}


def demo_block():
    """Time, memory and accuracy of the demo with and without hardware bf16."""
    rows = []
    for precision, run in demos().items():
        seconds = [run["seconds"][k] for k in "123"]
        shares = [percent(run["accuracy"][s]["model"]["all"]) for s in SPLITS]
        rows.append((precision, " + ".join(f"{s:.0f}" for s in seconds), f"{sum(seconds) / 60:.1f}",
                     f"{max(run['peak_memory_gb'].values()):.1f}", *shares))  # fmt: skip
    head = ("precision", "seconds of the stages", "minutes", "peak GB", *SPLITS)
    return table(head, *rows) + f"\n\nOn {run['machine']}."


def results_block():
    run = demos()["bf16"]
    accuracy, rows = run["accuracy"], []
    for kind in accuracy["new"]["model"]:
        cells = [percent(accuracy[s]["model"][kind]) for s in SPLITS]
        cells += [percent(accuracy["new"][row][kind]) for row in ("blank", "fixed")]
        rows.append((kind, ASKED[kind], *cells))
    head = ("type", "example", *SPLITS, "new, blank picture", "new, fixed answers")
    runs = "; ".join(f"`{split}` " + ", ".join(f"{100 * x:.1f}" for x in each)
                     for split, each in run["each"].items())  # fmt: skip
    low, high = map(percent, run["load_range"])
    note = (f"Percent of {run['questions']:,} questions per split answered exactly (bf16): medians "
            f"of {len(run['seeds'])} runs with other seeds. All types: {runs}. On `new`, each "
            f"expert of a sparse block gets {low} % to {high} % of the choices.\n\n")  # fmt: skip
    said = [f"- `{name}`: " + "; ".join(dict.fromkeys(answers))
            for name, answers in run["answers"].items()]  # fmt: skip
    return table(head, *rows) + "\n\n" + note + "\n".join(said)


def cards():
    """[(size of a card in GB, the most exact memory.Plan that fits, whether it fits)]"""
    plan = train.stage_plan(train.resolve({"preset": "mistral-7b", "estimate": True}, 3))
    plans = [(card, memory.first_that_fits(plan, card * memory.GB)) for card in memory.CARDS]
    return [(card, best, memory.total(best) <= memory.FREE * card * memory.GB)
            for card, best in plans]  # fmt: skip


def cards_block():
    """The README's table: what trains CuMo-7B on which card."""
    rows = []
    for card, best, fits in cards():
        words = f"`{memory.to_flags(best)}`" if fits else "too small"
        least = "" if fits else "at least "
        rows.append((f"{card} GB", words, f"{least}{memory.total(best) / memory.GB:.1f} GB"))
    return table(("card", "chosen by `train.py`", "needs"), *rows)


def memory_block():
    """The same with its parts."""
    rows = []
    for card, best, fits in cards():
        words = ("" if fits else "too small even with ") + f"`{memory.to_flags(best)}`"
        parts = [f"{size / memory.GB:.1f}" for size in memory.estimate(best).values()]
        rows.append((f"{card} GB", words, f"{memory.total(best) / memory.GB:.1f}", *parts))
    head = ("card", "flags", "GB", "weights", "gradients", "optimizer", "activations")
    return table(head, *rows)


def took_in_words(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def speed():
    return json.loads((ROOT / "bench" / "amd-epyc-bfloat16.json").read_text())


def performance_block():
    run, lines = speed(), []
    for row in shown(run["rows"]):
        ours = took_in_words(next(iter(row["medians"].values()))) + variant(row)
        others = ", ".join(f"{name} {x:.2f}" for name, x in [*row["ratios"].items()][1:])
        lines.append((row["section"], row["case"], ours, others))
    (start,) = (row for row in run["rows"] if row["section"] == "start")
    versions = sorted({section["torch"] for section in run["sections"].values()})
    head = ("`bench/speed.py`", "case", "ours", "others, as a multiple of our time")
    note = (f"Medians on 2 cores of {run['machine']} with torch {' or '.join(versions)}; "
            f"{run['precision'][6:]} unless the row says otherwise. Above 1, ours is faster. "
            f"`{start['case']}` prints its first word after "
            f"{took_in_words(start['medians']['ours'])}.")  # fmt: skip
    return table(head, *lines) + "\n\n" + note


def bandwidth_block():
    """The share of the memory bandwidth at which a decoding step reads the weights."""
    rows = []
    for row in speed()["rows"]:
        if "share_of_bandwidth" in row:
            shares, speeds = sorted(row["shares"]), sorted(row["speeds"])
            rows.append((row["case"].split(", ")[1], f"{100 * row['share_of_bandwidth']:.0f} %",
                         f"{100 * shares[0]:.0f} to {100 * shares[-1]:.0f} %",
                         f"{speeds[0] / 1e9:.0f} to {speeds[-1] / 1e9:.0f} GB/s"))  # fmt: skip
    head = ("weights", "share of the bandwidth, median", "range over rounds", "memory bandwidth")
    return table(head, *rows)


BLOCKS = {  # page -> {block: the function that writes it}
    "README.md": {"reading": reading_block, "cards": cards_block},
    "docs/RESULTS.md": {
        "demo": demo_block,
        "results": results_block,
        "experts": tables.experts_block,
        "ablations": verdicts.ablations_block,
        "performance": performance_block,
        "bandwidth": bandwidth_block,
        "busy": tables.busy_block,
        "pictures": tables.pictures_block,
        "quant": tables.quant_block,
        "chat": tables.chat_block,
        "memory": memory_block,
        "estimate": tables.estimate_block,
        "rounding": tables.rounding_block,
        "load": tables.load_block,
        "smol": tables.smol_block,
        "tokenizers": tables.tokenizers_block,
        "families": tables.families_block,
        "faults": tables.faults_block,
        "inputs": tables.inputs_block,
        "endurance": tables.endurance_block,
        "platforms": tables.platforms_block,
    },
}


def rewrite(text, page):
    """The text of a page with all its blocks rewritten."""
    for name, write in BLOCKS[page].items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if block.search(text):
            text = block.sub(lambda m, w=write: f"{m[1]}{w()}\n{m[2]}", text)
    return text


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, cwd=ROOT)
    return done.stdout.decode().strip()


def cpu():
    """The name of the processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def machine():
    return f"{os.cpu_count()} cores of {cpu()}"


def median(values):
    """Of numbers, or of the numbers at the same place in dicts and lists."""
    first = values[0]
    if isinstance(first, dict):
        return {key: median([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [median(list(row)) for row in zip(*values)]
    return statistics.median(values)


def collect(folders):
    """Write bench/mini.json and the pictures from finished demos with other seeds: their medians,
    the time of the fastest, the most memory, and all answers about the pictures of the README."""
    (ROOT / "bench").mkdir(exist_ok=True)
    folders = [pathlib.Path(folder) for folder in folders]
    exams = [json.loads((out / "eval.json").read_text()) for out in folders]
    states = [{str(k): json.loads((out / f"stage{k}" / "train.json").read_text())
               for k in (1, 2, 3)} for out in folders]  # fmt: skip
    config = states[0]["3"]["config"]
    run = {
        "command": "runs/demo.sh",
        "commit": commit(),
        "machine": machine(),
        "seeds": [state["3"]["config"]["seed"] for state in states],
        "questions": exams[0]["questions"],
        "accuracy": median([exam["accuracy"] for exam in exams]),
        "each": {split: [exam["accuracy"][split]["model"]["all"] for exam in exams]
                 for split in SPLITS},
        "expert_load": median([exam["expert_load"] for exam in exams]),
        "load_range": [pick(share for exam in exams for row in exam["expert_load"].values()
                            for share in row) for pick in (min, max)],
        "seconds": min(({k: one["seconds"] for k, one in state.items()} for state in states),
                       key=lambda seconds: sum(seconds.values())),
        "precision": "bf16" if config["bf16"] else "float32",
        "peak_memory_gb": {k: max(state[k]["peak_memory_gb"] for state in states) for k in "123"},
        "answers": {name: [answer_to(out, name) for out in folders] for name in PICTURES},
    }  # fmt: skip
    name = "mini.json" if run["precision"] == "bf16" else "mini_float32.json"
    (ROOT / "bench" / name).write_text(json.dumps(run, indent=1) + "\n")
    if run["precision"] == "bf16":
        draw(folders[0])


def answer_to(out, picture):
    """The description of a picture of the README by a finished demo."""
    model = CuMo.from_pretrained(out / "stage3").eval()
    tokenizer = Tokenizer.from_pretrained(out / "stage3")
    return answer_batch(model, tokenizer, [DESCRIBE], [open_image(ROOT / picture)])[0]


def draw(out):
    """Draw the pictures again: those of a finished demo, what experts do, the speed ratios, the
    architecture and the ablations."""
    out, bench = pathlib.Path(out), ROOT / "bench"
    draw_losses({k: read_metrics(out / f"stage{k}") for k in (1, 2, 3)}, bench / "loss.png")
    model = CuMo.from_pretrained(out / "stage3").eval()
    tokenizer = Tokenizer.from_pretrained(out / "stage3")
    cells = plots.example_answers(lambda *asked: answer_batch(model, tokenizer, *asked))
    draw_answers(cells, bench / "answers.png")
    draw_content(tables.read("experts"), bench / "experts.png")
    draw_ratios(speed(), bench / "amd-epyc-bfloat16.png")
    draw_architecture(bench / "architecture.png")
    if found := verdicts.read_content():
        draw_ablations(verdicts.ablations(*found), verdicts.FOLDER / "ablations.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--collect", metavar="OUT", nargs="+", help="finished demos: their medians")
    parser.add_argument("--draw", metavar="OUT", help="first draw this demo's pictures again")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw)
    if args.collect:
        collect(args.collect)
    for page in BLOCKS:
        file = ROOT / page
        file.write_text(rewrite(file.read_text(encoding="utf-8"), page), encoding="utf-8")


if __name__ == "__main__":
    main()
