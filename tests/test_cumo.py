"""The assembled model: splice, losses, packing, checkpoints, generation."""

import json

import pytest
import torch
from tiny import question, tiny_cumo

from clip_moe import CLIPVision
from cumo import IGNORE, CuMo
from data.packing import assemble
from data.weights import read_config, read_tensors, write_json, write_tensors
from upcycle import upcycle

IMAGES = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def samples():
    """Three conversations with 1, 0 and 2 images: [(ids, labels, images)]."""
    a, b, c = (
        question(1, 5, "i", 7, 8, 9, 2),
        [1, 11, 12, 13, 14, 2],
        question(1, "i", 6, "i", 3, 4, 2),
    )
    learn = lambda ids, k: [IGNORE] * (len(ids) - k) + ids[-k:]
    return [
        (a, learn(a, 3), [IMAGES[0]]),
        (b, learn(b, 2), []),
        (c, learn(c, 3), [IMAGES[1], IMAGES[2]]),
    ]


def run(model, batch):
    return model(
        batch["tokens"],
        batch["images"] if len(batch["images"]) else None,
        batch["labels"],
        batch["segments"],
    )


@pytest.mark.parametrize("experts", [0, 4])
def test_packed_equals_unpacked(experts):
    model = tiny_cumo(experts).eval()
    packed = run(model, assemble([samples()[:2], samples()[2:]], 48))
    row = {0: (0, 0), 1: (0, len(samples()[0][0])), 2: (1, 0)}
    for i, sample in enumerate(samples()):
        alone = run(model, assemble([[sample]], len(sample[0])))
        r, start = row[i]
        there = packed.logits[r, start : start + len(sample[0])]
        torch.testing.assert_close(there, alone.logits[0], rtol=1e-4, atol=1e-5)


def test_packed_loss_is_the_mean_over_all_learned_tokens():
    model = tiny_cumo().eval()
    packed = run(model, assemble([samples()], 64))
    total, count = 0.0, 0
    for ids, labels, images in samples():
        alone = run(model, assemble([[(ids, labels, images)]], len(ids)))
        learned = sum(label != IGNORE for label in labels[1:])
        total, count = total + alone.lm_loss * learned, count + learned
    torch.testing.assert_close(packed.lm_loss, total / count)


def test_images_go_to_their_places_in_reading_order():
    model = tiny_cumo().eval()
    batch = assemble([[samples()[0]], [samples()[2]]], 24)
    x, _ = model.splice(batch["tokens"], batch["images"])
    features = model.encode_images(batch["images"])
    torch.testing.assert_close(x[0, 2:11], features[0])
    torch.testing.assert_close(x[1, 1:10], features[1])
    torch.testing.assert_close(x[1, 11:20], features[2])


def test_batch_equals_one_by_one():
    model = tiny_cumo(experts=4).eval()
    both = model.encode_images(IMAGES)
    each = torch.cat([model.encode_images(image[None]) for image in IMAGES])
    torch.testing.assert_close(both, each, rtol=1e-5, atol=1e-6)


def test_total_loss_adds_the_weighted_router_losses():
    model = tiny_cumo(experts=4, llm_experts=4)
    out = run(model, assemble([samples()], 64))
    expected = out.lm_loss
    for balance, z in out.aux.values():
        expected = expected + 0.1 * balance + 0.01 * z
    torch.testing.assert_close(out.loss, expected)
    assert out.logits is None, "training computes the loss in chunks"


def test_dense_parts_have_no_router_losses():
    out = run(tiny_cumo(), assemble([samples()], 64))
    assert out.aux == {"clip": None, "mlp": None, "llm": None} and out.loss == out.lm_loss


def test_gradients_reach_every_trained_part():
    model = tiny_cumo(experts=4)
    run(model, assemble([samples()], 64)).loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    # the last layer of CLIP feeds nothing: features are taken one layer earlier
    assert idle and all(name.startswith("vision.layers.2.") for name in idle)


