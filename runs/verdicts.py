"""The verdict on each row of runs/ablations.py: confirmed, contradicted or undecided.

A row is compared with another one, question by question and seed by seed, which removes the luck
that both share. Its difference has a 95 % interval from a bootstrap over questions and seeds:
draw each with replacement (2,000 times, each with 20 draws of the seeds); 95 % of the means are
inside the interval.

    confirmed      the interval excludes 0, on the side of the paper's difference
    contradicted   it excludes 0, on the other side
    undecided      it contains 0

Questions and seeds are drawn apart and their deviations added. What depends on the pair of both is
in each of the two, so the intervals are a little too wide; drawn at once, it would count three
times (Owen 2007, "The pigeonhole bootstrap").

Drawn from only 3 or 5 seeds, the means vary too little: such intervals contain the truth in 75 % or
84 % of cases. So the deviation of drawn seeds is widened as in Student's t (`seed_weights`).

No sample comes twice in stage 3, so the loss before a step is a test of it, and rows see the same
samples. Its mean over the last third of the steps is compared too, as percent (`compare_training`).

bench/ablations/ holds results.json, a summary of every run, and exam.npz with every answer of every
run in one bit and one byte, and its losses in training (`pack`). So the table follows from the two
files, and another way to compare needs no training.
"""

import functools
import json
import pathlib

import numpy as np

from data.exam import SPLITS
from data.weights import publish
from data.world import KINDS
from runs.tables import table

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "bench" / "ablations"
DRAWS, SEED_DRAWS = 2000, 40_000  # the second is a multiple of the first
SCALE = 11  # steps of a packed loss, e^(1/11): 9.5 % each
ALL = "all"


# ------------------------------------------------------------------------------ answers on disk


def pack(right, loss, training):
    """Answers of a run and its losses in training -> what exam.npz holds: a bit for right or wrong;
    a byte for the loss, which is rounded by at most 0.00005 nats and 5 %; two bytes a step."""
    if not np.isfinite(loss).all():
        raise ValueError("the exam has losses that are not finite")
    steps = np.rint(SCALE * np.log1p(1000 * loss.ravel())).clip(max=255)
    return {"right": np.packbits(right.ravel()), "loss": steps.astype(np.uint8),
            "training": np.float16(training)}  # fmt: skip


def unpack(packed, shape):
    """`pack` reversed: (right, loss) of `shape` [splits, questions]."""
    right = np.unpackbits(packed["right"], count=int(np.prod(shape))).astype(bool)
    return right.reshape(shape), (np.expm1(packed["loss"] / SCALE) / 1000).reshape(shape)


def read_answers(file):
    """{run: what `pack` gives} of exam.npz; run: "b-cumo-0". Empty without the file."""
    runs = {}
    if file.is_file():
        with np.load(file) as arrays:
            for key in arrays:
                run, _, name = key.rpartition(".")
                runs.setdefault(run, {})[name] = arrays[key]
    return runs


def write_answers(file, runs):
    """Write exam.npz atomically."""
    arrays = {f"{run}.{k}": x for run, packed in sorted(runs.items()) for k, x in packed.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(file.name + ".partial"), "wb") as opened:
        np.savez_compressed(opened, **arrays)
    publish(file)


# ------------------------------------------------------------------------------ intervals


@functools.cache
def question_weights(n, kind):
    """[DRAWS, n]: how often each of n questions is drawn, as shares with sum 1. Other draws for
    each number `kind`."""
    rng = np.random.default_rng((n, kind))
    drawn = rng.integers(n, size=(DRAWS, n)) + n * np.arange(DRAWS)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=DRAWS * n)
    return counts.reshape(DRAWS, n).astype(np.float32) / n


@functools.cache
def seed_weights(n):
    """[SEED_DRAWS, n]: the same for n seeds, the deviation from equal shares widened.

    The variance of a mean of drawn seeds is (n - 1) / n of what it should be: factor n / (n - 1).
    And n seeds say little about their own variance: factor (n - 1) / chi2, as in Student's t.
    """
    rng = np.random.default_rng((n, 1))
    shares = rng.multinomial(n, np.full(n, 1 / n), SEED_DRAWS) / n
    if n == 1:
        return shares
    many = np.sort(rng.chisquare(n - 1, 10 * SEED_DRAWS))
    chi2 = rng.permutation(many[5::10])[:, None]  # its quantiles: all rows share these draws
    return 1 / n + np.sqrt(n / chi2) * (shares - 1 / n)


