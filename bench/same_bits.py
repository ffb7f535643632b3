"""Do two versions of this project train the same weights, to the last bit?

    git worktree add ../before COMMIT
    python bench/same_bits.py ../before                   # 200 samples a stage
    python bench/same_bits.py ../before --samples 0       # the whole demo of both, minutes

Each version trains the three stages of the miniature with the same seed. Compared are every loss,
gradient norm and router statistic of every step, and the CRC-32 of the weights of every stage.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
# measured, so never the same
CLOCK = ("tokens_per_s", "samples_per_s", "mfu", "mfu_peak", "memory_gb")


def trained(version, samples, out):
    """{stage: (numbers of every step, CRC-32 of the weights)} of a version in its folder."""
    found = {}
    for stage in (1, 2, 3):
        words = [sys.executable, "train.py", "--stage", str(stage), "--out", str(out)]
        words += ["--samples", str(samples)] if samples else []
        subprocess.run(words, cwd=version, check=True, stdout=subprocess.DEVNULL)
        folder = out / f"stage{stage}"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]
        found[stage] = steps, json.loads((folder / "train.json").read_text())["crc32"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", type=pathlib.Path, help="folder of the other version")
    parser.add_argument("--samples", type=int, default=200, help="of each stage; 0: all")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        ours, theirs = (
            trained(version.resolve(), args.samples, pathlib.Path(place) / str(i))
            for i, version in enumerate((ROOT, args.other))
        )
    for stage, (steps, crc) in ours.items():
        other_steps, other_crc = theirs[stage]
        differ = sum(a != b for a, b in zip(steps, other_steps)) + abs(
            len(steps) - len(other_steps)
        )
        same = not differ and crc == other_crc
        print(f"stage {stage}: {len(steps)} steps, {differ} differ; weights {[*crc.values()]} "
              f"{'are the same' if same else f'differ from {[*other_crc.values()]}'}")  # fmt: skip
    if ours != theirs:
        sys.exit(1)


if __name__ == "__main__":
    main()
