"""Names and shapes of the public weights at full size, on the meta device: nothing is loaded."""

import pytest
import torch

from clip_moe import CLIPVision, CLIPVisionConfig, is_unused
from cumo import CuMo, CuMoConfig
from data.weights import write_json
from llm import LLM, LLMConfig

transformers = pytest.importorskip("transformers")

CLIP_L = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
MISTRAL = dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    vocab_size=32000,
    max_position_embeddings=32768,
)
MIXTRAL = MISTRAL | dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6)
PUBLIC = {  # name -> (transformers' class, its public config.json, parameters)
    "Mistral-7B-Instruct-v0.1": ("Mistral", MISTRAL | dict(sliding_window=4096), 7_241_732_096),
    "Mistral-7B-Instruct-v0.2": (
        "Mistral",
        MISTRAL | dict(sliding_window=None, rope_theta=1e6),
        7_241_732_096,
    ),
    "Mistral-7B-Instruct-v0.3": (
        "Mistral",
        MISTRAL | dict(sliding_window=None, rope_theta=1e6, vocab_size=32768),
        7_248_023_552,
    ),
    "Mixtral-8x7B-Instruct-v0.1": ("Mixtral", MIXTRAL, 46_702_792_704),
    "TinyLlama-1.1B-Chat-v1.0": (
        "Llama",
        dict(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            rms_norm_eps=1e-5,
            vocab_size=32000,
        ),
        1_100_048_384,
    ),
    "SmolLM2-135M-Instruct": (
        "Llama",
        dict(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            vocab_size=49152,
            rope_theta=100000,
            tie_word_embeddings=True,
        ),
        134_515_008,
    ),
}


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def numbers(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def public_shapes(model):
    """Names and shapes in the files of a model that transformers knows.

    In memory it holds the experts of a Mixtral fused, gate and up in one; the files have each
    alone, as w1 (gate), w3 (up) and w2 (down).
    """
    table = {}
    tied = model.config.tie_word_embeddings
    for name, shape in shapes(model.state_dict()).items():
        block, fused, part = name.partition(".mlp.experts.")
        if fused:
            experts, out, into = shape
            halves = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[part]
            for e in range(experts):
                prefix = f"{block}.block_sparse_moe.experts.{e}"
                table |= {f"{prefix}.{w}.weight": (out // len(halves), into) for w in halves}
        elif not (tied and name == "lm_head.weight"):
            table[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = shape
    return table


@pytest.mark.parametrize("name", PUBLIC)
def test_language_models_have_the_public_names_and_shapes(name):
    family, config, count = PUBLIC[name]
    with torch.device("meta"):
        ours = LLM(LLMConfig.from_hf({"model_type": family.lower()} | config))
        config = getattr(transformers, family + "Config")(**config)
        theirs = getattr(transformers, family + "ForCausalLM")(config)
    table = shapes(ours.public_state_dict())
    assert table == public_shapes(theirs)
    assert numbers(table) == count == sum(p.numel() for p in ours.parameters())


def test_mixtral_has_the_names_of_its_public_files():
    """What is above made from transformers' fused names, here spelled out."""
    with torch.device("meta"):
        llm = LLM(LLMConfig.from_hf({"model_type": "mixtral"} | MIXTRAL))
    table = shapes(llm.public_state_dict())
    layer = {
        "input_layernorm.weight": (4096,),
        "post_attention_layernorm.weight": (4096,),
        "self_attn.q_proj.weight": (4096, 4096),
        "self_attn.k_proj.weight": (1024, 4096),
        "self_attn.v_proj.weight": (1024, 4096),
        "self_attn.o_proj.weight": (4096, 4096),
        "block_sparse_moe.gate.weight": (8, 4096),
    }
    for e in range(8):
        expert = f"block_sparse_moe.experts.{e}."
        layer |= {expert + "w1.weight": (14336, 4096), expert + "w3.weight": (14336, 4096)}
        layer |= {expert + "w2.weight": (4096, 14336)}
    wanted = {f"model.layers.{i}.{name}": s for i in range(32) for name, s in layer.items()}
    wanted |= {name: (32000, 4096) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    assert table == wanted | {"model.norm.weight": (4096,)}


def test_clip_l_has_the_public_names_and_shapes():
    with torch.device("meta"):
        ours = CLIPVision(CLIPVisionConfig.from_hf(CLIP_L))
        theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP_L))
    bare = {
        name.removeprefix("vision_model."): s for name, s in shapes(theirs.state_dict()).items()
    }
    wanted = {"vision_model." + name: shape for name, shape in bare.items()}
    table = shapes(ours.public_state_dict())
    assert table == {name: shape for name, shape in wanted.items() if not is_unused(name)}
    assert numbers(table) == 303_505_408


def released(tmp_path, llm, **changes):
    """The released CuMo of that language model, without its weights, from its config.json."""
    write_json(tmp_path / "clip" / "config.json", {"vision_config": CLIP_L})
    config = llm | dict(
        mm_vision_tower=str(tmp_path / "clip"),
        mlp_smoe=True,
        clip_smoe=True,
        num_experts=4,
        num_selected=2,
        scales=[1, 3],
        mm_hidden_size=1024,
        balance_loss_coef=0.1,
        router_z_loss_coef=0.01,
        image_aspect_ratio="pad",
    )
    with torch.device("meta"):
        return CuMo(CuMoConfig.from_original(config | changes, "the released CuMo"))


def test_cumo_7b_has_the_released_names_shapes_and_size(tmp_path):
    mistral = MISTRAL | dict(model_type="llava_mistral", rope_theta=1e6, sliding_window=None)
    model = released(tmp_path, mistral)
    table = shapes(model.public_state_dict())
    assert numbers(table) == 8_250_388_480 == sum(p.numel() for p in model.parameters())
    parts = [
        {name: shape for name, shape in table.items() if name.startswith(prefix)}
        for prefix in ("model.vision_tower.", "model.mm_projector.")
    ]
    assert [len(part) for part in (table, *parts)] == [1009, 701, 17]
    assert [numbers(part) for part in parts] == [907_952_128, 100_704_256]
    wanted = {"model.mm_projector.gate.weight": (4, 2048)}
    for e in range(4):
        expert = f"model.mm_projector.experts.{e}."
        wanted |= {expert + "0.weight": (4096, 2048), expert + "0.bias": (4096,)}
        wanted |= {expert + "2.weight": (4096, 4096), expert + "2.bias": (4096,)}
    assert parts[1] == wanted
    tower = "model.vision_tower.vision_model."
    wanted = {
        tower + "embeddings.class_embedding": (1024,),
        tower + "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        tower + "embeddings.position_embedding.weight": (577, 1024),
        tower + "pre_layrnorm.weight": (1024,),
        tower + "pre_layrnorm.bias": (1024,),
    }
    for layer in (f"{tower}encoder.layers.{i}." for i in range(24)):
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            wanted |= {f"{layer}self_attn.{name}.weight": (1024, 1024)}
            wanted |= {f"{layer}self_attn.{name}.bias": (1024,)}
        for name in ("layer_norm1", "layer_norm2"):
            wanted |= {f"{layer}{name}.weight": (1024,), f"{layer}{name}.bias": (1024,)}
        wanted |= {layer + "gate.weight": (4, 1024)}
        for expert in (f"{layer}experts.{e}." for e in range(4)):
            wanted |= {expert + "fc1.weight": (4096, 1024), expert + "fc1.bias": (4096,)}
            wanted |= {expert + "fc2.weight": (1024, 4096), expert + "fc2.bias": (1024,)}
    assert parts[0] == wanted


def test_dense_cumo_and_cumo_8x7b_have_the_papers_sizes(tmp_path):
    mistral = MISTRAL | dict(model_type="llava_mistral", sliding_window=None)
    dense = released(tmp_path, mistral, mlp_smoe=False, clip_smoe=False)
    assert sum(p.numel() for p in dense.parameters()) == 7_241_732_096 + 303_505_408 + 25_174_016
    large = released(tmp_path, MIXTRAL | dict(model_type="llava_mixtral"))
    assert sum(p.numel() for p in large.parameters()) == 47_711_449_088
    assert sum(view.numel() for view in large.public_state_dict().values()) == 47_711_449_088
