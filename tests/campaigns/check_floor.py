"""Hold out/eval.json against the floor that the README states; exit 1 below it (used by CI)."""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def floor():
    """{split: percent} from the README's line between the floor markers."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line = re.search(r"<!-- floor -->(.*?)<!-- /floor -->", text, re.S)[1]
    return {split: int(number) for split, number in re.findall(r"`(\w+)` (\d+) %", line)}


def main():
    results = json.loads((ROOT / "out" / "eval.json").read_text())
    low = []
    for split, least in floor().items():
        reached = 100 * results["accuracy"][split]["model"]["all"]
        print(f"{split}: {reached:.1f} %, floor {least} %")
        low += [split] if reached < least else []
    for name, shares in results["expert_load"].items():
        if min(shares) < 0.1 or max(shares) > 0.5:
            print(f"{name}: an expert has {min(shares):.0%} or {max(shares):.0%} of the tokens")
            low.append(name)
    sys.exit(f"below the README's floor: {', '.join(low)}" if low else 0)


if __name__ == "__main__":
    main()
