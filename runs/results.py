"""Write the README's tables from the results in bench/, and its line counts from the files.

    python runs/results.py                  # rewrite the README's blocks
    python runs/results.py --collect out    # first take a finished demo (runs/demo.sh) into bench/
    python runs/results.py --draw out       # draw the pictures anew, and measure nothing

A block stands between `<!-- name -->` and `<!-- /name -->`; tests/test_readme.py checks that every
block is what this script would write.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import stages
from cumo import CuMo
from data.images import open_image
from data.tokenizer import Tokenizer
from engine import memory
from eval import answer_batch
from extras import plots
from extras.plots import draw_answers, draw_load, draw_losses, draw_routing, read_metrics
from runs.pictures import done_how, draw_ablations, draw_ratios, shown

TYPES = ("what", "existence", "count", "where", "kind", "background", "side", "list", "all")
SPLITS = ("seen", "pairs", "style")
ASKED = {
    "what": "What is at the top left?",
    "existence": "Is there a cat?",
    "count": "How many things are there?",
    "where": "Where is the cat?",
    "kind": "Which fruit do you see?",
    "background": "What color is the background?",
    "side": "Is the cat left or right of the dog?",
    "list": "List all objects.",
    "all": "**all types**",
}
READING = [
    ("mlp_moe.py", "Top-K routing, its two losses, experts as one grouped matrix product"),
    ("clip_moe.py", "CLIP's vision transformer, dense or sparse, at several scales"),
    ("llm.py", "a Mistral: RoPE, grouped queries, sliding window, cache, generation"),
    ("loss.py", "cross-entropy with its gradients, a chunk of logits at a time"),
    (
        "engine/decode.py",
        "CPU decoding in C++, near memory bandwidth",
    ),
    ("cumo.py", "how a picture becomes words of a sentence; the losses; checkpoints"),
    ("upcycle.py", "dense to sparse without losing anything at step 0"),
    ("stages.py", "the table of the three stages, every setting, what fits in memory"),
    ("train.py", "building, stepping, resuming, finishing a stage"),
    ("engine/fsdp.py", "one model on many GPUs, with the loss of one process"),
    ("engine/memory.py", "gigabytes and operations of a training, before it begins"),
    ("engine/optim.py", "AdamW on bf16 weights: rounding at random, or a float32 copy"),
    ("engine/conversation.py", "questions and answers of which nothing is computed twice"),
    ("engine/quant.py", "int8 weights: a byte each, and what that costs"),
    ("sample.py", "asking about pictures: once, in a chat, with a map of the experts"),
    ("eval.py", "exact answers by type and split, and which expert does what; benchmarks"),
    ("extras/plots.py", "loss curves, expert loads and expert maps as pictures"),
    ("data/world.py", "pictures, captions and questions drawn from a seed"),
    ("data/chat.py", "conversations to ids and labels, segment by segment"),
    ("data/tokenizer.py", "SentencePiece and byte-level BPE, both on tiktoken"),
    ("data/weights.py", "reading, checking and writing checkpoints"),
    ("extras/benchmarks.py", "POPE, GQA, TextVQA, ScienceQA, MME and others, from local files"),
]


def percent(x):
    return f"{100 * x:.0f}"


def reading_block():
    lines = ["| file | lines | what you learn |", "|---|---|---|"]
    for name, lesson in READING:
        lines.append(f"| [`{name}`]({name}) | {count_lines(name)} | {lesson} |")
    return "\n".join(lines)


def count_lines(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def took(run):
    """Time and memory of a demo, in words."""
    seconds = [run["seconds"][k] for k in "123"]
    return (
        " + ".join(f"{s:.0f}" for s in seconds) + f" seconds of training ({sum(seconds) / 60:.1f} "
        f"minutes) with at most {run['peak_memory_gb']:.1f} GB, on {run['machine']}, in "
        f"{run['precision']}"
    )


def results_block():
    run, slow = (
        json.loads((ROOT / "bench" / name).read_text())
        for name in ("mini.json", "mini_float32.json")
    )
    head = "| | example | seen | pairs | style | seen, blank picture | seen, fixed answers |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    accuracy = run["accuracy"]
    for kind in TYPES:
        cells = [percent(accuracy[s]["model"][kind]) for s in SPLITS]
        cells += [percent(accuracy["seen"][row][kind]) for row in ("blank", "chance")]
        lines.append(f"| {kind} | {ASKED[kind]} | " + " | ".join(cells) + " |")
    load = [share for shares in run["expert_load"].values() for share in shares]
    lines += [
        "",
        f"Percent of {run['questions']} questions a split answered exactly, after {took(run)}. "
        f"Over the pictures of `seen` each expert of each sparse block gets between "
        f"{percent(min(load))} % and {percent(max(load))} % of the tokens.",
        "",
        f"The same on a processor without bf16 instructions: {took(slow)}; "
        + ", ".join(f"{s} {percent(slow['accuracy'][s]['model']['all'])}" for s in SPLITS) + ".",
    ]  # fmt: skip
    return "\n".join(lines)


def sparse_block():
    file = ROOT / "bench" / "sparse_vs_dense.json"
    if not file.is_file():
        return "Not measured yet."
    rows = json.loads(file.read_text())["rows"]
    lines = []
    for name in ("dense", "sparse"):
        mine = [row for row in rows if row["name"] == name]
        cells = []
        for split in SPLITS:
            values = [100 * row[split] for row in mine]
            cells.append(f"{split} {mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
        seconds = mean([row["seconds"] for row in mine])
        lines.append(f"- {name}: " + ", ".join(cells) + f"; {seconds:.0f} seconds")
    return "\n".join(lines)


def ablations(content):
    """The groups of runs/ablations.py with their measures: each row's accuracy by split and the
    `averages` over the splits, one a seed (percent), and how far it lies above the group's first
    row, in the paper too (None: not measured). "within the spread" is said of a difference smaller
    than that of the highest and lowest seed, of this row or the first, whichever is larger."""
    groups = []
    for group in content["groups"]:
        rows = []
        for line in group["rows"]:
            runs = [run for run in content["rows"] if run["name"] == line["name"]]
            splits = {s: [100 * run["accuracy"][s] for run in runs] for s in SPLITS}
            averages = [mean(shares) for shares in zip(*splits.values())]
            row = {"label": line["label"], "runs": runs, "splits": splits, "averages": averages,
                   "average": mean(averages)}  # fmt: skip
            known = not isinstance(line["paper"], str)
            row["paper_average"] = mean(line["paper"]) if known else None
            row["paper_remark"] = "" if known else line["paper"]
            rows.append(row)
            for key, average in (("difference", "average"), ("paper", "paper_average")):
                there = None not in (row[average], rows[0][average])
                # rounded: Python 3.12 adds up more exactly, and 2.25 must stay 2.25 before 3.12 too
                row[key] = round(row[average] - rows[0][average], 9) if there else None
            row["remark"] = ""
            if row["difference"] is not None and len(rows) > 1:
                pair = row["averages"], rows[0]["averages"]
                if min(map(len, pair)) == 1:
                    row["remark"] = "one seed"
                elif abs(row["difference"]) < max(max(values) - min(values) for values in pair):
                    row["remark"] = "within the spread"
        groups.append(group | {"rows": rows})
    return groups


def mean(values):
    return sum(values) / len(values) if values else None


def ablations_table(content):
    head = ("stage 3", *SPLITS, "difference", "in the paper", "active / all, M", "CPU seconds")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in ablations(content):
        for i, row in enumerate(group["rows"]):
            title = "" if i else f"**({group['group']}) {group['title']}**: "
            cells, run = [title + row["label"]], (row["runs"] or [None])[0]
            for values in row["splits"].values():
                spread = f"{min(values):.1f} to {max(values):.1f}" if values else ""
                cells.append(f"{mean(values):.1f} ({spread})" if values else "not measured")
            for key in ("difference", "paper"):
                cells.append(f"{row[key]:+.1f}" if i and row[key] is not None else "")
            cells[-1] += row["paper_remark"]
            cells[-2] += row["remark"] and f", {row['remark']}"
            size = [run[k] / 1e6 for k in ("active_parameters", "parameters")] if run else []
            cells.append(" / ".join(f"{n:.1f}" for n in size))
            seconds = mean([run["cpu_seconds"] for run in row["runs"]])
            cells.append(f"{seconds:.0f}" if run else "")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations_block():
    file = ROOT / "bench" / "ablations" / "results.json"
    if not file.is_file():
        return "Not measured yet."
    content = json.loads(file.read_text())
    seeds = {run["seed"] for run in content["rows"]}
    last = content["rows"][-1]
    lines = [
        ablations_table(content),
        "",
        f"Percent of {content['questions']} questions a split answered exactly, after "
        f"{content['samples']} samples of stage 3: mean, and lowest to highest, of {len(seeds)} "
        f"seeds; {last['machine']}, {last['precision']}. Differences are points over the group's "
        "first row, ours of the mean of the three splits, the paper's of SQA, TextVQA, MM-Vet and "
        'SEED. "Within the spread": smaller than the difference of the highest and the lowest '
        "seed, of this row or of the first, whichever is larger. CPU seconds are those of stage 3.",
    ]
    if file.with_name("ablations.png").is_file():
        picture = "![The differences of the table](bench/ablations/ablations.png)"
        lines += ["", picture]
    return "\n".join(lines)


def memory_block():
    cfg = stages.resolve({"preset": "mistral-7b", "estimate": True}, 3)
    plan = stages.plan_of(cfg)
    lines = ["| card | flags | GB | weights | gradients | optimizer | activations |"]
    lines.append("|---|---|---|---|---|---|---|")
    for card in memory.CARDS:
        best = memory.first_that_fits(plan, card * memory.GB)
        parts = " | ".join(f"{size / memory.GB:.1f}" for size in memory.estimate(best).values())
        total = memory.total(best) / memory.GB
        fits = "" if total <= memory.FREE * card else "too small even with "
        lines.append(f"| {card} GB | {fits}`{memory.flags(best)}` | {total:.1f} | {parts} |")
    return "\n".join(lines)


FAULTS = {  # a row of the table -> kinds of tests/campaigns/crash.py, in words
    "a training is killed": {
        "killed": "at a random moment",
        "points": "before or after a flush, rename or removal, or with a file half written",
    },
    "its disk fails": {
        "disk error": "in one call",
        "disk full": "full, at a random size",
        "read-only": "read-only",
    },
    "its files are damaged": {
        "cut": "the newest resume point has lost its end",
        "bit flip": "one bit of it is another",
        "finished stage": "the stage before",
    },
}
INPUTS = {  # a row of the table -> targets of tests/campaigns/fuzz.py
    "LLaVA JSON and JSONL, conversations": ["llava", "chat"],
    "`tokenizer.model`, `tokenizer.json`, `tekken.json`, and text": ["tokenizer-files", "text"],
    "pictures, of 10 formats": ["images"],
    "configs, safetensors, indexes": ["checkpoint"],
}


def total(rows):
    return {k: sum(row[k] for row in rows) for k in rows[0] if isinstance(rows[0][k], int)}


def faults_block():
    """What crash.py, fuzz.py, long_run.py, crowd.py and platforms.py have counted."""
    content = json.loads((ROOT / "bench" / "faults.json").read_text())
    crash, inputs, long, web = (content[k] for k in ("crash", "inputs", "long", "web"))
    lines = ["| | tried | survived: goes on, or is refused in one line | lost |"]
    lines.append("|---|---|---|---|")
    for name, kinds in FAULTS.items():
        n = total([crash["kinds"][kind] for kind in kinds])
        words = ", ".join(f"{crash['kinds'][k]['tried']} {words}" for k, words in kinds.items())
        lines.append(f"| {name}: {words} | {n['tried']} | {n['survived']} | {n['lost']} |")
    n = total(list(crash["kinds"].values()))
    lines.append(f"| **all faults** | {n['tried']} | {n['survived']} | {n['lost']} |")
    for name, targets in (INPUTS | {"**all inputs**": list(inputs)}).items():
        n = total([inputs[target] for target in targets])
        lines.append(f"| {name} | {n['tried']:,} | {n['read']:,} read, {n['refused']:,} refused | "
                     f"{n['lost']} |")  # fmt: skip
    platforms = [
        f"Python {p['versions']['python']} with torch {p['versions']['torch']}, numpy "
        f"{p['versions']['numpy']} and {len(p['extras']) or 'none'} of the extras' packages: "
        f"{p['passed']} passed, {p['skipped']} skipped, {p['failed']} failed"
        for p in content["platforms"].values()
    ]
    seconds = sorted({int(n["command"].split()[3]) for n in inputs.values()})
    files = " to ".join(map(str, sorted({*long["files"]})))
    lines += [
        "",
        f"Inputs: {' to '.join(map(str, seconds))} seconds a row of the fuzzer. **Long run**: "
        f"{long['steps']:,} steps of a tiny model, memory {long['rss_mib'][0]:.0f} MiB halfway, "
        f"{long['rss_mib'][1]:.0f} at the end ({long['rss_slope_kib_per_1000_steps']:.1f} KiB per "
        f"1,000 steps), {files} open files, {long['metrics_bytes_per_step']} bytes of "
        f"`metrics.jsonl` a step; {long['epochs']} epochs, in each every sample once; the same "
        f"seed {'gave the same weights' if long['same seed twice'] else 'GAVE OTHER WEIGHTS'}. "
        f"**Web page**: {web['clients']} visitors for {web['minutes']:g} minutes, "
        f"{web['answered']} of {web['asked']} questions answered rightly, {web['lost']} lost, "
        f"while {web['left']} left in mid-answer; {web['refused']} pieces of garbage and attempts "
        f"to read a file refused, {web['let through']} let through; memory "
        f"{web['rss_mib'][0]:.0f} MiB halfway, {web['rss_mib'][1]:.0f} at the end. "
        "**Platforms**: Python 3.11 and torch 2.11, or newer, are claimed; tests tried on Linux, "
        f"{'; '.join(platforms)}.",
    ]
    return "\n".join(lines)


def took_in_words(seconds):
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def read_in_words(rows):
    """At which share of the memory's speed weights were read, a token at a time: the median of the
    run, and its turns from least to most, since the memory's own speed changes meanwhile."""
    said = []
    for row in rows:
        if "share_of_bandwidth" in row:
            shares, speeds = sorted(row["shares"]), sorted(row["speeds"])
            said.append(
                f"{100 * row['share_of_bandwidth']:.0f} % ({row['case'].split(', ')[1]}; turns of "
                f"{100 * shares[0]:.0f} to {100 * shares[-1]:.0f} %, memory at "
                f"{speeds[0] / 1e9:.0f} to {speeds[-1] / 1e9:.0f} GB/s)"
            )
    return f"Weights are read at {', '.join(said)} of the memory's speed."


