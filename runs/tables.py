"""Tables of docs/RESULTS.md, each from one file in bench/; runs/results.py writes them there."""

import json
import math
import pathlib

from runs.pictures import CONTENT

BENCH = pathlib.Path(__file__).resolve().parents[1] / "bench"
FAULTS = {  # fault of the table -> kinds of tests/campaigns/crash.py, in words
    "the process is killed": {
        "killed": "at a random moment",
        "points": "before or after a flush, rename or removal, or in the middle of a write",
    },
    "the disk fails": {
        "disk error": "one call fails",
        "disk full": "full after a random number of bytes",
        "read-only": "read-only",
    },
    "files are damaged": {
        "cut": "the newest resume point is truncated",
        "bit flip": "one bit of it is flipped",
        "finished stage": "the weights of the stage before",
    },
}
INPUTS = {  # kind of input in the table -> targets of tests/campaigns/fuzz.py
    "LLaVA JSON and JSONL, conversations": ["llava", "chat"],
    "`tokenizer.model`, `tokenizer.json`, `tekken.json`, and text": ["tokenizer-files", "text"],
    "pictures, of 10 formats": ["images"],
    "configs, safetensors, indexes": ["checkpoint"],
}


def read(name):
    return json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))


def table(*rows):
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def total(rows):
    return {k: sum(row[k] for row in rows) for k in rows[0] if isinstance(rows[0][k], int)}


def busy_block():
    """Samples a second of a training next to endless loops (bench/busy.py)."""
    content = read("busy")
    loads = [key for key in content["rows"][0] if key != "setting"]
    head = ("threads wait", *("idle" if load == "0" else f"{load} loops" for load in loads))
    rows = [(row["setting"], *(f"{row[load]:.1f}" for load in loads)) for row in content["rows"]]
    return table(head, *rows)


def pictures_block():
    """Right answers about the first, second and third picture (bench/several_pictures.py)."""
    content = read("several_pictures")
    names = {"alone": "a conversation about each picture",
             "in turn": "one conversation, each picture shown with its first question",
             "by number": "three pictures at once, one question by number",
             "all asked": "three pictures at once, nine questions by number"}  # fmt: skip
    rows = [(words, *(f"{100 * share:.1f}" for share in content[name]))
            for name, words in names.items()]  # fmt: skip
    note = f'\n\n"Which picture has the cat?" is answered right in {100 * content["which"]:.1f} %.'
    return table(("", "first picture", "second", "third"), *rows) + note


def experts_block():
    """Mutual information of experts and of what patches show, layer by layer (bench/experts.py)."""
    rows = read("experts")["rows"]
    blocks, views = ([*dict.fromkeys(row[key] for row in rows)] for key in ("block", "view"))
    lines = []
    for view in views:
        mine = [row for row in rows if row["view"] == view]
        for when in ("before", "after"):
            bits = [row[when] for row in mine]
            cells = (f"{x['bits']:.3f} ({x['permuted_mean']:.4f}, {x['permuted_max']:.4f})"
                     for x in bits)  # fmt: skip
            clear = sum(x["bits"] >= 3 * x["permuted_mean"] for x in bits)
            lines.append((f"{CONTENT[view]}, {when}", *cells, f"{clear} of {len(bits)}"))
    return table(("view, before or after stage 3", *blocks, "at least 3 times the mean"), *lines)


def faults_block():
    """Counts of tests/campaigns/crash.py."""
    kinds = read("faults")["crash"]["kinds"]
    rows = []
    for name, words in FAULTS.items():
        for kind, how in words.items():
            rows.append((name, how, *(kinds[kind][k] for k in ("tried", "survived", "lost"))))
    every = total(list(kinds.values()))
    last = ("**all**", "", every["tried"], every["survived"], every["lost"])
    return table(("fault", "how", "tried", "survived", "lost"), *rows, last)


def inputs_block():
    """Counts of tests/campaigns/fuzz.py."""
    inputs = read("faults")["inputs"]
    rows = []
    for name, targets in (INPUTS | {"**all**": list(inputs)}).items():
        n = total([inputs[target] for target in targets])
        rows.append((name, *(f"{n[k]:,}" for k in ("tried", "read", "refused", "lost"))))
    seconds = sorted({int(n["command"].split()[3]) for n in inputs.values()})
    head = ("input", "tried", "read", "refused in one line", "lost")
    note = f"Each of {len(inputs)} targets was fuzzed for {' to '.join(map(str, seconds))} seconds."
    return table(head, *rows) + "\n\n" + note


def endurance_block():
    """Counts of tests/campaigns/long_run.py and crowd.py."""
    long, web = (read("faults")[k] for k in ("long", "web"))
    memory = [f"{run['rss_mib'][0]:.0f} MiB halfway, {run['rss_mib'][1]:.0f} at the end"
              for run in (long, web)]  # fmt: skip
    seed = "the same weights" if long["same seed twice"] else "OTHER WEIGHTS"
    rows = [
        ("training", f"{long['steps']:,} steps of a tiny model"),
        ("memory", memory[0]),
        ("growth", f"{long['rss_slope_kib_per_1000_steps']:.1f} KiB per 1,000 steps"),
        ("open files", " to ".join(map(str, sorted({*long["files"]})))),
        ("`metrics.jsonl`", f"{long['metrics_bytes_per_step']} bytes a step"),
        ("epochs", f"{long['epochs']}, each with every sample once"),
        ("the same seed, run again", seed),
        ("web page", f"{web['clients']} visitors for {web['minutes']:g} minutes"),
        ("questions answered correctly", f"{web['answered']} of {web['asked']}"),
        ("questions lost", web["lost"]),
        ("visitors who left during an answer", web["left"]),
        ("malformed requests and attempts to read a file: refused", web["refused"]),
        ("... let through", web["let through"]),
        ("memory of the page", memory[1]),
    ]
    return table(("long run", "result"), *rows)


