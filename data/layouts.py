"""LLaVA's checkpoints, dense, with the names of CuMo's: to ask them, or to upcycle them.

    LLaVA-1.5, LLaVA-1.6-Mistral   CuMo comes from their code. Their CLIP is in the file, or in the
                                   folder `mm_vision_tower`.
    llava-hf, model_type llava     the language model's config is in `text_config`

Tiles of LLaVA-1.6 (anyres, llava_next) are refused. llava-hf crops pictures, but its weights have
learned from padded ones, so we pad.
"""

import re
from itertools import chain

from data.hub import local_folder
from data.weights import read_stage_files, read_tensors

SIZES = dict(vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
TEXT_DEFAULTS = {  # a text_config has only the fields that are not transformers' defaults
    "llama": SIZES | dict(intermediate_size=11008, max_position_embeddings=2048),
    "mistral": SIZES | dict(intermediate_size=14336, max_position_embeddings=131072),
}
TAUGHT = {"llava_llama": "vicuna", "llava_mistral": "mistral_v1"}  # LLaVA's own templates
TOWER = "model.vision_tower.vision_model."
RENAMED = (
    (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "model."),
    (r"^language_model\.lm_head", "lm_head"),
    (r"^(model\.)?multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^(model\.)?multi_modal_projector\.linear_2", "model.mm_projector.2"),
    (r"^(model\.)?(vision_tower\.)+(vision_model\.)?", TOWER),
)
UNUSED = (r"\b(text_model|text_projection|visual_projection|logit_scale|post_layernorm|position_ids"
          r"|image_newline)\b")  # fmt: skip


def cumo_config(config: dict) -> dict:
    """The config.json of a LLaVA with CuMo's names; a CuMo's is returned as it is."""
    if config.get("model_type") == "llava":  # llava-hf; LLaVA-1.5, too, has called itself so
        text = config.get("text_config")
        text = text if isinstance(text, dict) else {}
        family = str(text.get("model_type", "llama"))
        config = TEXT_DEFAULTS.get(family, {}) | config | text | {"model_type": f"llava_{family}"}
    ours = {"mlp_smoe", "clip_smoe", "nanocumo_template"} & config.keys()
    template = TAUGHT.get(str(config.get("model_type")), "mistral_instruct_system")
    return config if ours else config | {"nanocumo_template": template}


def read_cumo(path, config: dict, headers: bool = False):
    """(name, tensor) pairs of a CuMo's or a LLaVA's checkpoint, under CuMo's names."""
    files = lambda headers: chain(read_tensors(path, headers), read_stage_files(path, headers))
    whole = "vision_config" in config or any("vision_tower." in name for name, _ in files(True))
    clip = () if whole else read_tensors(local_folder(config["mm_vision_tower"]), headers)
    clip = (("vision_tower." + name, tensor) for name, tensor in clip)
    for name, tensor in chain(files(headers), clip):
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        if not re.search(UNUSED, name):
            yield name, tensor
