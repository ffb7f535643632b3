"""config.json of public models: which names, defaults and variants they have.

Llama, Mistral and Mixtral share one architecture and one set of names. A field that is missing in a
file has the default of its family, so the same silence can mean different models. Variants that
clip_moe.py and llm.py do not compute are refused by name: loaded anyway, they would answer
nonsense.
"""

import dataclasses

from data.hub import local_folder
from data.weights import read_config

LLM_NAMES = {  # our name of a field -> its public name
    "vocab_size": "vocab_size", "dim": "hidden_size", "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "max_positions": "max_position_embeddings",
    "sliding_window": "sliding_window", "tie_embeddings": "tie_word_embeddings",
    "num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}  # fmt: skip
LLM_DEFAULTS = {  # model_type -> the defaults of transformers where they are not LLMConfig's
    "llama": {"rms_norm_eps": 1e-6, "num_key_value_heads": None},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8},
}
CLIP_NAMES = {  # the last three are ours; transformers ignores them
    "image_size": "image_size", "patch_size": "patch_size", "dim": "hidden_size",
    "hidden_dim": "intermediate_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "act": "hidden_act", "layer_norm_eps": "layer_norm_eps",
    "scales": "scales", "num_experts": "num_experts", "top_k": "num_selected"}  # fmt: skip
VIT_B = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default"}


LARGEST = {"n_layers": 2**10, "num_experts": 2**10, "mlp_experts": 2**10, "max_positions": 2**40}


def renamed(config: dict, names: dict) -> dict:
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def make(cls, fields: dict):
    """A config dataclass. ValueError that names the required fields that are missing."""
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"config.json is incomplete: {error}") from None


def check_fields(config: object) -> None:
    """ValueError unless every number of a config dataclass has its type and a plausible size."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        whole = type(value) is int
        if field.type is bool:
            good, wanted = type(value) is bool, "true or false"
        elif field.type is float:
            good = whole or isinstance(value, float)
            good, wanted = good and 0 <= value < float("inf"), "a number from 0 up"
        elif field.type is int or field.type == int | None and value is not None:
            least, most = int("experts" not in name), LARGEST.get(name, 2**20)
            good = whole and least <= value <= most
            wanted = f"an integer from {least} to {most}"
        else:
            continue
        if not good:
            raise ValueError(f"config: {name}={value!r:.80} must be {wanted}")


def llm_fields(config: dict) -> dict:
    """{our field: value} from the config.json of a Llama, Mistral or Mixtral.

    ValueError for any other family, and for variants of them that llm.py does not compute.
    """
    family = str(config.get("model_type")).removeprefix("llava_")  # CuMo's own: llava_mistral
    if family not in LLM_DEFAULTS:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(LLM_DEFAULTS)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # new name, old name
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={rope!r:.80} must be an object")
    rope = {"rope_type": rope.get("type", "default")} | rope
    config = LLM_DEFAULTS[family] | config | rope  # newer files have rope_theta in rope_parameters
    for field, supported in ONLY.items():
        if config.get(field, supported) != supported:
            raise ValueError(f"{field}={config[field]!r} is not supported, only {supported!r}")
    heads = config["num_key_value_heads"] or config.get("num_attention_heads")
    return renamed(config | {"num_key_value_heads": heads}, LLM_NAMES)


def to_public_llm(fields: dict) -> dict:
    """LLMConfig's fields as a config.json with which transformers, too, loads the weights."""
    family = "Mixtral" if fields["num_experts"] else "Mistral"
    kind = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    dense = () if fields["num_experts"] else ("num_experts", "top_k")  # a Mistral has neither
    public = {LLM_NAMES[k]: v for k, v in fields.items() if k not in dense}
    return kind | {"hidden_act": "silu"} | public


def clip_fields(config: dict) -> dict:
    """{our field: value} from the config.json of a whole CLIP or of its vision tower."""
    config = config.get("vision_config", config)
    if not isinstance(config, dict) or not {"image_size", "patch_size"} <= config.keys():
        raise ValueError("this is no CLIP vision config: it has no image_size and patch_size, "
                         f"only {config!r:.99}")  # fmt: skip
    return renamed(VIT_B | config, CLIP_NAMES)  # missing fields are transformers' defaults


def to_public_clip(fields: dict) -> dict:
    """CLIPVisionConfig's fields as a config.json that transformers reads."""
    public = {name: fields[ours] for ours, name in CLIP_NAMES.items()}
    return {"model_type": "clip_vision_model", "num_channels": 3} | public


def cumo_fields(config: dict, path) -> tuple[dict, dict, dict]:
    """Fields of CLIPVisionConfig, of LLMConfig and of CuMoConfig itself from a CuMo's config.json,
    ours or the original's. ValueError if it names no vision tower."""
    experts, top_k = config.get("num_experts", 0), config.get("num_selected", 2)
    if "vision_config" in config:
        vision = clip_fields(config)
    elif isinstance(config.get("mm_vision_tower"), str):  # the original names its CLIP
        vision = clip_fields(read_config(local_folder(config["mm_vision_tower"], "config")))
        vision |= {"scales": config.get("scales") or (1,), "top_k": top_k,
                   "num_experts": experts if config.get("clip_smoe") else 0}  # fmt: skip
    else:
        raise ValueError(f"{path} is no CuMo but a language model without vision: its "
                         "config.json has no vision_config or mm_vision_tower")  # fmt: skip
    mlp_experts = config.get("nanocumo_mlp_experts", experts) if config.get("mlp_smoe") else 0
    return vision, llm_fields(config), {
        "mlp_experts": mlp_experts,
        "mlp_top_k": config.get("nanocumo_mlp_top_k", top_k),
        "balance_coef": config.get("balance_loss_coef", 0.1),
        "z_coef": config.get("router_z_loss_coef", 0.01),
        "template": config.get("nanocumo_template", "mistral_instruct_system"),
        "image_mode": config.get("image_aspect_ratio", "pad"),
    }  # fmt: skip


def to_public_cumo(fields: dict) -> dict:
    """CuMoConfig's fields as the original's config.json, completed by `vision_config`."""
    vision, llm = fields["vision"], fields["llm"]
    kind = "Mixtral" if llm["num_experts"] else "Mistral"
    return to_public_llm(llm) | {
        "model_type": f"llava_{kind.lower()}",
        "architectures": [f"Llava{kind}ForCausalLM"],
        "mlp_smoe": fields["mlp_experts"] > 0,
        "clip_smoe": vision["num_experts"] > 0,
        "num_experts": max(fields["mlp_experts"], vision["num_experts"]),
        "num_selected": fields["mlp_top_k"] if fields["mlp_experts"] else vision["top_k"],
        "balance_loss_coef": fields["balance_coef"],
        "router_z_loss_coef": fields["z_coef"],
        "scales": list(vision["scales"]),
        "mm_hidden_size": vision["dim"],
        "mm_projector_type": "smoe_mlp" if fields["mlp_experts"] else "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": fields["image_mode"],
        "nanocumo_template": fields["template"],
        "nanocumo_mlp_experts": fields["mlp_experts"],
        "nanocumo_mlp_top_k": fields["mlp_top_k"],
        "vision_config": to_public_clip(vision),
    }