def platforms_block():
    """Counts of tests/campaigns/platforms.py."""
    rows = []
    for run in read("faults")["platforms"].values():
        versions = [run["versions"][k] for k in ("python", "torch", "numpy")]
        counts = [run[k] for k in ("passed", "skipped", "failed")]
        rows.append((*versions, len(run["extras"]), *counts))
    head = ("Python", "torch", "numpy", "optional packages", "passed", "skipped", "failed")
    return table(head, *rows)


def quant_block():
    run = read("quant")
    head = ("weights of the language model", "SmolLM2-135M: MB", "loss", "same next token",
            "miniature: MB", "new", "pairs", "style")  # fmt: skip
    rows = []
    for name in ("float32", "bfloat16", "int8"):
        smol, mini = run["smollm2"][name], run["miniature"][name]
        shares = [f"{100 * mini[split]:.1f}" for split in head[5:]]
        cells = f"{smol['megabytes']:.0f}", f"{smol['loss']:.3f}", f"{100 * smol['same']:.1f} %"
        rows.append((name, *cells, f"{mini['megabytes']:.1f}", *shares))
    note = (f"`new`, `pairs` and `style` are percent of {run['miniature']['questions']} questions "
            "answered exactly.")  # fmt: skip
    return table(head, *rows) + "\n\n" + note


def rounding_block():
    run = read("rounding")
    rows = [
        (row["weights"], row["moments"], f"{row['bytes_per_parameter']:.3g}",
         f"{100 * row['final_deviation']:+.2f} %", f"{100 * row['largest_deviation']:.2f} %")
        for row in run["rows"]
    ]  # fmt: skip
    worst = max(r["largest_deviation"] for r in run["rows"] if r["weights"] == "bf16-sr")
    nearest = next(r["final_deviation"] for r in run["rows"] if r["weights"] == "nearest")
    note = (f"Over {run['steps']:,} steps with stochastic rounding (`bf16-sr`), the loss stays "
            f"within {math.ceil(1e4 * worst) / 100:.2f} % of float32's; plain bf16 (`nearest`) "
            f"falls {100 * nearest:.0f} % behind.")  # fmt: skip
    head = ("weights", "moments", "bytes a parameter", "loss at the end, against float32",
            "largest deviation")  # fmt: skip
    return table(head, *rows) + "\n\n" + note


def tokenizers_block():
    """Speed as a multiple of the reference's, and the texts whose ids differ."""
    rows = read("tokenizers")["rows"]
    texts = list({row["text"]: None for row in rows})
    lines = []
    for name in {row["tokenizer"]: None for row in rows}:
        mine = [row for row in rows if row["tokenizer"] == name]
        ratios = [f"{next(r['ratio'] for r in mine if r['text'] == text):.2f}" for text in texts]
        differ = sum(row["texts_that_differ"] for row in mine)
        lines.append((*name.split(", "), *ratios, differ))
    return table(("tokenizer", "reference", *texts, "texts that differ"), *lines)


def families_block():
    """Each public model that was tried: equal to the reference, or the line that refuses it."""
    short = lambda text: text if len(text) < 130 else text[:127] + "..."
    rows = read("families")["rows"]
    return table(("kind", "model", "found"), *((row["kind"], row["name"],
                 short(row["found"]).replace("|", "\\|")) for row in rows))  # fmt: skip


def load_block():
    head = ("files", "type of the files", "type of the model", "model, MB", "peak / model")
    rows = [(row["form"], row["file_dtype"], row["dtype"], f"{row['model_mb']:.0f}",
             f"{row['ratio']:.2f}") for row in read("load_memory")["rows"]]  # fmt: skip
    return table(head, *rows)


def estimate_block():
    """The memory section of bench/speed.py: measured peak and estimate of a training."""
    rows = [
        (row["case"], f"{row['peak'] / 1e6:,.0f}", f"{row['estimate'] / 1e6:,.0f}",
         f"{row['peak'] / row['estimate']:.1f}")
        for row in read("amd-epyc-bfloat16")["rows"] if row["section"] == "memory"
    ]  # fmt: skip
    return table(("training", "measured peak, MB", "estimate, MB", "peak / estimate"), *rows)


def chat_block():
    rows = read("long_chat")["rows"]
    names = {"ms_a_token": "ms a token", "ms_to_first_token": "ms to the first token",
             "mb": "memory, MB"}  # fmt: skip
    halves = {"first": rows[: len(rows) // 2], "second": rows[len(rows) // 2 :]}
    lines = [
        (f"{which} half, up to {half[-1]['tokens']:,} tokens",
         *(f"{sum(row[k] for row in half) / len(half):.1f}" for k in names))
        for which, half in halves.items()
    ]  # fmt: skip
    return table(("conversation, means", *names.values()), *lines)


def smol_block():
    run = read("smol_mini")
    samples = run["training_loss_by_samples"][-1][0]
    names = {"before": "before stage 1", "after": f"after {samples} captions",
             "after, blank pictures": "after, with blank pictures"}  # fmt: skip
    lines = [(words, f"{run[k]['loss']:.2f}", f"{100 * run[k]['exact']:.0f} %")
             for k, words in names.items()]  # fmt: skip
    head = (f"{run['captions']} pictures not in training", "loss of a caption", "exactly right")
    return table(head, *lines)
