"""CLIP's vision tower: against transformers, against itself dense, tile by tile, and on disk."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clip_moe import CLIPVision, CLIPVisionConfig, cut_tiles, merge_tiles
from data import configs
from data.images import MEAN, STD, preprocess
from data.weights import write_json, write_tensors

TINY = CLIPVisionConfig(image_size=16, patch_size=4, dim=16, hidden_dim=32, n_layers=3, n_heads=2)
SPARSE = replace(TINY, num_experts=4, top_k=2)


def build(cfg, seed=0):
    torch.manual_seed(seed)
    return CLIPVision(cfg)


def hf_twin(cfg, seed=0):
    """transformers' CLIP tower of this size, with weights that leave nothing near zero."""
    transformers = pytest.importorskip("transformers")

    hf = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**cfg.to_hf())).eval()
    torch.manual_seed(seed)
    for p in hf.parameters():
        p.data = torch.randn_like(p) * p.shape[-1] ** -0.5
    return hf


def save(path, vision):
    write_json(path / "config.json", vision.cfg.to_hf())
    write_tensors(path, vision.public_state_dict())


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_dense_tower_equals_transformers(act, tmp_path):
    hf = hf_twin(replace(TINY, act=act))
    hf.save_pretrained(tmp_path)
    vision = CLIPVision.from_pretrained(tmp_path)
    images = torch.randn(3, 3, 16, 16)
    states = hf(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(vision(images)[0], states[-2][:, 1:], rtol=1e-5, atol=1e-5)
    for layers, state in enumerate(states):
        torch.testing.assert_close(vision.hidden(images, layers)[0], state, rtol=1e-5, atol=1e-5)


def test_a_whole_clip_loads_without_its_text_half(tmp_path):
    transformers = pytest.importorskip("transformers")

    config = transformers.CLIPConfig(
        vision_config=TINY.to_hf(),
        projection_dim=8,
        text_config=dict(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=20,
            bos_token_id=0,
            eos_token_id=1,
        ),
    )
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    expected = clip.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(
        CLIPVision.from_pretrained(tmp_path)(images)[0], expected, rtol=1e-5, atol=1e-5
    )


def test_transformers_loads_what_we_save(tmp_path):
    transformers = pytest.importorskip("transformers")

    vision, images = build(TINY), torch.randn(2, 3, 16, 16)
    save(tmp_path, vision)
    hf = transformers.CLIPVisionModel.from_pretrained(tmp_path).eval()
    states = hf(images, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-2][:, 1:], vision(images)[0], rtol=1e-5, atol=1e-5)