@pytest.mark.parametrize("images", [None, IMAGES[:1], IMAGES[:3]])
def test_wrong_number_of_images_is_refused(images):
    with pytest.raises(ValueError, match=r"18 IMAGE_TOKENs for \d images"):
        tiny_cumo()(torch.tensor([question("i", 5, "i")]), images)


@pytest.mark.parametrize(
    "experts, llm_experts, scales", [(0, 0, (1,)), (4, 0, (1, 3)), (3, 2, (1, 2))]
)
def test_save_and_load_give_the_same_model(tmp_path, experts, llm_experts, scales):
    model = tiny_cumo(experts, llm_experts, scales, window=8).eval()
    model.save_pretrained(tmp_path)
    loaded = CuMo.from_pretrained(tmp_path).eval()
    assert loaded.cfg == model.cfg
    tokens = torch.tensor([question(1, "i", 5, 6)])
    assert torch.equal(loaded(tokens, IMAGES[:1]).logits, model(tokens, IMAGES[:1]).logits)


def test_every_wrong_key_is_listed_in_one_error(tmp_path):
    model = tiny_cumo(4)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hidden_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        CuMo.from_pretrained(tmp_path)
    assert "model.embed_tokens.weight is [97, 32] instead of [97, 64]" in str(error.value)
    assert "model.mm_projector.experts.0.0.weight" in str(error.value)


def test_a_directory_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        CuMo.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        CuMo.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("experts, window", [(0, None), (4, None), (4, 6)])
def test_generation_equals_the_argmax_of_full_forwards(experts, window):
    model = tiny_cumo(experts, window=window).eval()
    tokens = torch.tensor([question(1, 5, "i", 7, 8)])
    new = model.generate(tokens, IMAGES[:1], max_new_tokens=12)
    for _ in range(12):
        logits = model(tokens, IMAGES[:1]).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert new.tolist() == tokens[:, -12:].tolist()


def test_padded_batch_generates_what_each_prompt_does_alone():
    model = tiny_cumo(4).eval()
    prompts = [question(1, 5, "i", 7), question(1, "i", 6, 7, 8, 9, 10), [1, 33, 34]]
    images = [IMAGES[:1], IMAGES[1:2], None]
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    segments = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(tokens, IMAGES[:2], segments, max_new_tokens=8)
    for row, prompt, image in zip(together, prompts, images):
        assert (
            row.tolist()
            == model.generate(torch.tensor([prompt]), image, max_new_tokens=8)[0].tolist()
        )


def stage_files(model, folder):
    """What the original's stages write next to the shards: mm_projector.bin and clip.bin."""
    views = model.public_state_dict()
    clip = {k.removeprefix("model.vision_tower."): v for k, v in views.items() if ".vision_" in k}
    torch.save(
        {k: v for k, v in views.items() if ".mm_projector." in k}, folder / "mm_projector.bin"
    )
    torch.save(clip, folder / "clip.bin")


def test_stage_files_go_before_the_shards(tmp_path):
    shards, newer = tiny_cumo(seed=0), tiny_cumo(seed=1).eval()
    shards.save_pretrained(tmp_path)
    stage_files(newer, tmp_path)
    loaded = CuMo.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.encode_images(IMAGES), newer.encode_images(IMAGES))
    assert torch.equal(loaded.llm.lm_head.weight, shards.llm.lm_head.weight)
    (tmp_path / "clip.bin").unlink()
    loaded = CuMo.from_pretrained(tmp_path)
    weights, expected = (model.connector.state_dict() for model in (loaded, newer))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(loaded.vision(IMAGES)[0], shards.vision(IMAGES)[0])


def test_stage_files_complete_shards_that_hold_only_the_language_model(tmp_path):
    model = tiny_cumo().eval()
    model.save_pretrained(tmp_path)
    write_tensors(tmp_path, model.llm.public_state_dict())
    with pytest.raises(ValueError, match=r"missing: model\.vision_tower"):
        CuMo.from_pretrained(tmp_path)
    stage_files(model, tmp_path)
    tokens = torch.tensor([question(1, "i", 5, 6)])
    loaded = CuMo.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens, IMAGES[:1]).logits, model(tokens, IMAGES[:1]).logits)


