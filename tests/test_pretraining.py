"""How the miniature is pretrained: sheets of letters, targets of patches, probes, --init."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from refused import refusal

from clip_moe import CLIPVision, CLIPVisionConfig
from data import world
from data.chat import IGNORE
from data.signs import HELD_OUT_WORDS, LETTERS, WORDS, is_held_out
from data.tokenizer import Tokenizer
from llm import LLM, LLMConfig
from runs.make import pretrain_clip, pretrain_llm, train_tokenizer
from runs.make.pretrain_clip import FIRST_LETTER, HEADS, Contrast
from runs.make.pretrain_llm import Probes
from runs.make.text_world import text_batch, text_picture

TOKENIZER = Tokenizer.from_pretrained(Path(__file__).resolve().parents[1] / "data" / "mini" / "llm")


def seeded(n):
    return (np.random.default_rng((8, i)) for i in range(n))


def test_sheet_has_three_lines_that_do_not_overlap_and_nothing_held_out():
    for rng in seeded(200):
        signs = pretrain_clip.sample_sheet(rng).signs
        assert len(signs) == 3 and not any(is_held_out(sign.text) for sign in signs)
        edges = [y for _, top, _, height in (s.box for s in signs) for y in (top, top + height)]
        assert edges == sorted(edges) and 0 <= edges[0] and edges[-1] <= world.SIDE
        assert all(0 <= s.box[0] and s.box[0] + s.box[2] <= world.SIDE for s in signs)


def test_pictures_of_training_show_nothing_held_out():
    for rng in seeded(300):
        scene = pretrain_clip.sample_picture(rng, "train", p_single=0.3, signs=0.7)
        assert not scene.chart and not any(is_held_out(sign.text) for sign in scene.signs)
        names = [o.name for o in scene.objects]
        assert not any(frozenset((a, b)) in world.HELD_OUT for a in names for b in names)


def test_target_of_a_patch_is_the_word_of_the_clean_text_picture():
    words = [*world.CONCEPTS, *world.COLORS, *LETTERS]
    assert len(words) == len(pretrain_clip.phrases()) and words[FIRST_LETTER] == LETTERS[0]
    letters = shown = 0
    for rng in seeded(300):
        scene = pretrain_clip.sample_picture(rng, "train", p_single=0.3, signs=0.7)
        targets, text = pretrain_clip.patch_targets(scene), text_picture(scene, rng, noise=0)
        pairs = [(words[t], word) for t, word in zip(targets, text, strict=True) if t != IGNORE]
        assert len(pairs) > 10 and all(target == word for target, word in pairs)
        shown += len({word for word in text if word in LETTERS})
        letters += len({words[t] for t in targets if t >= FIRST_LETTER})
    assert shown > 500 and letters == shown, "a letter between two patches has one too"


def test_letter_accuracy_is_the_share_of_letters_that_are_named():
    _, targets, _ = pretrain_clip.picture_batch("new", 79, 0, 16, 0, augment=False, signs=1.0)
    right = torch.nn.functional.one_hot(targets.clamp(min=0), len(pretrain_clip.phrases())).float()
    always_E = torch.zeros_like(right)
    always_E[..., FIRST_LETTER + LETTERS.index("E")] = 1
    share = (targets == FIRST_LETTER + LETTERS.index("E")).sum() / (targets >= FIRST_LETTER).sum()
    assert pretrain_clip.letter_accuracy(lambda _: (None, right), "new", 16) == 1
    found = pretrain_clip.letter_accuracy(lambda _: (None, always_E), "new", 16)
    assert found == pytest.approx(share.item()) and 0 < found < 0.5


def probe_losses(batch):
    """The four losses of a random model, and the gradient of the fourth by its probe's weight."""
    torch.manual_seed(0)
    cfg = LLMConfig(TOKENIZER.vocab_size, dim=32, hidden_dim=32, n_layers=3, n_heads=2,
                    n_kv_heads=2, tie_embeddings=True, max_positions=512)  # fmt: skip
    llm = LLM(cfg)
    probes = Probes(llm)
    llm.hidden(llm.embed(batch["tokens"]), batch["segments"])
    losses = probes.losses(llm, batch)
    losses[-1].backward()
    return torch.stack(losses), probes.spelled.weight.grad


