"""config.json of public models: which names, defaults and variants they have.

Llama, Mistral and Mixtral share one architecture and one set of names. A field that is missing in a
file has the default of its family, so the same silence can mean different models. Variants that
clip_moe.py and llm.py do not compute are refused by name: loaded anyway, they would answer
nonsense.
"""

import dataclasses
import math

import torch

from data.hub import local_folder
from data.images import MEAN, STD
from data.layouts import cumo_config
from data.weights import read_config

LLM_NAMES = {  # our name of a field -> its public name
    "vocab_size": "vocab_size", "dim": "hidden_size", "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "rope_scaling": "rope_scaling",
    "max_positions": "max_position_embeddings", "sliding_window": "sliding_window",
    "tie_embeddings": "tie_word_embeddings",
    "num_experts": "num_local_experts", "top_k": "num_experts_per_tok",
    "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id"}  # fmt: skip
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
CLIP_DEFAULTS = VIT_B | {"image_size": 224, "patch_size": 32}
# field -> the values that we compute; a field that is missing has the first
LLM_ONLY = {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
            "rope_type": ["default", "linear", "llama3"], "partial_rotary_factor": [1]}  # fmt: skip
CUMO_ONLY = {"mm_vision_select_layer": [-2], "mm_vision_select_feature": ["patch"],
             "mm_use_im_start_end": [False], "mm_patch_merge_type": ["flat"],
             "mm_resampler_type": [None], "mm_projector_type": ["smoe_mlp", "mlp2x_gelu"],
             "image_aspect_ratio": ["pad", "square"], "vision_feature_layer": [-2],
             "vision_feature_select_strategy": ["default"], "projector_hidden_act": ["gelu"],
             "multimodal_projector_bias": [True]}  # fmt: skip
CUMO_KINDS = ("llava_mistral", "llava_mixtral", "llava_llama")
SCALED = {  # rope_type -> what its rescaling needs, all positive numbers
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
}  # fmt: skip

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
            good, wanted = good and 0 <= value <= 1e18, "a number from 0 to 1e18"
        elif field.type is int or field.type == int | None and value is not None:
            may_be_0 = "experts" in name or name == "bos_token_id"
            least, most = int(not may_be_0), LARGEST.get(name, 2**20)
            good = whole and least <= value <= most
            wanted = f"an integer from {least} to {most}"
        else:
            continue
        if not good:
            raise ValueError(f"config: {name}={value!r:.80} must be {wanted}")


def check_supported(config: dict, only: dict, file: str = "config.json") -> None:
    """ValueError, with what is supported, for a field with another value than those in `only`."""
    for field, values in only.items():
        if config.get(field, values[0]) not in values:
            raise ValueError(f"{file}: {field}={config[field]!r:.80} is not supported, only "
                             f"{' and '.join(map(repr, values))}")  # fmt: skip


def check_whole(config: dict) -> None:
    """ValueError if the weights are quantised: they have other names, and scales."""
    quantised = config.get("quantization_config")
    if quantised:
        kind = quantised.get("quant_method", "?") if isinstance(quantised, dict) else quantised
        raise ValueError("config.json: the weights are quantised (quantization_config: "
                         f"{kind!s:.40}), only float32, float16 and bfloat16 are read; take the "
                         "model that they were made from; --quant int8 makes it small")  # fmt: skip


def llm_fields(config: dict) -> dict:
    """{our field: value} from the config.json of a Llama, Mistral or Mixtral.

    ValueError for any other family, and for variants of them that llm.py does not compute.
    """
    family = str(config.get("model_type")).removeprefix("llava_")  # CuMo's own: llava_mistral
    if family not in LLM_DEFAULTS:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(LLM_DEFAULTS)}")
    check_whole(config)
    # The new and the old name. As in transformers, the old one decides if both are there.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={rope!r:.80} must be an object")
    rope = {"rope_type": rope.get("type", "default")} | rope
    config = LLM_DEFAULTS[family] | config | rope  # newer files have rope_theta in rope_parameters
    check_supported(config, LLM_ONLY)
    heads = config["num_key_value_heads"] or config.get("num_attention_heads")
    return renamed(config | {"num_key_value_heads": heads, "rope_scaling": scaling_of(rope),
                             "sliding_window": window_of(config, family)}, LLM_NAMES)  # fmt: skip


