"""config.json of public language models: which names, defaults and variants they have.

Llama, Mistral and Mixtral share one architecture and one set of names. A field that is missing in a
file has the default of its family, so the same silence can mean different models. Variants that
llm.py does not compute are refused by name: loaded anyway, they would answer nonsense.
"""

NAMES = {  # our name of a field -> its public name
    "vocab_size": "vocab_size", "dim": "hidden_size", "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "max_positions": "max_position_embeddings",
    "sliding_window": "sliding_window", "tie_embeddings": "tie_word_embeddings",
    "num_experts": "num_local_experts", "top_k": "num_experts_per_tok"}  # fmt: skip
DEFAULTS = {  # model_type -> the defaults of transformers where they are not LLMConfig's
    "llama": {"rms_norm_eps": 1e-6, "num_key_value_heads": None},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"rope_theta": 1e6, "num_key_value_heads": 8, "num_local_experts": 8},
}
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default"}


def complete(config: dict) -> dict:
    """The config.json of a Llama, Mistral or Mixtral with its family's defaults filled in.

    ValueError for any other family, and for variants of them that llm.py does not compute.
    """
    family = str(config.get("model_type")).removeprefix("llava_")  # CuMo's own: llava_mistral
    if family not in DEFAULTS:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(DEFAULTS)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # new name, old name
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={rope!r:.80} must be an object")
    rope = {"rope_type": rope.get("type", "default")} | rope
    config = DEFAULTS[family] | config | rope  # newer files have rope_theta in rope_parameters
    for field, supported in ONLY.items():
        if config.get(field, supported) != supported:
            raise ValueError(f"{field}={config[field]!r} is not supported, only {supported!r}")
    heads = config["num_key_value_heads"] or config.get("num_attention_heads")
    return config | {"num_key_value_heads": heads}


def to_public(fields: dict) -> dict:
    """LLMConfig's fields as a config.json with which transformers, too, loads the weights."""
    family = "Mixtral" if fields["num_experts"] else "Mistral"
    kind = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    dense = () if fields["num_experts"] else ("num_experts", "top_k")  # a Mistral has neither
    public = {NAMES[k]: v for k, v in fields.items() if k not in dense}
    return kind | {"hidden_act": "silu"} | public
