"""What README.md and docs/RESULTS.md say is true: tables, figures, commands, code, links, flags."""

import importlib
import json
import math
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from campaigns.check_floor import reached_by
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
import train
from clip_moe import CLIPVisionConfig
from cumo import CuMo, CuMoConfig
from data.chat import render
from data.tokenizer import Tokenizer
from data.weights import read_config
from data.world import KINDS
from engine import memory
from extras import benchmarks
from llm import LLMConfig
from mlp_moe import Experts, Router
from runs import pictures, results, verdicts
from upcycle import sparse_config

PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in results.BLOCKS}
README, RESULTS = PAGES["README.md"], PAGES["docs/RESULTS.md"]
SCRIPTS = {"train": "train.py", "sample": "sample.py", "eval": "eval.py", "upcycle": "upcycle.py",
           "data.check": "-m data.check", "extras.web": "extras/web.py",
           "extras.lmms_eval": "extras/lmms_eval.py", "runs.ablations": "runs/ablations.py",
           "runs.pictures": "runs/pictures.py"}  # fmt: skip


def bench(name):
    return json.loads((ROOT / "bench" / f"{name}.json").read_text())


def stated(pattern, page=README):
    """The numbers in the one place of a page where `pattern` matches."""
    (found,) = re.finditer(pattern, " ".join(page.split()))
    return [float(number.replace(",", "")) for number in found.groups()]


# ------------------------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", PAGES)
def test_readme_numbers_are_true(page):
    for name in results.BLOCKS[page]:
        assert f"<!-- {name} -->" in PAGES[page], f"{page} has no block {name}"
    fresh = results.rewrite(PAGES[page], page)
    assert fresh == PAGES[page], "run `python runs/results.py` and commit"


def test_readme_is_short_enough_to_be_read():
    lines = README.splitlines()
    assert len(lines) <= 190 and len(README.split()) <= 2000
    assert max(map(len, lines)) <= 400


@pytest.mark.parametrize("page", [*PAGES, "docs/LOG.md", "docs/SECURITY.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', text)
    for target in (link or source for link, source in targets):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = ROOT / Path(page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads}


# ------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_in_the_readme_exist(script, monkeypatch, capsys):
    command = re.escape(SCRIPTS[script])
    flags = {
        flag
        for text in PAGES.values()
        for line in re.findall(rf"(?:python |`){command}( [^`\n]*)", text)
        for flag in re.findall(r"--[a-z][a-z0-9-]+", line.split("#")[0])
    }
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "999")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert not {flag for flag in flags if flag not in shown}


def test_scripts_benchmarks_and_extras_in_the_pages_exist():
    text = README + RESULTS
    named = re.findall(r"(?:python|`|&& |^)((?:runs|bench|extras|tests)/[\w/]+\.(?:py|sh))", text)
    for name in {*named, *re.findall(r"\bpython ([\w/]+\.py)", text)} - {"mine.py"}:
        assert (ROOT / name).is_file(), name
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in re.findall(r'"\.\[(\w+)\]"', text))
    rows = re.findall(r"^\| [^|]+ \| `(\w+)`", RESULTS, flags=re.M)
    assert {*rows} >= {*benchmarks.BENCHMARKS}
    for prompt in (benchmarks.SHORT, benchmarks.LETTER, benchmarks.LETTER_CN):
        assert prompt.strip() in RESULTS


def test_a_scene_of_the_readme_is_drawn_and_its_questions_are_printed(
    tmp_path, monkeypatch, capsys
):
    (words,) = re.findall(r"python -m data\.world ([^#\n]*)", README)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["world.py", *words.split()])
    monkeypatch.delitem(sys.modules, "data.world")
    runpy.run_module("data.world", run_name="__main__")
    first, *asked = capsys.readouterr().out.splitlines()
    assert first.startswith("scene.png: on a ") and len(asked) == 6
    with Image.open(tmp_path / "scene.png") as picture:
        assert picture.size == (256, 256)


def test_the_architecture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pictures.draw_architecture(tmp_path / "architecture.png")
    assert (tmp_path / "architecture.png").stat().st_size > 50_000


