"""The miniature pretrained weights: Hugging Face directories, small and accurate enough."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_moe import CLIPVision
from data import world
from data.images import preprocess
from data.tokenizer import Tokenizer
from llm import LLM
from runs.make.pretrain_clip import HEADS
from runs.make.pretrain_llm import text_answers

MINI = Path(__file__).resolve().parents[1] / "data" / "mini"
# Least accuracy of the language model on scenes given as text, over all questions about a kind.
# In `pairs`, bars have heights that it never saw with their color.
CASES = [("new", 0.0), ("new", 1.0), ("pairs", 0.0), ("pairs", 1.0)]  # split, noise
LEAST = {
    "things": (0.95, 0.80, 0.95, 0.80),
    "words": (0.90, 0.80, 0.90, 0.80),
    "charts": (0.70, 0.70, 0.20, 0.25),
}


def pictures(n):
    scenes = (world.sample_scene(np.random.default_rng(s), "new") for s in range(n))
    return torch.stack([preprocess(world.draw(scene), 64) for scene in scenes])


def test_both_together_take_at_most_12_megabytes():
    folders = MINI / "clip", MINI / "llm"  # weak_clip is for runs/ablations.py alone
    files = [file for folder in folders for file in folder.iterdir() if file.name != HEADS]
    assert sum(file.stat().st_size for file in files) <= 12_000_000


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


@cache
def answers(split, noise):
    """`text_answers` of the shipped language model."""
    llm = LLM.from_pretrained(MINI / "llm").eval()
    torch.manual_seed(0)  # Seeds the noise.
    return text_answers(llm, Tokenizer.from_pretrained(MINI / "llm"), split, noise, batches=10)


@pytest.mark.parametrize("kind", world.KINDS)
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{s}-{noise}" for s, noise in CASES])
def test_language_model_answers_scenes_given_as_text(kind, case):
    """One scene or several; with noise, every patch of an object may have a wrong name."""
    hits = answers(*CASES[case])
    right = [one for of_type in world.KINDS[kind] for one in hits.get(of_type, ())]
    assert len(right) >= 12 and np.mean(right) > LEAST[kind][case], (len(right), np.mean(right))
