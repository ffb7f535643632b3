"""What a checkpoint decides about a training that starts from it: train.py --init.

    start_from({"init": "mine/stage2", "lr": 1e-5}, stage=3)
    -> {"init": "mine/stage2", "lr": 1e-5, "preset": "mini", "template": "chatml", ...}

The order is: defaults, preset, table of the stages, checkpoint, command line. From the checkpoint
come

    preset                 train.json names it, or else the shapes of the model tell
    clip, llm, scales      the checkpoint holds the whole model
    template, image_mode   how it was taught (config.json); not from a stage 1 of ours, which has
                           learned captions, so nothing about conversations
    lr, row_tokens         if the same stage is trained once more; else the preset's table has them
"""

import json
from pathlib import Path

from data.configs import cumo_fields
from data.flags import as_flag, check_choice, shown
from data.hub import local_folder
from data.stages import CLIP_L, PRESETS, table_of
from data.weights import read_config

CLIP_SHAPES = {  # image size, patch size, features, layers
    "data/mini/clip": (64, 8, 192, 6),
    "openai/clip-vit-base-patch16": (224, 16, 768, 12),
    CLIP_L: (336, 14, 1024, 24),
}
LLM_SHAPES = {  # features, hidden features, layers
    "data/mini/llm": (256, 512, 5),
    "weights/SmolLM2-135M-Instruct": (576, 1536, 30),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (576, 1536, 30),
    "mistralai/Mistral-7B-Instruct-v0.2": (4096, 14336, 32),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (4096, 14336, 32),
}
LARGE = 1024  # features of a language model that the miniature's learning rates would destroy


def recorded(folder):
    """The settings that one of our stages was trained with; {} for any other checkpoint."""
    try:
        return dict(json.loads((Path(folder) / "train.json").read_text())["config"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def fitting_presets(vision, llm):
    """The presets whose CLIP and language model have these shapes."""
    clip = tuple(vision[name] for name in ("image_size", "patch_size", "dim", "n_layers"))
    text = tuple(llm[name] for name in ("dim", "hidden_dim", "n_layers"))
    shapes = {name: (CLIP_SHAPES[p["clip"]], LLM_SHAPES[p["llm"]]) for name, p in PRESETS.items()}
    return [name for name, shape in shapes.items() if shape == (clip, text)]


def choose_preset(init, given, then, fits, size):
    """The preset of a training from `init`. ValueError for one that is made for another model."""
    own = then if then in fits or not fits else fits[0]
    preset = given or own or "mini"
    check_choice("preset", preset, PRESETS)
    if fits and preset not in fits:
        raise ValueError(f"--preset {preset} is not for --init {init}, a model of preset {own}: "
                         f"leave --preset out, and the table of {own} is used")  # fmt: skip
    if preset == "mini" and size >= LARGE:
        raise ValueError(
            f"--init {init} is far larger than the miniature, whose learning rates "
            "would destroy it; --preset mistral-7b has those of the paper"
        )
    return preset


def start_from(given, stage):
    """`given` {setting: value} of the command line, completed by what its checkpoint decides.

    Prints what differs from the preset. ValueError for a flag that contradicts the checkpoint.
    """
    init = given["init"]
    folder = local_folder(init, "config")
    vision, llm, model = cumo_fields(read_config(folder), folder)
    then, fits = recorded(folder), fitting_presets(vision, llm)
    preset = choose_preset(init, given.get("preset"), then.get("preset"), fits, llm["dim"])
    usual = table_of(preset, stage)
    own = {"scales": tuple(vision.get("scales") or (1,))}
    for name in ("clip", "llm"):
        own[name] = then.get(name) or (usual[name] if fits else "")
    for name, value in own.items():
        if name in given and given[name] != value:
            raise ValueError(
                f"{as_flag(name, given[name])} has no effect with --init {init}, which holds the "
                f"whole model ({name}: {shown(value) or 'its own'}); leave one of them out"
            )
    taught = {"image_mode": model["image_mode"]} if then.get("stage") != 1 else {}
    if taught and stage > 1:
        taught["template"] = model["template"]
    if then.get("stage") == stage:
        taught |= {name: then[name] for name in ("lr", "row_tokens") if name in then}
    usual = {"preset": "mini", "scales": (1,)} | usual
    for name, value in ({"preset": preset, "scales": own["scales"]} | taught).items():
        if name not in given and value != usual[name]:
            print(
                f"from {init}: --{name.replace('_', '-')} {shown(value)}, where the preset "
                f"has {shown(usual[name])}"
            )
    return {"preset": preset} | own | taught | given
