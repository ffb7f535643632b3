"""A real public model, SmolLM2-135M-Instruct: our ids and answers equal those of transformers.

The weights are not in the repository; runs/smollm2.sh makes them. Without them, tests are skipped.
"""

import json
import os
import pathlib

import pytest
import torch

from data.chat import render
from data.tokenizer import Tokenizer
from llm import LLM
from runs.make.convert_smollm2 import half_split, hf_name

transformers = pytest.importorskip("transformers")

ROOT = pathlib.Path(__file__).parents[1]
SMOL = pathlib.Path(os.environ.get("SMOLLM2", ROOT / "weights" / "SmolLM2-135M-Instruct"))
needs_weights = pytest.mark.skipif(
    not (SMOL / "model.safetensors").is_file(),
    reason=f"no weights in {SMOL}; runs/make/convert_smollm2.py says how to get them",
)
PROMPTS = [
    "What is a cat?",
    "Name three colors of the rainbow.",
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How many days are in a week?",
    "Translate 'good morning' into Spanish.",
    "Explain photosynthesis to a child.",
    "What is 12 + 30?",
    "Write a Python function that adds two numbers.",
    "Why is the sky blue? 😀",
]


@needs_weights
@pytest.mark.slow
def test_ten_prompts_get_the_same_greedy_text_as_from_transformers():
    ours, theirs = LLM.from_pretrained(SMOL), Tokenizer.from_pretrained(SMOL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOL)
    reference = transformers.AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32)
    for question in PROMPTS:
        ids, _ = render([{"from": "human", "value": question}], theirs, "chatml")
        messages = [{"role": "user", "content": question}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == expected["input_ids"]
        tokens = torch.tensor([ids])
        said = ours.generate(tokens, max_new_tokens=48, eos_token_id=theirs.eos)[0].tolist()
        answer = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=48, do_sample=False
        )[0, len(ids) :].tolist()
        assert said == answer, question
        assert theirs.decode(said) == tokenizer.decode(answer, skip_special_tokens=True)


@needs_weights
def test_chat_template_of_the_tests_is_the_models_own():
    from test_chat import SMOL_TEMPLATE

    config = json.loads((SMOL / "tokenizer_config.json").read_text())
    assert config["chat_template"] == SMOL_TEMPLATE


def test_rows_of_q_go_from_pairs_of_neighbours_to_pairs_half_a_head_apart():
    w = torch.arange(12.0)[:, None]  # 2 heads of 6 features
    assert half_split(w, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_every_part_of_a_layer_has_its_public_name():
    assert hf_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"
    with pytest.raises(KeyError):
        hf_name("rope_freqs.weight")