def test_a_stage_file_of_another_model_is_refused(tmp_path):
    tiny_cumo(experts=4).save_pretrained(tmp_path)
    stage_files(tiny_cumo(), tmp_path)
    with pytest.raises(ValueError, match=r"unexpected: .*model\.mm_projector\.0\.weight"):
        CuMo.from_pretrained(tmp_path)


@pytest.mark.parametrize("experts", [0, 4])
def test_the_originals_config_names_its_clip(tmp_path, experts):
    model = tiny_cumo(experts, scales=(1, 3)).eval()
    model.save_pretrained(tmp_path / "cumo")
    write_json(tmp_path / "clip" / "config.json", model.vision.cfg.to_hf() | {"num_experts": 0})
    config = json.loads((tmp_path / "cumo" / "config.json").read_text())
    del config["vision_config"]
    for ours in [name for name in config if name.startswith("nanocumo")]:
        del config[ours]
    config["mm_vision_tower"] = str(tmp_path / "clip")
    write_json(tmp_path / "cumo" / "config.json", config)
    loaded = CuMo.from_pretrained(tmp_path / "cumo").eval()
    assert loaded.cfg == model.cfg
    assert torch.equal(loaded.encode_images(IMAGES[:1]), model.encode_images(IMAGES[:1]))
    config["mm_vision_tower"] = "openai/nowhere"
    write_json(tmp_path / "cumo" / "config.json", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ValueError, match="hf download openai/nowhere config.json"):
            CuMo.from_pretrained(tmp_path / "cumo")


