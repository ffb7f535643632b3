"""LLaVA's checkpoints, in its own layout and in llava-hf's: the same logits as transformers'."""

import shutil
from pathlib import Path

import pytest
import torch

import train
from bench.public_models import ASKED, IMAGES, TOKENS, in_original_layout, llava_hf
from cumo import IMAGE_TOKEN, CuMo
from data.chat import render
from data.chat_template import SYSTEM
from data.configs import cumo_fields
from data.tokenizer import Tokenizer
from data.weights import read_config
from sample import load_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("family, template", [("Llama", "vicuna"), ("Mistral", "mistral_v1")])
@pytest.mark.parametrize("layout", ["llava-hf", "whole", "without CLIP"])
@torch.no_grad()
def test_logits_and_greedy_answers_are_those_of_transformers(layout, family, template, tmp_path):
    theirs = llava_hf(tmp_path, family)
    if layout != "llava-hf":
        in_original_layout(tmp_path, family, whole=layout == "whole")
    ours = load_model(tmp_path, "cpu")
    assert isinstance(ours, CuMo) and ours.cfg.template == template
    logits = theirs(**ASKED).logits
    torch.testing.assert_close(ours(TOKENS, IMAGES).logits, logits, rtol=1e-5, atol=1e-5)
    answer = theirs.generate(**ASKED, max_new_tokens=8, do_sample=False, eos_token_id=None)
    said = ours.generate(TOKENS, IMAGES, max_new_tokens=8)
    assert torch.equal(said, answer[:, TOKENS.shape[1] :])


def test_it_is_upcycled_and_trained_into_our_layout(tmp_path, monkeypatch, capsys):
    llava_hf(tmp_path / "llava", "Llama")
    monkeypatch.chdir(tmp_path)
    flags = ["--stage=3", "--init=llava", "--samples=8", "--rows=2", "--out=out", "--workers=0"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    train.main()
    assert "from llava: --template vicuna" in capsys.readouterr().out
    config = read_config("out/stage3")
    assert config["model_type"] == "llava_mistral" and config["nanocumo_template"] == "vicuna"
    model = CuMo.from_pretrained(Path("out/stage3"))
    assert model.cfg.mlp_experts == model.cfg.vision.num_experts == 4


def test_vicunas_ids_are_those_of_llava(tmp_path):
    """LLaVA tokenizes the text between two pictures or end tokens at once."""
    common = pytest.importorskip("mistral_common")
    file = Path(common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(file, tmp_path / "tokenizer.model")
    sp = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(file))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    said = ["<image>\nWhat is it?", "A cat.", "Is it\nred?", "no", "Why?"]
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
    ids, labels = render(turns, tokenizer, "vicuna", image_tokens=3, n_images=1)
    answers = [sp.encode("A cat.") + [2], sp.encode("no") + [2]]
    assert ids == [1, *sp.encode(f"{SYSTEM} USER: "), *[IMAGE_TOKEN] * 3,
                   *sp.encode("\nWhat is it? ASSISTANT: A cat."), 2,
                   *sp.encode("USER: Is it\nred? ASSISTANT: no"), 2,
                   *sp.encode("USER: Why? ASSISTANT:")]  # fmt: skip
    assert [label for label in labels if label >= 0] == sum(answers, [])


def test_a_text_config_leaves_out_what_is_transformers_default():
    """As llava-hf/llava-1.5-7b-hf and bakLlava-v1-hf."""
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    for family, written in (("llama", {"rms_norm_eps": 1e-5, "vocab_size": 32064}),
                            ("mistral", {"max_position_embeddings": 32768})):  # fmt: skip
        text = {"model_type": family, **written}
        _, llm, rest = cumo_fields(
            {"model_type": "llava", "text_config": text, "vision_config": vision}, "x"
        )
        theirs = getattr(transformers, f"{family.title()}Config")(**written)
        assert (llm["dim"], llm["hidden_dim"], llm["vocab_size"], llm["n_kv_heads"]) == (
            theirs.hidden_size, theirs.intermediate_size, theirs.vocab_size,
            theirs.num_key_value_heads)  # fmt: skip
        assert llm["n_layers"] == 32 and llm["max_positions"] == theirs.max_position_embeddings
        assert rest["image_mode"] == "pad" and rest["mlp_experts"] == 0


@pytest.mark.parametrize("change, words", [
    ({"vision_feature_layer": -1}, "vision_feature_layer=-1 .*only -2"),
    ({"vision_feature_select_strategy": "full"}, "'full' .*only 'default'"),
    ({"model_type": "llava_next", "image_grid_pinpoints": [[336, 672]]}, "'llava_next' .*--clip"),
    ({"text_config": {"model_type": "qwen2"}}, "'llava_qwen2' is not supported, only llava_mis"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "'siglip_vision_model'"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised .*bitsandbytes"),
    ({"image_aspect_ratio": "anyres"}, "'anyres' is not supported, .*one tile .*write 'pad'"),
])  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(change, words):
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    with pytest.raises(ValueError, match=words) as error:
        cumo_fields(config | {"vision_config": vision} | change, "x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