def performance_block():
    run = json.loads((ROOT / "bench" / "amd-epyc-bfloat16.json").read_text())
    lines = ["| `bench/speed.py` | case | ours | beside it, as a multiple |", "|---|---|---|---|"]
    for row in shown(run["rows"]):
        ours = took_in_words(next(iter(row["medians"].values()))) + done_how(row)
        others = ", ".join(f"{name} {x:.2f}" for name, x in [*row["ratios"].items()][1:])
        lines.append(f"| {row['section']} | {row['case']} | {ours} | {others} |")
    (start,) = (row for row in run["rows"] if row["section"] == "start")
    where = f"2 cores of {run['machine']}, {run['precision'][6:]} where nothing else is said"
    lines += ["", f"{where}, torch {run['torch']}; medians. Above 1, ours is faster. From the "
              f"command `{start['case']}` to its first word it takes "
              f"{took_in_words(start['medians']['ours'])}. "
              + read_in_words(run["rows"])]  # fmt: skip
    return "\n".join(lines)


def quant_block():
    run = json.loads((ROOT / "bench" / "quant.json").read_text())
    lines = ["| weights of the language model | SmolLM2-135M: MB | loss | same next token | "
             "miniature: MB | seen | pairs | style |", "|" + "---|" * 8]  # fmt: skip
    for name in ("float32", "bfloat16", "int8"):
        smol, mini = run["smollm2"][name], run["miniature"][name]
        shares = " | ".join(f"{100 * mini[s]:.1f}" for s in SPLITS)
        read = f"{smol['megabytes']:.0f} | {smol['loss']:.3f} | {100 * smol['same']:.1f} %"
        lines.append(f"| {name} | {read} | {mini['megabytes']:.1f} | {shares} |")
    return "\n".join(lines)