@pytest.mark.parametrize("name", ["mlp_moe", "clip_moe", "llm", "cumo"])
def test_each_component_shows_a_worked_example(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert "->" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- code


@torch.no_grad()
def test_the_twelve_lines_of_co_upcycling_are_true():
    """They give the dense MLP's output, whatever the router says, and the router's own balance."""
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in code.splitlines() if line]) == 12

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.fc2(F.gelu(self.fc1(x)))

    def run_experts(x, choice):  # slow: all tokens through each expert alone
        ends_EE = torch.ones(4, 4, dtype=torch.int32).triu() * len(x)
        every = [names["experts"](x, ends_E) for ends_E in ends_EE]
        return torch.stack(every, 1)[torch.arange(len(x))[:, None], choice]

    x = torch.randn(10, 8)
    names = dict(experts=Experts(4, 8, 16, 8), mlp=MLP(), router=Router(8, 4, 2), x=x, F=F,
                 run_experts=run_experts, lm_loss=1.0, z=2.0)  # fmt: skip
    exec(code, names)
    torch.testing.assert_close(names["y"], names["mlp"](x))
    torch.testing.assert_close(names["balance"], names["router"](x)[1].balance)


def test_the_upcycled_miniature_has_the_stated_parameters():
    vision, llm = (kind.from_hf(read_config(ROOT / "data" / "mini" / part))
                   for part, kind in (("clip", CLIPVisionConfig), ("llm", LLMConfig)))  # fmt: skip
    dense = CuMoConfig(vision, llm)
    with torch.device("meta"):
        models = CuMo(dense), CuMo(sparse_config(dense, ("clip", "mlp"), 4, 2))
    count = [sum(p.numel() for p in model.parameters()) for model in models]
    assert count == stated(r"# ([\d,]+) parameters -> ([\d,]+)")


# ------------------------------------------------------------------------------------- figures


def test_figures_of_the_readme_are_the_measured_ones():
    runs = results.demos()
    minutes = [round(sum(run["seconds"].values()) / 60, 1) for run in runs.values()]
    assert minutes[:1] == stated(r"takes ([\d.]+) minutes on two cores")
    assert minutes[:1] == stated(r"trains in ([\d.]+) minutes on two CPU cores")
    most = max(max(run["peak_memory_gb"].values()) for run in runs.values())
    assert [round(most, 1)] == stated(r"and at most ([\d.]+) GB")
    accuracy = runs["bf16"]["accuracy"]
    shares = [accuracy[split]["model"]["all"] for split in results.SPLITS]
    shares = [round(100 * x) for x in (*shares, accuracy["new"]["blank"]["all"])]
    shares[1:1] = [round(100 * accuracy["new"]["model"][kind]) for kind in KINDS]
    words = (r"answers (\d+) % of questions about new scenes exactly: (\d+) % about things, "
             r"(\d+) % about words, (\d+) % about charts\. With pairs .*? it answers (\d+) %, "
             r"in a style .*? (\d+) %, and (\d+) % when shown an empty picture")  # fmt: skip
    assert shares == stated(words)
    assert shares[:1] == stated(r"answers (\d+) % of questions about new scenes \|")


