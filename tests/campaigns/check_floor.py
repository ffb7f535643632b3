"""Check out/eval.json against the documented accuracy floor; exit status 1 below it (for CI)."""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def documented_floor():
    """{split, or kind of picture in the split `new`: percent} from between the floor markers of
    docs/RESULTS.md."""
    text = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    if block := re.search(r"<!-- floor -->(.*?)<!-- /floor -->", text, re.S):
        return {name: int(n) for name, n in re.findall(r"`(\w+)` (\d+) %", block[1])}
    sys.exit("docs/RESULTS.md has no line between <!-- floor --> markers")


def reached_by(accuracy, name):
    """The model's accuracy in a split, or about a kind of picture in the split `new`."""
    return accuracy[name]["model"]["all"] if name in accuracy else accuracy["new"]["model"][name]


def main():
    argparse.ArgumentParser(description=__doc__, allow_abbrev=False).parse_args()
    results = json.loads((ROOT / "out" / "eval.json").read_text())
    low = []
    for name, floor in documented_floor().items():
        reached = 100 * reached_by(results["accuracy"], name)
        print(f"{name}: {reached:.1f} %, floor {floor} %")
        low += [name] if reached < floor else []
    for name, shares in results["expert_load"].items():
        if min(shares) < 0.1 or max(shares) > 0.5:
            print(f"{name}: an expert has {min(shares):.0%} or {max(shares):.0%} of the tokens")
            low.append(name)
    sys.exit(f"below the documented floor: {', '.join(low)}" if low else 0)


if __name__ == "__main__":
    main()