BLOCKS = {"reading": reading_block, "results": results_block, "sparse": sparse_block,
          "ablations": ablations_block, "memory": memory_block,
          "performance": performance_block, "quant": quant_block,
          "faults": faults_block}  # fmt: skip


def rewrite(text):
    """The README with every block written anew."""
    for name, write in BLOCKS.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if block.search(text):
            text = block.sub(lambda m, w=write: f"{m[1]}{w()}\n{m[2]}", text)
    return text


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, cwd=ROOT)
    return done.stdout.decode().strip()


def machine():
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.processor()}"


def collect(out):
    """bench/mini.json and the README's pictures, from a finished demo."""
    out = pathlib.Path(out)
    (ROOT / "bench").mkdir(exist_ok=True)
    run = json.loads((out / "eval.json").read_text())
    states = {k: json.loads((out / f"stage{k}" / "train.json").read_text()) for k in (1, 2, 3)}
    run |= {
        "command": "runs/demo.sh",
        "commit": commit(),
        "machine": machine(),
        "seconds": {str(k): state["seconds"] for k, state in states.items()},
        "precision": "bf16" if states[3]["config"]["bf16"] else "float32",
        "peak_memory_gb": max(state["peak_memory_gb"] for state in states.values()),
    }
    name = "mini.json" if run["precision"] == "bf16" else "mini_float32.json"
    (ROOT / "bench" / name).write_text(json.dumps(run, indent=1) + "\n")
    draw(out)