def test_what_the_pages_say_of_the_ablations_is_in_the_table():
    rows = {(row["label"], row["versus"]): row
            for group in verdicts.ablations(*verdicts.read_content())
            for row in group["rows"]}  # fmt: skip
    five = {("2 of 4, from scratch", "2 of 4 experts (CuMo)"): "worse",
            ("CuMo", "dense"): "better", ("CuMo", "CLIP twice as wide"): "undecided",
            ("connector sparse", "dense"): "undecided",
            ("2 of 4 experts (CuMo)", "CLIP unfrozen"): "undecided",
            ("CLIP unfrozen", "CLIP frozen"): "confirmed",
            ("scales 1 and 2", "scale 1"): "confirmed"}  # fmt: skip
    three = {("2 of 4, upcycled", "2 of 4 experts, from scratch"): "confirmed",
             ("with", "without"): "confirmed", ("2 of 4", "1 of 4"): "better",
             ("4 of 4", "2 of 4"): "undecided", ("scales 1 and 3", "scale 1"): "undecided",
             ("2 of 8 experts", "2 of 4 experts (CuMo)"): "undecided",
             ("2 of 8 experts", "2 of 4, auxiliary losses"): "undecided",
             ("language model upcycled", "CuMo"): "undecided"}  # fmt: skip
    assert {pair: rows[pair]["verdict"] for pair in five | three} == five | three
    assert {rows[pair]["seeds"] for pair in five} == {5}
    assert {rows[pair]["seeds"] for pair in three} == {3}
    right = {pair: rows[pair]["found"]["all"]["right"] for pair in five | three}
    loss = {pair: rows[pair]["loss"] for pair in five | three}
    scratch, dense, wide, connector, experts, clip, scales = (right[pair] for pair in five)
    upcycled, pft, two, four, *_ = (right[pair] for pair in three)
    less = lambda found: [-x for x in (found[0], found[2], found[1])]  # a negative difference
    of_split = lambda split: rows["2 of 4, from scratch", "2 of 4 experts (CuMo)"]["means"][
        split][0] - rows["CuMo", "dense"]["means"][split][0]  # fmt: skip
    kinds = rows["scales 1 and 2", "scale 1"]["found"]
    for words, found, *page in (
        ("cost {:.1f} points of exact answers in CLIP ({:.1f} to {:.1f}", less(scratch)),
        ("on `new` {:.1f}, while they gain {:.1f}", [-of_split("new"), of_split("style")]),
        ("{:.1f} in the connector ({:.1f} to {:.1f}, three seeds)", upcycled),
        ("CuMo's loss is {:.3f} nats lower", less(loss["CuMo", "dense"])),
        ("dense throughout ({1:.3f} to {2:.3f})", less(loss["CuMo", "dense"])),
        ("it answers {:.2f} points more ({:.2f} to {:.2f})", dense),
        ("alone brings {:.3f} nats", less(loss["connector sparse", "dense"])),
        ("and {:+.1f} points ({:+.1f} to {:+.1f}, undecided)", connector),
        ("CLIP bring {:.3f} nats ({:.3f} to {:.3f})",
         less(loss["2 of 4 experts (CuMo)", "CLIP unfrozen"])),
        ("and {:+.1f} points ({:.1f} to {:+.1f}, undecided; the paper", experts),
        ("undecided: {:+.1f} points ({:.1f} to {:+.1f})", wide),
        ("{:.3f} nats ({:.3f} to {:+.3f})", loss["CuMo", "CLIP twice as wide"]),
        ("stage 3: {:+.1f} points ({:.1f} to {:.1f})", clip),
        ("worth {:+.1f} ({:.1f} to {:.1f})", scales),
        ("things {:+.1f}", kinds["things"]["right"]),
        ("charts {:.1f} ({:.1f} to {:+.2f})", kinds["charts"]["right"]),
        ("stage 2 is worth {:.1f} points ({:.1f} to {:.1f})", pft),
        ("instead of one {:.1f} ({:.1f} to {:.1f})", two),
        ("two are undecided, {:.1f} ({:.1f} to {:+.1f})", four),
        ("a loss {:.3f} nats higher ({:.3f} to {:.3f})", loss["4 of 4", "2 of 4"]),
        ("however, is {:.3f} nats lower", less(loss["scales 1 and 3", "scale 1"])),
        ("copied CLIP experts beat random ones by {:.1f} points", less(scratch), README),
        ("a dense model barely, by {:.2f} ({:.2f} to {:.2f})", dense, README),
        ("a loss {:.2f} nats lower", less(loss["CuMo", "dense"]), README),
        ("undecided, {:+.1f} ({:.1f} to {:+.1f})", wide, README),
    ):  # fmt: skip
        assert words.format(*found) in (page[0] if page else RESULTS)