def scaling_of(rope: dict) -> dict | None:
    """What `rescaled` needs; None: nothing is rescaled. ValueError for missing numbers."""
    kind, numbers = rope["rope_type"], {}
    for name in SCALED.get(kind, ()):
        value = numbers[name] = rope.get(name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"config.json: rope_type {kind!r} needs a positive {name}, not "
                             f"{value!r:.40}")  # fmt: skip
    return {"rope_type": kind} | numbers if numbers else None


def window_of(config: dict, family: str) -> int | None:
    """The sliding window of all layers; None: they see everything. As in transformers, a Llama has
    none. ValueError where some layers have a window and others not (Ministral)."""
    kinds = config.get("layer_types") or ["sliding_attention"]
    kinds = {*map(str, kinds)} if isinstance(kinds, list) else {str(kinds)}
    if family == "llama" or kinds == {"full_attention"} or not config.get("sliding_window"):
        return None
    if kinds != {"sliding_attention"}:
        raise ValueError(f"config.json: layer_types has {' and '.join(sorted(kinds))}; supported "
                         "is one window for all layers, or none")  # fmt: skip
    return config["sliding_window"]


def rescaled(frequency: torch.Tensor, scaling: dict) -> torch.Tensor:
    """RoPE's frequencies for contexts longer than those of pretraining.

    linear: slow all pairs down by `factor`. llama3 (Llama 3.1 and later): slow down only the pairs
    that turn less than `low_freq_factor` times in the old context, those that turn more than
    `high_freq_factor` times stay, and between the two the change is gradual.
    """
    slow = frequency / scaling["factor"]
    if scaling["rope_type"] == "linear":
        return slow
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * slow + kept * frequency


def to_public_llm(fields: dict) -> dict:
    """LLMConfig's fields as a config.json with which transformers, too, loads the weights."""
    family = "Mixtral" if fields["num_experts"] else "Mistral"
    kind = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    absent = () if fields["num_experts"] else ("num_experts", "top_k")  # a Mistral has neither
    absent += () if fields["rope_scaling"] else ("rope_scaling",)
    public = {LLM_NAMES[k]: v for k, v in fields.items() if k not in absent}
    return kind | {"hidden_act": "silu"} | public


def clip_fields(config: dict) -> dict:
    """{our field: value} from the config.json of a whole CLIP or of its vision tower.

    ValueError for any other encoder. A field that is missing has transformers' default.
    """
    vision = config.get("vision_config", config)
    kind = vision.get("model_type", "") if isinstance(vision, dict) else "?"
    sizes = isinstance(vision, dict) and {"image_size", "patch_size"} <= vision.keys()
    if not (kind in ("clip", "clip_vision_model") or config.get("model_type") == "clip"
            or not kind and sizes):  # fmt: skip
        what = f"model_type {kind!r:.40}" if kind else "no image_size and patch_size"
        raise ValueError(f"this is no CLIP vision config: it has {what}; only CLIP's encoders are "
                         "supported, such as openai/clip-vit-large-patch14-336")  # fmt: skip
    vision = config.get("vision_config_dict") or vision  # as in transformers, this one decides
    check_whole(config)
    check_supported(vision, {"num_channels": [3]})
    return renamed(CLIP_DEFAULTS | vision, CLIP_NAMES)


def to_public_clip(fields: dict) -> dict:
    """CLIPVisionConfig's fields as a config.json that transformers reads."""
    public = {name: fields[ours] for ours, name in CLIP_NAMES.items()}
    return {"model_type": "clip_vision_model", "num_channels": 3} | public