def draw(out):
    """The README's pictures of a finished demo, and of what bench/ holds; nothing is measured."""
    out, bench = pathlib.Path(out), ROOT / "bench"
    draw_losses({k: read_metrics(out / f"stage{k}") for k in (1, 2, 3)}, bench / "loss.png")
    draw_load(json.loads((out / "eval.json").read_text())["expert_load"], bench / "experts.png")
    model = CuMo.from_pretrained(out / "stage3").eval()
    tokenizer = Tokenizer.from_pretrained(out / "stage3")
    cells = plots.example_answers(lambda *asked: answer_batch(model, tokenizer, *asked))
    draw_answers(cells, bench / "answers.png")
    draw_routing(model, open_image(ROOT / "cat.jpg"), bench / "expert_map.png")
    file = bench / "amd-epyc-bfloat16.json"
    draw_ratios(json.loads(file.read_text()), file.with_suffix(".png"))
    file = bench / "ablations" / "results.json"
    draw_ablations(ablations(json.loads(file.read_text())), file.with_name("ablations.png"))


def collect_sparse(out):
    """bench/sparse_vs_dense.json, from a finished runs/sparse_vs_dense.sh."""
    rows = []
    for folder in sorted(pathlib.Path(out).iterdir()):
        name, seed = folder.name.split("-")
        accuracy = json.loads((folder / "eval.json").read_text())["accuracy"]
        state = json.loads((folder / "stage3" / "train.json").read_text())
        shares = {split: accuracy[split]["model"]["all"] for split in SPLITS}
        row = {"name": name, "seed": int(seed), "seconds": state["seconds"]} | shares
        rows.append(row | {"samples": state["samples"]})
    content = {"command": "runs/sparse_vs_dense.sh", "rows": rows}
    (ROOT / "bench" / "sparse_vs_dense.json").write_text(json.dumps(content, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description="write the README's tables", allow_abbrev=False)
    parser.add_argument(
        "--collect", metavar="OUT", help="take this finished demo into bench/ first"
    )
    parser.add_argument("--collect-sparse", metavar="DIR", help="the same of sparse_vs_dense.sh")
    parser.add_argument("--draw", metavar="OUT", help="draw all pictures anew, with this demo's")
    args = parser.parse_args()
    if args.draw:
        draw(args.draw)
    if args.collect:
        collect(args.collect)
    if args.collect_sparse:
        collect_sparse(args.collect_sparse)
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