def test_figures_of_the_ablations_that_no_table_shows():
    content, answers = verdicts.read_content()
    given = lambda name, seeds: [
        np.stack(side) for side in zip(*(
            verdicts.unpack(answers[f"{name}-{s}"], (3, content["questions"])) for s in seeds))
    ]  # fmt: skip
    new = [[x[:, :1] for x in given(name, range(5))] for name in ("b-cumo", "g-dense")]
    found, share = verdicts.compare(*new), 1 / 3  # a third of the questions is about signs
    signs, every = -share * found["words"]["loss"][0], -found["all"]["loss"][0]
    assert f"of the {every:.3f} nats between CuMo and dense they make {signs:.3f}" in RESULTS
    some, all_five = (100 * given("b-cumo", seeds)[0].mean() for seeds in (range(2, 5), range(5)))
    assert f"{some:.1f} % on seeds 2 to 4, {all_five:.1f} % on all five" in RESULTS


def test_figures_of_the_readme_about_experts_are_the_measured_ones():
    rows = {(row["block"], row["view"]): row for row in bench("experts")["rows"]}
    bits = lambda view: [round(rows["connector", view][when]["bits"], 2)
                         for when in ("before", "after")]  # fmt: skip
    said = stated(r"with position rises from ([\d.]+) to ([\d.]+) bits, with the object it falls "
                  r"from ([\d.]+) to ([\d.]+), with background color from ([\d.]+) to "
                  r"(\d+\.\d+)")  # fmt: skip
    assert said == [*bits("position"), *bits("object"), *bits("background")]


def test_figures_of_routing_without_the_balance_loss_are_the_measured_ones():
    without = bench("experts_no_balance")
    rows = {(row["block"], row["view"]): row for row in without["rows"]}
    said = stated(r"in the connector at ([\d.]+) bits with position .*?, at ([\d.]+) with the "
                  r"object .*?, and at ([\d.]+) with the color of", RESULTS)  # fmt: skip
    views = ("position", "object", "background")
    assert said == [round(rows["connector", view]["after"]["bits"], 2) for view in views]
    shares = [share for block in without["expert_load"].values() for share in block]
    said = stated(r"got (\d+) % to (\d+) % of the choices, and its answers", RESULTS)
    assert said == [round(100 * pick(shares)) for pick in (min, max)]
    accuracy = [round(100 * without["accuracy"][split], 1) for split in ("new", "pairs", "style")]
    assert accuracy == stated(r"as good: ([\d.]+), ([\d.]+) and ([\d.]+) %", RESULTS)


def test_what_the_results_say_of_experts_is_true_of_every_layer():
    views = {}  # view -> [(bits before, after, permuted) of each block]
    for row in bench("experts")["rows"]:
        bits = row["before"]["bits"], row["after"]["bits"], row["after"]["permuted_mean"]
        views.setdefault(row["view"], []).append(bits)
    growth = [after / before for before, after, _ in views["position"]]
    assert [round(pick(growth)) for pick in (min, max)] == [2, 3], "about two to three times"
    most = {view: max(after for _, after, _ in rows) for view, rows in views.items()}
    kind = stated(r"things, words and charts they know at most ([\d.]+) bits", RESULTS)
    assert kind == [round(most["kind"], 3)]
    assert kind == stated(r"No block divides the kinds of pictures: at most ([\d.]+) bits")
    assert [round(most["part"], 2)] == stated(r"they know at most ([\d.]+) bits, at", RESULTS)
    said = stated(r"They follow the object: up to ([\d.]+) bits, in the connector, .*? category \("
                  r"at most ([\d.]+) bits\) or the color of the background \(at most ([\d.]+)\)",
                  RESULTS)  # fmt: skip
    assert said == [round(most[view], 2) for view in ("object", "category", "background")]
    assert most["object"] == views["object"][-1][1], "in the connector"
    clear = {view: [after >= 3 * permuted for _, after, permuted in rows]
             for view, rows in views.items()}  # fmt: skip
    assert all(clear["kind"]) and clear["part"] == [True] * 3 + [False] * 3
    assert sum(clear["object"]) == 4
    lowered = [rows for view, rows in views.items() if view != "position"]
    assert len(lowered) == 5
    assert all(after < before for rows in lowered for before, after, _ in rows)