PROCESSOR = {  # how data/images.py makes pixels, in the words of preprocessor_config.json
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True,
    "do_convert_rgb": True, "resample": 3, "rescale_factor": 1 / 255,
    "image_mean": MEAN.tolist(), "image_std": STD.tolist()}  # fmt: skip


def to_public_processor(size: int) -> dict:
    """The preprocessor_config.json of our pixels for pictures of this size."""
    kind = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}}
    return PROCESSOR | kind | {"crop_size": {"height": size, "width": size}}


def pixel_statistics(folder, size: int) -> tuple[list, list]:
    """The mean and std of pixels [3] that the CLIP in `folder` has learned from.

    ValueError if its preprocessor_config.json makes pixels in another way than data/images.py does.
    """
    config = read_config(folder, "preprocessor_config.json", {})
    sizes = {"size": [size, {"shortest_edge": size}],
             "crop_size": [size, {"height": size, "width": size}]}  # fmt: skip
    fixed = {field: [value] for field, value in PROCESSOR.items() if "image_" not in field}
    fixed |= sizes | {"do_normalize": [True, False], "do_convert_rgb": [True, False]}
    check_supported(config, fixed, "preprocessor_config.json")
    if not config.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    found = [config.get(field, PROCESSOR[field]) for field in ("image_mean", "image_std")]
    for field, value in zip(("image_mean", "image_std"), found):
        if not (isinstance(value, list) and len(value) == 3
                and all(type(x) in (int, float) and 0 <= x < 1e3 for x in value)
                and (field == "image_mean" or min(value) > 0)):  # fmt: skip
            raise ValueError(f"preprocessor_config.json: {field}={value!r:.80} must be 3 numbers")
    return found


def cumo_fields(config: dict, path) -> tuple[dict, dict, dict]:
    """Fields of CLIPVisionConfig, of LLMConfig and of CuMoConfig itself from a CuMo's config.json,
    ours, the original's or a LLaVA's. ValueError if it names no vision tower, or for what we do
    not do."""
    config = cumo_config(config)
    experts, top_k = config.get("num_experts", 0), config.get("num_selected", 2)
    vision = {"scales": config.get("scales") or (1,), "top_k": top_k,
              "num_experts": experts if config.get("clip_smoe") else 0}  # fmt: skip
    if "vision_config" in config:  # whatever it says comes first
        vision |= clip_fields(config)
    elif isinstance(config.get("mm_vision_tower"), str):  # the original names its CLIP
        tower = read_config(local_folder(config["mm_vision_tower"], "config"))
        vision = clip_fields(tower) | vision
    else:
        raise ValueError(f"{path} is no CuMo but a language model without vision: its "
                         "config.json has no vision_config or mm_vision_tower")  # fmt: skip
    if config.get("model_type", "llava_mistral") not in CUMO_KINDS:
        raise ValueError(f"config.json: model_type={config['model_type']!r:.40} is not supported, "
                         f"only {', '.join(CUMO_KINDS)}, and llava; of others take CLIP and the "
                         "language model: --clip, --llm")  # fmt: skip
    if config.get("image_aspect_ratio") == "anyres":
        raise ValueError("config.json: image_aspect_ratio='anyres' is not supported, only 'pad' "
                         "and 'square'; to use one tile a picture, write 'pad' there, and 'flat' "
                         "as mm_patch_merge_type")  # fmt: skip
    check_supported(config, CUMO_ONLY)
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


def public_files(fields: dict) -> dict[str, dict]:
    """{name: content} of the JSON files of a checkpoint, from CuMoConfig's fields."""
    config = to_public_cumo(fields)
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    pixels = to_public_processor(fields["vision"]["image_size"])
    return {"config.json": config, "preprocessor_config.json": pixels,
            "generation_config.json": {"_from_model_config": True} | ends}  # fmt: skip
