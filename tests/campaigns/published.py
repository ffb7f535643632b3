"""Answers of others, read and scored by us: LLaVA-1.5-13B's in LLaVA's `eval.zip`.

    python tests/campaigns/published.py scienceqa eval/scienceqa \\
        eval/scienceqa/answers/llava-v1.5-13b.jsonl

The folder is that of `eval.py --benchmark`, and pictures are not needed. docs/RESULTS.md has what
the benchmarks' own scorers say of the same answers.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.flags import check_choice, parse, run
from extras.benchmarks import BENCHMARKS, jsonl_records
from extras.scores import SCORES


def score_file(name, folder, file):
    """The scores of a file of answers. ValueError if a question has none."""
    questions = BENCHMARKS[name][0](Path(folder))
    often = Counter(str(question.id) for question in questions)
    key = lambda id, prompt: (str(id), prompt.strip() if often[str(id)] > 1 else "")
    said = {key(row["question_id"], row["prompt"]): row["text"]
            for _, row in jsonl_records(Path(file))}  # fmt: skip
    silent = [question.id for question in questions if key(*question[:2]) not in said]
    if silent:
        raise ValueError(f"{file}: has no answer to {len(silent)} of {len(questions)} questions, "
                         f"the first {silent[0]!r}")  # fmt: skip
    return SCORES[name]([(question, said[key(*question[:2])]) for question in questions])


@dataclass
class PublishedConfig:
    benchmark: str  # its name, as in eval.py --benchmark
    folder: str  # its files
    answers: str  # JSONL in LLaVA's format


def main():
    cfg, _ = parse(PublishedConfig, description=__doc__.split("\n")[0])
    check_choice("benchmark", cfg.benchmark, BENCHMARKS)
    print(json.dumps(score_file(cfg.benchmark, cfg.folder, cfg.answers), indent=1))


if __name__ == "__main__":
    run(main)