def test_old_pickled_checkpoint_with_position_ids_loads(tmp_path):
    vision, images = build(TINY), torch.randn(2, 3, 16, 16)
    old = {name: view.clone() for name, view in vision.public_state_dict().items()}
    old["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    old["vision_model.post_layernorm.weight"] = torch.ones(16)
    old |= {"logit_scale": torch.tensor(1.0), "text_model.final_layer_norm.bias": torch.ones(3)}
    torch.save(old, tmp_path / "pytorch_model.bin")
    write_json(tmp_path / "config.json", {"model_type": "clip", "vision_config": TINY.to_hf()})
    assert torch.equal(CLIPVision.from_pretrained(tmp_path)(images)[0], vision(images)[0])
    assert CLIPVision.from_pretrained(tmp_path, scales=(1, 3)).cfg == replace(TINY, scales=(1, 3))


@pytest.mark.parametrize(
    "cfg", [TINY, SPARSE, replace(SPARSE, scales=(1, 2))], ids=["dense", "sparse", "two scales"]
)
def test_saved_and_loaded_is_the_same_tower(cfg, tmp_path):
    vision, images = build(cfg), torch.randn(2, 3, 16, 16)
    save(tmp_path, vision)
    again = CLIPVision.from_pretrained(tmp_path)
    assert again.cfg == cfg and torch.equal(again(images)[0], vision(images)[0])
    low = CLIPVision.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low(images)[0].dtype == torch.bfloat16
    assert CLIPVision.from_pretrained(tmp_path, scales=(1, 3)).cfg.scales == (1, 3)


def test_sparse_names_on_disk_are_the_originals():
    names = build(SPARSE).public_state_dict()
    layer = "vision_model.encoder.layers.2."
    assert names[layer + "gate.weight"].shape == (4, 16)
    assert names[layer + "experts.3.fc1.weight"].shape == (32, 16)
    assert names[layer + "experts.3.fc2.bias"].shape == (16,)
    assert not any("moe" in name or "mlp" in name for name in names)
    parameters = sum(p.numel() for p in build(SPARSE).parameters())
    assert sum(view.numel() for view in names.values()) == parameters


def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        dense, sparse = (CLIPVision(CLIPVisionConfig(num_experts=e)) for e in (0, 4))
    count = [sum(p.numel() for p in vision.parameters()) for vision in (dense, sparse)]
    assert count == [303_505_408, 907_952_128]


def test_loading_names_every_missing_unexpected_and_misshapen_weight(tmp_path):
    vision = build(TINY)
    save(tmp_path, vision)
    state = load_file(tmp_path / "model.safetensors")
    state["vision_model.encoder.layers.1.self_attn.q_prj.bias"] = state.pop(
        "vision_model.encoder.layers.1.self_attn.q_proj.bias"
    )
    state["vision_model.pre_layrnorm.weight"] = torch.ones(9)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"missing: \S+q_proj.bias; unexpected: \S+q_prj.bias; "
        r"wrong shape: \S+pre_layrnorm.weight is \[9\] ",
    ):
        CLIPVision.from_pretrained(tmp_path)


def test_identical_experts_equal_the_dense_tower():
    cfg = replace(TINY, scales=(1, 2))
    dense, sparse = build(cfg), build(replace(cfg, num_experts=4))
    images = torch.randn(2, 3, 16, 16)
    state = dense.public_state_dict()
    for name, view in sparse.public_state_dict().items():
        before, expert, after = name.partition(".experts.")
        if not name.endswith("gate.weight"):
            view.copy_(state[f"{before}.mlp.{after[2:]}" if expert else name])
    torch.testing.assert_close(sparse(images)[0], dense(images)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 3), (1, 2, 3), (2, 3)], ids=str)
def test_multi_scale_equals_tile_by_tile_reference(scales):
    vision, images = build(replace(TINY, scales=scales)), torch.randn(2, 3, 16, 16)
    features, aux = vision(images)
    expected = reference.multi_scale(lambda tile: vision.hidden(tile)[0][:, 1:], images, scales)
    assert features.shape == (2, 16, 16 * len(scales)) and aux is None
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_merging_undoes_cutting():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float()
    tiles = cut_tiles(images, 3)
    assert tiles.shape == (18, 3, 8, 8)
    merged = merge_tiles(tiles.flatten(2).transpose(1, 2), 3)  # every pixel a patch
    big = torch.nn.functional.interpolate(images, scale_factor=3, mode="bicubic")
    pooled = torch.nn.functional.avg_pool2d(big, 3)
    torch.testing.assert_close(merged.transpose(1, 2).view_as(images), pooled, rtol=1e-4, atol=1e-3)


def test_batch_equals_one_by_one():
    vision, images = build(replace(SPARSE, scales=(1, 3))), torch.randn(3, 3, 16, 16)
    together, aux = vision(images)
    alone = [vision(image[None]) for image in images]
    torch.testing.assert_close(together, torch.cat([x for x, _ in alone]), rtol=1e-5, atol=1e-5)
    for name in ("balance", "z", "load"):  # samples weigh the same, so the losses are means too
        mean = torch.stack([getattr(a, name) for _, a in alone]).mean(0)
        torch.testing.assert_close(getattr(aux, name), mean, rtol=1e-5, atol=1e-5)