def test_probe_of_spelling_is_0_without_letters_and_learns_with_them():
    batch, _ = text_batch(TOKENIZER, "train", 0, 0, short=0.5)
    assert (batch["spelled"] != IGNORE).any()
    losses, grad = probe_losses(batch)
    assert losses.isfinite().all() and losses[-1] > 0 and grad.isfinite().all() and grad.any()
    others = losses[:-1]
    losses, grad = probe_losses(batch | {"spelled": torch.full_like(batch["spelled"], IGNORE)})
    assert losses[-1] == 0 and not grad.any() and torch.equal(losses[:-1], others)


def test_exported_language_model_brings_its_tokenizer(tmp_path):
    llm = LLM(LLMConfig(TOKENIZER.vocab_size, dim=32, hidden_dim=32, n_layers=1, n_heads=2,
                        n_kv_heads=2, tie_embeddings=True))  # fmt: skip
    pretrain_llm.export_llm(llm, TOKENIZER, tmp_path)
    assert Tokenizer.from_pretrained(tmp_path / "llm").encode("a cat") == TOKENIZER.encode("a cat")
    assert torch.isfinite(LLM.from_pretrained(tmp_path / "llm")(torch.tensor([[5]]))[0]).all()


def tiny_contrast(seed):
    torch.manual_seed(seed)
    cfg = CLIPVisionConfig(world.SIDE, 8, dim=16, hidden_dim=16, n_layers=2, n_heads=2)
    return Contrast(CLIPVision(cfg), TOKENIZER)


def test_heads_continue_a_training_of_clip(tmp_path):
    model, other = tiny_contrast(0), tiny_contrast(1)
    pretrain_clip.export_clip(model, tmp_path)
    pretrain_clip.load_heads(other, tmp_path / "clip")
    for ours, theirs in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("heads, said", [(None, "has no heads.pt"), ({}, "is of another model")])
def test_init_without_fitting_heads_is_refused_in_one_line(
    heads, said, tmp_path, monkeypatch, capsys
):
    if heads is not None:
        torch.save(heads, tmp_path / HEADS)
    flags = ["--init", tmp_path, "--out", tmp_path / "out"]
    line = refusal(pretrain_clip.main, flags, monkeypatch, capsys)
    assert f"--init {tmp_path}" in line and said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command, flags, said", [
    (pretrain_llm, "--signs 0.5", "unknown flag --signs"),
    (train_tokenizer, "--steps 5", "unknown flag --steps"),
    (pretrain_llm, "--hidden-dim 96", "unknown flag --hidden-dim"),
    (pretrain_clip, "--hidden-dim 0", "--hidden-dim 0 must be above 0"),
    (pretrain_clip, "--signs 1.5", "--signs 1.5 must be from 0 to 1"),
    (pretrain_clip, "--signs -0.5", "--signs -0.5 must be from 0 to 1"),
    (pretrain_clip, "--lr 0", "--lr 0.0 must be above 0"),
    (pretrain_clip, "--steps 0", "--steps 0 must be above 0"),
    (pretrain_llm, "--lr 0", "--lr 0.0 must be above 0"),
    (pretrain_llm, "--steps 0", "--steps 0 must be above 0"),
])  # fmt: skip
def test_flags_without_effect_or_out_of_range_are_refused(
    command, flags, said, monkeypatch, capsys
):
    assert said in refusal(command.main, flags.split(), monkeypatch, capsys)


def test_a_tokenizer_never_replaces_that_of_trained_weights(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "llm" / "model.safetensors"
    weights.parent.mkdir()
    weights.touch()
    flags = ["--out", str(tmp_path)]
    assert f"{weights} belongs to" in refusal(train_tokenizer.main, flags, monkeypatch, capsys)
    assert not (weights.parent / "tokenizer.json").exists()
    weights.unlink()
    monkeypatch.setattr(train_tokenizer, "corpus", lambda: ["a cat", "a camel"])
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *flags])
    train_tokenizer.main()
    assert Tokenizer.from_pretrained(weights.parent).decode([]) == ""


def test_tokenizer_learns_from_no_sign_and_keeps_letters_of_words_apart():
    text = " ".join(train_tokenizer.corpus(40))
    assert {*re.findall("[A-Z0-9]{2,}", text)} == {"INST"}
    for word in (*WORDS, *HELD_OUT_WORDS):
        assert len(TOKENIZER.encode(f" {word}")) == len(word) + 1, word  # a space, then its letters