def test_the_floor_is_below_the_measured_accuracy():
    line = re.search(r"<!-- floor -->(.*?)<!-- /floor -->", RESULTS)[1]
    floor = {name: int(number) for name, number in re.findall(r"`(\w+)` (\d+) %", line)}
    assert [*floor] == [*results.SPLITS, *KINDS]
    for run in results.demos().values():
        for name, least in floor.items():
            assert 0.01 * least < reached_by(run["accuracy"], name)


def test_figures_of_the_readme_about_memory_and_own_data_are_those_of_the_code():
    _, best, _ = results.cards()[-1]
    mistral = memory.KNOWN["mistralai/Mistral-7B-Instruct-v0.2"]
    cache = 2 * 2 * 4096 * mistral.n_layers * mistral.n_kv_heads * mistral.head_dim  # k, v; bf16
    sizes = [round(n / memory.GB, 1) for n in (memory.estimate(best)["weights"], cache)]
    assert sizes == stated(r"take ([\d.]+) GB, plus ([\d.]+) GB for 4,096 tokens of context")
    cfg = train.resolve({}, 3)
    steps = stated(r"into (\d+) rows of (\d+) tokens. .*? about (\d+), so .*? and (\d+) records")
    tokenizer = Tokenizer.from_pretrained(ROOT / "data" / "mini" / "llm")
    asked = [{"from": "human", "value": "<image>\nDo you see a crocodile?"},
             {"from": "gpt", "value": "no"}]  # fmt: skip
    length = len(render(asked, tokenizer, cfg.template, image_tokens=64, n_images=1)[0])
    assert steps == [cfg.rows, cfg.row_tokens, length, 100]
    made = math.ceil(100 / (cfg.rows * (cfg.row_tokens // length)))
    assert [made] == stated(r"100 records make (\d+) steps")
    vision, llm = (read_config(ROOT / "data" / "mini" / part) for part in ("clip", "llm"))
    sees = stated(r"sees (\d+) x (\d+) pixels and writes with (\d+) tokens")
    assert sees == [vision["image_size"], vision["image_size"], llm["vocab_size"]]
    size = lambda word: len(tokenizer.encode(f"a {word}")) - len(tokenizer.encode("a"))
    assert size("crocodile") == 1 and [size("forklift")] == stated(r"\(\*forklift\*: (\d+)\)")


def test_figures_of_the_benches_are_the_measured_ones():
    text = " ".join(RESULTS.split())
    load, tokenizers = (bench(name)["rows"] for name in ("load_memory", "tokenizers"))
    most = {row["dtype"]: row["ratio"] for row in sorted(load, key=lambda row: row["ratio"])}
    assert f"a load takes {most['float32']:.2f} times the model" in text
    assert f"{most['bfloat16']:.2f} times when float32 files become a bfloat16 model" in text
    every = {row["tokenizer"].split(",")[0]: row for row in tokenizers if row["text"] == "all"}
    ratio = {name: row["ratio"] for name, row in every.items()}
    assert min(ratio.values()) >= 1
    speeds = f"{ratio['Mistral v1']:.2f}, {ratio['tekken']:.1f} and {ratio['SmolLM2']:.1f} to"
    assert f"speeds are {speeds} {ratio['miniature']:.1f} times theirs" in text
    differ = sum(row["texts_that_differ"] for row in every.values())
    assert differ == 0 and "without one difference" in text


def test_figures_of_rounding_and_of_smollm2_are_the_measured_ones():
    text = " ".join(RESULTS.split())
    rounding = bench("rounding")["rows"]
    random = [row["largest_deviation"] for row in rounding if row["weights"] == "bf16-sr"]
    (nearest,) = [row["final_deviation"] for row in rounding if row["weights"] == "nearest"]
    least, behind = stated(r"stays within ([\d.]+) % of float32's; plain bf16 .*? falls (\d+) %",
                           RESULTS)  # fmt: skip
    assert len(random) == 2 and max(map(abs, random)) <= least / 100
    assert round(100 * nearest) == behind
    smol = bench("smol_mini")
    after, blank = (round(100 * smol[k]["exact"]) for k in ("after", "after, blank pictures"))
    assert smol["captions"] == 100
    assert f"names {after} of 100 new pictures exactly, {blank} when they are painted over" in text