def test_losses_are_means_over_layers_then_scales():
    vision, images = build(replace(SPARSE, scales=(1, 2))), torch.randn(2, 3, 16, 16)
    aux = vision(images)[1]
    by_scale = [vision.hidden(cut_tiles(images, scale))[1] for scale in (1, 2)]
    assert [len(layers) for layers in by_scale] == [2, 2] and aux.load.shape == (2, 4)
    for name in ("balance", "z"):
        expected = sum(sum(getattr(a, name) for a in layers) / 2 for layers in by_scale) / 2
        torch.testing.assert_close(getattr(aux, name), expected)
    torch.testing.assert_close(aux.load[1], (by_scale[0][1].load + by_scale[1][1].load) / 2)
    assert torch.equal(aux.choice[0], by_scale[0][0].choice) and aux.choice.shape == (2, 2, 17, 2)


def test_last_layer_is_computed_only_for_parity():
    vision, images = build(SPARSE), torch.randn(2, 3, 16, 16)
    features, aux = vision(images)
    (features.sum() + aux.balance + aux.z).backward()
    assert all(p.grad is None for p in vision.layers[-1].parameters())
    assert all(p.grad is not None for p in vision.layers[-2].parameters())
    vision.parity = True
    same, aux = vision(images)
    assert torch.equal(features, same) and aux.load.shape == (3, 4)
    (aux.balance + aux.z).backward()
    assert vision.layers[-1].moe.gate.weight.grad.abs().max() > 0
    assert vision.layers[-1].moe.experts.w1.grad is None


@pytest.mark.parametrize("cfg", [TINY, SPARSE], ids=["dense", "sparse"])
def test_checkpointing_changes_no_gradient(cfg):
    vision, images = build(cfg), torch.randn(2, 3, 16, 16)
    grads = []
    for vision.recompute in (0, 1, 9):
        vision.zero_grad()
        vision(images)[0].square().sum().backward()
        grads.append([p.grad for p in vision.parameters()])
    for some in grads[1:]:
        torch.testing.assert_close(some, grads[0])


def test_bfloat16_autocast_is_close_to_float32():
    vision, images = build(replace(TINY, scales=(1, 2))), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        low = vision(images)[0]
    exact = vision(images)[0]
    assert (low - exact).abs().max() < 0.03 * exact.abs().max()


def test_compiles_whole_and_once_for_all_images():
    vision = build(replace(SPARSE, n_layers=2))
    torch._dynamo.reset()
    fast = torch.compile(vision, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            images = torch.randn(2, 3, 16, 16)
            features, aux = fast(images)
            (features.float().sum() + aux.balance).backward()
            torch.testing.assert_close(features, vision(images)[0])


def test_config_round_trips_through_json():
    cfg = replace(SPARSE, scales=(1, 3), act="gelu", layer_norm_eps=1e-6)
    assert CLIPVisionConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg
    assert CLIPVisionConfig.from_hf({"vision_config": cfg.to_hf(), "text_config": {}}) == cfg


def test_public_config_without_sizes_is_vit_b():
    """openai/clip-vit-base-patch32 leaves out what equals transformers' defaults."""
    cfg = CLIPVisionConfig.from_hf({"image_size": 224, "patch_size": 32})
    assert (cfg.dim, cfg.hidden_dim, cfg.n_layers, cfg.n_heads) == (768, 3072, 12, 12)


SIZES = dict(
    hidden_size=1024,
    num_attention_heads=16,
    intermediate_size=4096,
    num_hidden_layers=24,
    patch_size=14,
)


@pytest.mark.parametrize("config", [
    {"model_type": "clip", "vision_config": {"model_type": "clip_vision_model"}},
    {"model_type": "clip", "vision_config": {"hidden_size": 1200, "patch_size": 14}},
    {"model_type": "clip", "vision_config": {}, "vision_config_dict": SIZES},
    {"model_type": "clip", "vision_config": SIZES | {"image_size": 336},
     "vision_config_dict": SIZES | {"hidden_act": "gelu"}},
    {"model_type": "clip_vision_model", "num_hidden_layers": 3},
])  # fmt: skip
def test_a_silent_config_means_what_transformers_takes_it_for(config):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**config)
    theirs = getattr(theirs, "vision_config", theirs)
    ours = configs.clip_fields(config)
    for name, public in configs.CLIP_NAMES.items():
        if public not in ("scales", "num_experts", "num_selected"):
            wanted = getattr(theirs, public)
            default = CLIPVisionConfig.__dataclass_fields__[name].default
            assert ours.get(name, default) == wanted, name