def interval(means, drawn):
    """Means [seeds] and their mean with drawn questions [DRAWS] -> (mean, low, high)."""
    mean = means.mean()
    values = np.tile(drawn, SEED_DRAWS // DRAWS) + seed_weights(len(means)) @ means - mean
    return float(mean), *map(float, np.quantile(values, (0.025, 0.975)))


def kinds_of(n):
    """The kind of picture of each of the n questions of a split: in turn (data/exam.py)."""
    return np.arange(n) % len(KINDS)


def compare(ours, reference):
    """Answers of paired seeds, (right, loss) [seeds, splits, questions] each -> {kind of picture or
    "all": {"right" (percent) | "loss": (mean, low, high) of the difference}}.

    Questions are drawn within a kind of picture, so that each kind keeps its share of all.
    """
    right, loss = (np.float32(x) - np.float32(y) for x, y in zip(ours, reference))
    kinds, found = kinds_of(right.shape[-1]), {kind: {} for kind in (*KINDS, ALL)}
    shares = np.bincount(kinds) / len(kinds)
    for name, values in (("right", 100 * right), ("loss", loss)):
        parts = []
        for k in range(len(KINDS)):
            part = values[..., kinds == k].reshape(len(values), -1)  # [seeds, questions]
            parts.append((part.mean(1), question_weights(part.shape[1], k) @ part.mean(0)))
        parts.append([sum(share * x for share, x in zip(shares, side)) for side in zip(*parts)])
        for kind, part in zip(found, parts):
            found[kind][name] = interval(*part)
    return found


def compare_training(ours, reference):
    """Losses of paired seeds by step, an array each -> (mean, low, high) of the difference over the
    last third of the steps, in percent of the reference.

    A step has other samples in every seed, so the spread of the seeds has the luck of the steps
    already; drawn steps add it once more: the interval is up to 1.4 times too wide.
    """
    steps = max(1, min(map(len, reference)) // 3)  # seeds differ by a step or two
    ours, reference = (np.float32([x[-steps:] for x in side]) for side in (ours, reference))
    percent = 100 * (ours - reference) / reference.mean()
    return interval(percent.mean(1), question_weights(steps, len(KINDS)) @ percent.mean(0))


def verdict(expected, found):
    """expected: the paper's difference, None if it has no number; found: (mean, low, high) -> one
    of the words above; "better" or "worse" if the paper has no number or no difference."""
    _, low, high = found
    if low <= 0 <= high:
        return "undecided"
    if not expected:
        return "better" if low > 0 else "worse"
    return "confirmed" if (low > 0) == (expected > 0) else "contradicted"


# ------------------------------------------------------------------------------ the table


def ablations(content, answers):
    """The groups of runs/ablations.py with their measures.

    content: results.json; answers: `read_answers`. Each row gets its `means` over all its seeds;
    the label of the row that it is compared with (`versus`, "" for a reference); `found`, the
    differences (`compare`) over the seeds that both have, or None; `loss`, that of the losses on
    `new` alone, because those of `style`, which no run learns, are the largest and would hide the
    others; `training`, that of the losses in training; what the paper says of it (`paper_of`), and
    the `verdict`, "" with fewer than two seeds.
    """
    shape = len(SPLITS), content["questions"]
    given = {}  # {run: {seed: its answers}}
    for run in content["rows"]:
        packed = answers[f"{run['name']}-{run['seed']}"]
        given.setdefault(run["name"], {})[run["seed"]] = unpack(packed, shape)
    every = [line for group in content["groups"] for line in group["rows"]]
    groups = []
    for group in content["groups"]:
        rows = []
        for line in group["rows"]:
            name, named = line["name"], [*group["rows"], *every]  # first the lines of the group
            other = next((one for one in named if one["name"] == line["against"]), None)
            ours, theirs = given.get(name, {}), given.get(line["against"], {})
            row = {"label": line["label"], "versus": other["label"] if other else "",
                   "runs": [run for run in content["rows"] if run["name"] == name],
                   "found": None, "seeds": len(ours), "verdict": "", "means": means(ours),
                   **paper_of(line, other)}  # fmt: skip
            common = sorted(ours.keys() & theirs.keys())
            if common:
                pair = [[np.stack([side[s][k] for s in common]) for k in (0, 1)]
                        for side in (ours, theirs)]  # fmt: skip
                new = [[x[:, :1] for x in side] for side in pair]
                row["found"], row["loss"] = compare(*pair), compare(*new)[ALL]["loss"]
                row["seeds"] = len(common)
                row["training"] = compare_training(
                    *([answers[f"{one}-{s}"]["training"] for s in common]
                      for one in (name, line["against"])))  # fmt: skip
                if len(common) > 1:
                    row["verdict"] = verdict(row["paper"], row["found"][ALL]["right"])
            rows.append(row)
        groups.append(group | {"rows": rows})
    return groups


def means(given):
    """{kind of picture, "all" or split: (percent right, loss)} of the answers of all seeds."""
    if not given:
        return {}
    right, loss = (np.stack([pair[k] for pair in given.values()]) for k in (0, 1))
    kinds = kinds_of(right.shape[-1])
    chosen = {kind: np.s_[..., kinds == k] for k, kind in enumerate(KINDS)}
    chosen |= {ALL: np.s_[:]} | {split: np.s_[:, k] for k, split in enumerate(SPLITS)}
    return {name: (100 * right[part].mean(), loss[part].mean()) for name, part in chosen.items()}


def paper_of(line, other):
    """What the paper says of a row, compared with the row `other` (None: with nothing): `paper`,
    points of the mean of its four benchmarks, None without a number; `text_vqa`, of TextVQA alone;
    `remark`, instead of numbers."""
    said = {"paper": None, "text_vqa": None, "remark": ""}
    if other is None:
        return said
    remarks = [one["paper"] for one in (line, other) if isinstance(one["paper"], str)]
    if remarks:
        return said | {"remark": remarks[0]}
    points = [ours - theirs for ours, theirs in zip(line["paper"], other["paper"])]
    mean = round(sum(points) / len(points), 9)
    return {"paper": mean, "text_vqa": round(points[1], 9), "remark": ""}


def signed(x, digits=1):
    """A difference as text, with one more digit where rounding would hide on which side of 0 it
    is, as in -0.03."""
    digits += abs(x) < 0.5 / 10**digits and x != 0
    return f"{round(x, digits) + 0.0:+.{digits}f}"  # +0.0, never -0.0


def span(found, seeds, digits=1):
    """(mean, low, high) as text; bold if the interval excludes 0. Of one seed only the mean."""
    mean, low, high = (signed(x, digits) for x in found)
    if seeds < 2:
        return mean
    mark = "" if found[1] <= 0 <= found[2] else "**"
    return f"{mark}{mean}{mark} ({low} to {high})"


def lines_of(groups, write):
    """The lines of a table: a row's label, what it is compared with, and the cells `write(row)`."""
    for group in groups:
        for i, row in enumerate(group["rows"]):
            title = "" if i else f"**({group['group']}) {group['title']}**: "
            yield title + row["label"], row["versus"], *write(row)


def verdict_cells(row):
    if not row["means"]:
        return "not measured", "", row["remark"], "", "", "", ""
    right, loss = row["means"][ALL][0], row["means"][SPLITS[0]][1]
    paper = row["remark"] if row["paper"] is None else signed(row["paper"])
    if not row["found"]:
        return f"{right:.1f}", "", paper, "", f"{loss:.3f}", "", ""
    mean, low, high = row["found"][ALL]["right"]
    said = f"{row['verdict']}: {signed(low)} to {signed(high)}" if row["verdict"] else "one seed"
    losses = span(row["loss"], row["seeds"], 3), span(row["training"], row["seeds"], 2)
    return f"{right:.1f}", signed(mean), paper, said, f"{loss:.3f}", *losses


def kind_cells(row):
    runs, kinds = row["runs"], []
    for kind in KINDS:
        if row["found"]:
            kinds.append(span(row["found"][kind]["right"], row["seeds"]))
        else:
            kinds.append(f"{row['means'][kind][0]:.1f} %" if runs else "")
        if kind == "words":
            known = row["found"] and row["text_vqa"] is not None
            kinds.append(signed(row["text_vqa"]) if known else "")
    if not runs:
        return *kinds, *[""] * (len(SPLITS) + 3)
    splits = [f"{row['means'][split][0]:.1f}" for split in SPLITS]
    size = " / ".join(f"{runs[0][k] / 1e6:.1f}" for k in ("active_parameters", "parameters"))
    seconds = np.mean([run["cpu_seconds"] for run in runs])
    return *kinds, *splits, row["seeds"], size, f"{seconds:.0f}"


def tables(groups):
    """Two tables: the verdicts, then the kinds of pictures, splits, sizes and times."""
    head = ("stage 3", "compared with", "exact, %", "difference", "in the paper", "verdict",
            "loss on `new`, nats", "difference of the loss", "... in training, %")  # fmt: skip
    more = ("stage 3", "compared with", "things", "words", "TextVQA in the paper", "charts",
            *SPLITS, "seeds", "active / all, M", "CPU seconds")  # fmt: skip
    return [table(head, *lines_of(groups, verdict_cells)),
            table(more, *lines_of(groups, kind_cells))]  # fmt: skip


def read_content():
    """results.json and exam.npz of bench/ablations/; None if nothing is measured yet."""
    file = FOLDER / "results.json"
    if not file.is_file():
        return None
    return json.loads(file.read_text()), read_answers(FOLDER / "exam.npz")


def ablations_block():
    """The tables of docs/RESULTS.md."""
    found = read_content()
    if not found:
        return "Not measured yet."
    content = found[0]
    verdicts, kinds = tables(ablations(*found))
    length = f"{content['questions']:,} questions a split, after {content['samples']:,} samples"
    made = {f"{r['machine']}, {r['precision']}, commit {r['commit']}" for r in content["rows"]}
    note = f"{len(content['rows'])} runs; {length} of stage 3; {'; '.join(sorted(made))}."
    lines = [verdicts, "", note]
    if (FOLDER / "ablations.png").is_file():
        picture = "../bench/ablations/ablations.png"
        lines += ["", f"![The differences of the table, ours and the paper's]({picture})"]
    return "\n".join([*lines, "", kinds])