@pytest.mark.parametrize("llm", ["Mistral", "Mixtral"])
@torch.no_grad()
def test_transformers_answers_the_same_from_our_checkpoint(tmp_path, llm):
    """Its CLIP and its language model, straight from the folder, around our connector."""
    transformers = pytest.importorskip("transformers")
    model = tiny_cumo(window=8).eval()
    if llm == "Mixtral":  # with routers that do choose, and experts that differ
        model = upcycle(model, ("mlp", "llm"), num_experts=4).eval()
        for block in model.llm.model.layers:
            for p in block.block_sparse_moe.parameters():
                p.add_(torch.randn_like(p) * p.std())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    clip = transformers.CLIPVisionModel.from_pretrained(
        tmp_path,
        config=transformers.CLIPVisionConfig(**config["vision_config"]),
        key_mapping={r"^model\.vision_tower\.(vision_model\.)?": ""},
    )
    states = clip.eval()(IMAGES[:1], output_hidden_states=True).hidden_states
    features, _ = model.vision(IMAGES[:1])
    torch.testing.assert_close(states[-2][:, 1:], features, rtol=1e-5, atol=1e-5)
    config |= {"model_type": llm.lower()}  # llava_mistral: the original's own name for it
    config = getattr(transformers, f"{llm}Config").from_dict(config)
    family = getattr(transformers, f"{llm}ForCausalLM")
    theirs = family.from_pretrained(tmp_path, config=config).eval()
    x = theirs.get_input_embeddings()(torch.tensor([[1, 5, 6, 7, 8, 9, 2]]))
    image, _ = model.connector(states[-2][:, 1:])
    x = torch.cat([x[:, :2], image, x[:, 2:]], dim=1)
    ours = model(torch.tensor([question(1, 5, "i", 6, 7, 8, 9, 2)]), IMAGES[:1]).logits
    torch.testing.assert_close(theirs(inputs_embeds=x).logits, ours, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- configs from afar


@pytest.mark.parametrize("change, words", [
    ({"mm_vision_select_feature": "cls_patch"}, "feature='cls_patch' .*only 'patch'"),
    ({"mm_vision_select_layer": -1}, "mm_vision_select_layer=-1 .*only -2"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
    ({"image_aspect_ratio": "anyres"}, "'anyres' is not supported, only 'pad' and 'square'"),
    ({"image_aspect_ratio": None}, "image_aspect_ratio=None"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "'spatial_unpad' .*only 'flat'"),
    ({"mm_projector_type": "linear"}, "'linear' .*only 'smoe_mlp' and 'mlp2x_gelu'"),
    ({"model_type": "llava_qwen"}, "'llava_qwen' is not supported, only .*--clip, --llm"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised .*bitsandbytes"),
])  # fmt: skip
def test_what_a_config_asks_for_and_we_do_not_do_is_refused_by_name(change, words, tmp_path):
    tiny_cumo().save_pretrained(tmp_path)
    config = read_config(tmp_path)
    write_json(tmp_path / "config.json", config | change)
    with pytest.raises(ValueError, match=words) as error:
        CuMo.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("scales", [(1,), (1, 3)])
def test_fields_at_the_top_complete_a_plain_vision_config(scales, tmp_path):
    """The released config made complete in itself: CLIP's own vision_config was added."""
    model = tiny_cumo(experts=4, scales=scales)
    model.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    ours = ("scales", "num_experts", "num_selected")
    for name in ours:
        config["vision_config"].pop(name)
    config = {k: v for k, v in config.items() if not k.startswith("nanocumo")}
    write_json(tmp_path / "config.json", config)
    loaded = CuMo.from_pretrained(tmp_path)
    assert loaded.cfg.vision == model.cfg.vision and loaded.cfg.mlp_experts == 4
    assert torch.equal(loaded.encode_images(IMAGES), model.encode_images(IMAGES))


def test_what_old_files_store_besides_is_passed_over(tmp_path):
    model = tiny_cumo()
    model.llm.cfg.tie_embeddings = True
    del model.llm.lm_head
    model.save_pretrained(tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None],
            "lm_head.weight": model.llm.model.embed_tokens.weight.detach().clone()}  # fmt: skip
    write_tensors(tmp_path, model.public_state_dict() | more)
    loaded = CuMo.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_images(IMAGES), model.encode_images(IMAGES))


def test_a_checkpoint_of_ours_says_how_its_pixels_are_made(tmp_path):
    model, clip = tiny_cumo(), tmp_path / "clip"
    write_tensors(clip, model.vision.public_state_dict())
    write_json(clip / "config.json", model.cfg.vision.to_hf())
    write_json(clip / "preprocessor_config.json", {"image_mean": [0.5] * 3, "size": 24})
    vision = CLIPVision.from_pretrained(clip)  # LAION's CLIP, its mean folded into the weights
    assert not torch.equal(vision(IMAGES)[0], model.vision(IMAGES)[0])
    model.vision = vision
    model.save_pretrained(tmp_path / "ours")
    written = read_config(tmp_path / "ours", "preprocessor_config.json")
    assert written["crop_size"] == {"height": 24, "width": 24} and written["resample"] == 3
    assert written["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    again = CuMo.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.vision(IMAGES)[0], vision(IMAGES)[0])  # and not folded in twice
    config = read_config(tmp_path / "ours")  # the original's: the processor is its CLIP's
    del config["vision_config"]
    write_json(tmp_path / "ours" / "config.json", config | {"mm_vision_tower": str(clip)})
    tensors = dict(read_tensors(tmp_path / "ours"))
    plain = {f"model.vision_tower.{k}": v for k, v in read_tensors(clip)}
    write_tensors(tmp_path / "ours", tensors | plain)
    again = CuMo.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.vision(IMAGES)[0], vision(IMAGES)[0])


def test_a_checkpoint_of_ours_says_where_texts_begin_and_end(tmp_path):
    model = tiny_cumo()
    model.cfg.llm.bos_token_id, model.cfg.llm.eos_token_id = 0, [5, 6]
    model.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        written = read_config(tmp_path, name)
        assert (written["bos_token_id"], written["eos_token_id"]) == (0, [5, 6])
    assert CuMo.from_pretrained(tmp_path).cfg == model.cfg