LAION = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "size": 16,
         "crop_size": {"height": 16, "width": 16}, "resample": 3, "do_resize": True}  # fmt: skip


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("processor", [LAION, {"do_normalize": False}, {}], ids=str)
@torch.no_grad()
def test_a_clip_with_another_mean_and_std_gets_pixels_that_are_right_for_it(
    processor, dtype, tolerance, tmp_path
):
    theirs = hf_twin(TINY)
    theirs.save_pretrained(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None] / 255
    usual = dict(image_mean=MEAN.tolist(), image_std=STD.tolist(), do_normalize=True) | processor
    mean, std = (torch.tensor(usual[f"image_{x}"]).view(3, 1, 1) for x in ("mean", "std"))
    given = (pixels - mean) / std if usual["do_normalize"] else pixels
    wanted = theirs(given.float(), output_hidden_states=True).hidden_states[-2][:, 1:]
    ours = CLIPVision.from_pretrained(tmp_path, dtype=dtype)
    features, _ = ours(preprocess(picture, 16)[None].to(dtype))
    torch.testing.assert_close(features.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("change, words", [
    ({"resample": 2}, "resample=2 is not supported, only 3"),
    ({"size": {"shortest_edge": 224}}, "size={'shortest_edge': 224}"),
    ({"size": {"height": 16, "width": 16}}, "size={'height': 16"),
    ({"crop_size": 20}, "crop_size=20"),
    ({"do_center_crop": False}, "do_center_crop=False"),
    ({"rescale_factor": 0.5}, "rescale_factor=0.5"),
    ({"image_mean": [0.5]}, "must be 3 numbers"),
    ({"image_std": [0.5, 0, 1]}, "must be 3 numbers"),
])  # fmt: skip
def test_another_way_to_make_pixels_is_refused_by_name(change, words, tmp_path):
    save(tmp_path, build(TINY))
    write_json(tmp_path / "preprocessor_config.json", LAION | change)
    with pytest.raises(ValueError, match="preprocessor_config.json: .*" + re.escape(words)):
        CLIPVision.from_pretrained(tmp_path)


@pytest.mark.parametrize("config, words", [
    ({"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}, "siglip_vision"),
    ({"model_type": "siglip", "vision_config": {"image_size": 384, "patch_size": 14,
                                               "model_type": "siglip_vision_model"}}, "siglip_vis"),
    ({"model_type": "mistral", "vision_config": 7}, "no CLIP vision config"),
    ({"model_type": "clip_vision_model", "num_channels": 1}, "num_channels=1 is not supported"),
    ({"model_type": "clip", "quantization_config": {"quant_method": "gptq"}}, "quantised .*gptq"),
])  # fmt: skip
def test_other_encoders_are_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words) as error:
        CLIPVisionConfig.from_hf(config)
    assert "{" not in str(error.value) and len(str(error.value)) < 250  # not the whole config


@pytest.mark.parametrize("scales", [(), (1, 1.5), (0,)], ids=str)
def test_impossible_scales_are_refused(scales):
    with pytest.raises(ValueError, match=r"scales=.*such as \(1, 3\)"):
        replace(TINY, scales=scales)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 20, 20\].*takes \[n, 3, 16, 16\]"):
        build(TINY)(torch.randn(1, 3, 20, 20))


def test_a_language_models_config_is_refused():
    with pytest.raises(ValueError, match="no CLIP vision config"):
        CLIPVisionConfig.from_hf({"hidden_size": 4096})
