"""The presets and their three stages: one table for train.py and for data/check.py.

A preset names a CLIP and a language model. Each of its stages says how conversations are written
(template), how pictures become square (image_mode) and how many tokens a row has, then how fast and
on how much it learns. A flag of the command line wins over the table, and the table over the
defaults of train.py.
"""

from data.flags import check_choice

CLIP_L = "openai/clip-vit-large-patch14-336"
PRESETS = {
    "mini": dict(clip="data/mini/clip", llm="data/mini/llm"),
    "smol-mini": dict(clip="data/mini/clip", llm="weights/SmolLM2-135M-Instruct"),
    "smol": dict(clip="openai/clip-vit-base-patch16", llm="HuggingFaceTB/SmolLM2-135M-Instruct"),
    "mistral-7b": dict(clip=CLIP_L, llm="mistralai/Mistral-7B-Instruct-v0.2", scales=(1, 3)),
    "mixtral-8x7b": dict(clip=CLIP_L, llm="mistralai/Mixtral-8x7B-Instruct-v0.1", scales=(1, 3)),
}
# The paper's Table 6 (learning rates, lengths), with about as many samples a step: 256, 128, 128.
# The miniature's were found by trying (docs/LOG.md). SMOL_MINI: only stage 1 has been run.
SYSTEM, CHAT, PLAIN = "mistral_instruct_system", "mistral_instruct", "plain"
CHATML, SQUARE = "chatml", "square"
# fmt: off
PAPER = {
    1: dict(template=PLAIN,  lr=1e-3,   rows=4, accumulate=20, row_tokens=2048, image_mode=SQUARE),
    2: dict(template=SYSTEM, lr=2e-6,   rows=1, accumulate=28, row_tokens=4096),
    3: dict(template=SYSTEM, lr=4e-6,   rows=1, accumulate=28, row_tokens=4096),
}
MINI = {
    1: dict(template=PLAIN,  lr=2e-3,   samples=9_000, rows=4, row_tokens=280),
    2: dict(template=CHAT,   lr=2.5e-4, samples=2_500, rows=6, row_tokens=400),
    3: dict(template=CHAT,   lr=2e-4,   samples=5_600, rows=6, row_tokens=400),
}
SMOL_MINI = {
    1: dict(template=PLAIN,  lr=1e-3,   samples=1_000, rows=2, accumulate=1, row_tokens=216),
    2: dict(template=CHATML, lr=1e-4,   samples=2_000, rows=2, accumulate=4, row_tokens=384),
    3: dict(template=CHATML, lr=5e-5,   samples=4_000, rows=2, accumulate=4, row_tokens=384),
}
# fmt: on
SMOL = {1: PAPER[1]} | {k: PAPER[k] | dict(template=CHATML) for k in (2, 3)}
STAGES = {"mini": MINI, "smol-mini": SMOL_MINI, "smol": SMOL, "mistral-7b": PAPER,
          "mixtral-8x7b": PAPER}  # fmt: skip
WORLD_TASK = {1: "name", 2: "describe", 3: "ask"}  # what the emoji world teaches in each stage


def table_of(preset, stage):
    """{setting: value} of one stage of a preset. ValueError for an unknown preset or stage."""
    check_choice("preset", preset, PRESETS)
    check_choice("stage", stage, STAGES[preset])
    return {"image_mode": "pad"} | PRESETS[preset] | STAGES[preset][stage]
