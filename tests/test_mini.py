"""The miniature pretrained weights: Hugging Face directories, small and accurate enough."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clip_moe import CLIPVision
from data import world
from data.images import preprocess
from data.tokenizer import Tokenizer
from llm import LLM
from runs.make.pretrain_mini import text_accuracy

MINI = Path(__file__).resolve().parents[1] / "data" / "mini"


def pictures(n):
    scenes = (world.sample_scene(np.random.default_rng(s), "new") for s in range(n))
    return torch.stack([preprocess(world.draw(scene), 64) for scene in scenes])


def test_both_together_take_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in MINI.rglob("*") if file.is_file()) <= 12_000_000


def test_transformers_sees_the_same_through_the_miniature_clip():
    images = pictures(4)
    CLIPVisionModel = pytest.importorskip("transformers").CLIPVisionModel
    theirs = CLIPVisionModel.from_pretrained(MINI / "clip", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        features, aux = CLIPVision.from_pretrained(MINI / "clip")(images)
    assert aux is None
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_transformers_reads_the_same_in_the_miniature_llm():
    tokens = torch.tensor([Tokenizer.from_pretrained(MINI / "llm").encode(" a cat and a dog.") * 9])
    AutoModelForCausalLM = pytest.importorskip("transformers").AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(MINI / "llm", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits = LLM.from_pretrained(MINI / "llm")(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_transformers_splits_text_like_our_tokenizer():
    PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(MINI / "llm" / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(MINI / "llm")
    for text in ("[INST] Where is the cat? [/INST] in the middle ", "Grüße, 猫 😀!", ""):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("split", ["new", "pairs"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_language_model_answers_scenes_given_as_text(split, noise):
    """One scene or several; with noise, every patch of an object may have a wrong name."""
    llm = LLM.from_pretrained(MINI / "llm").eval()
    tokenizer = Tokenizer.from_pretrained(MINI / "llm")
    answers = text_accuracy(llm, tokenizer, split, noise, batches=6)
    assert np.mean([answers[kind] for kind in world.QUESTION_TYPES]) > 0.95, answers
