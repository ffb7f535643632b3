"""Pretrain the miniature's language model on scenes in text.

    python runs/make/pretrain_llm.py                         # writes data/mini/llm
    python runs/make/pretrain_llm.py --init data/mini/llm    # continues from these weights

CuMo starts from a pretrained language model. This one learns the emoji world and is small enough
for a laptop. It sees no picture. It reads scenes as text (text_world.py), first with short
questions, then mostly in conversations; on signs it reads random letters, never words. Of what the
split `pairs` holds out it learns nothing but some answers "no" (docs/RESULTS.md), and nothing of
the drawings, signs and bars of `style`.
"""

import pathlib
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from data.chat import IGNORE
from data.flags import check_numbers, parse, run
from data.tokenizer import Tokenizer
from engine.rate import has_fast_bf16
from llm import LLM, LLMConfig
from runs.make.pretraining import MINI, adamw, export, set_lr, update
from runs.make.text_world import FOUND, GRID, blur, text_batch


@dataclass
class PretrainLLMConfig:
    steps: int = 5000  # optimizer steps
    lr: float = 1e-3  # peak learning rate
    seed: int = 0  # seeds the weights and the scenes
    init: str = ""  # folder of the language model to continue from; empty: a new one
    out: str = str(MINI)  # folder; llm/ is written there


@torch.no_grad()
def text_answers(llm, tokenizer, split, noise, batches=12):
    """{type of question: [whether an answer is exactly right]} under greedy decoding.

    An answer is right if each of its tokens is the model's first choice after the correct prefix.
    """
    hits = {}
    for step in range(batches):
        batch, types = text_batch(tokenizer, split, 77, step, noise=noise)
        with torch.autocast("cpu", torch.bfloat16, has_fast_bf16("cpu")):
            x = blur(llm.embed(batch["tokens"]), batch["place"], noise)
            x, _ = llm.hidden(x, batch["segments"])
            guess = llm.logits(x).argmax(-1)[:, :-1]
        labels = batch["labels"][:, 1:]
        for row, asked in enumerate(types):
            learned = (labels[row] != IGNORE).nonzero()[:, 0]
            gaps = (learned.diff() > 1).nonzero()[:, 0] + 1  # between two answers
            for of_type, answer in zip(asked, learned.tensor_split(gaps)):
                right = bool((guess[row, answer] == labels[row, answer]).all())
                hits.setdefault(of_type, []).append(right)
    return dict(sorted(hits.items()))


def export_llm(llm, tokenizer, out):
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    export(out / "llm", llm.public_state_dict(), llm.cfg.to_hf() | special)
    for file in tokenizer.files:
        (out / "llm" / file.name).write_bytes(file.read_bytes())


class Probes(torch.nn.Module):
    """Auxiliary losses on the first three layers, for training only.

    To look something up, layer 1 must know the tokens before each token and the place of each
    patch; layer 2, at a name in a question, where the scene has it. To spell a word, layer 3 must
    know, at each letter of an answer, where the next one stands. Later layers then answer. Without
    these losses the skills take thousands of steps to appear (docs/LOG.md).
    """

    def __init__(self, llm, offsets=4):
        super().__init__()
        dim, self.seen = llm.cfg.dim, {}
        before = (torch.nn.Linear(dim, dim, bias=False) for _ in range(offsets))
        self.before = torch.nn.ModuleList(before)
        self.place = torch.nn.Linear(dim, GRID * GRID, bias=False)
        self.found = torch.nn.Linear(dim, len(FOUND), bias=False)
        self.spelled = torch.nn.Linear(dim, GRID * GRID, bias=False)
        for k in (0, 1, 2):
            layer = llm.model.layers[k]
            layer.register_forward_hook(lambda _, __, out, k=k: self.seen.update({k: out[0]}))

    def losses(self, llm, batch):
        """Cross-entropies of the probes before, place, found (0 if no name is asked) and spelled (0
        without letters)."""
        tokens, real, norm = batch["tokens"], batch["segments"] > 0, torch.nn.functional.rms_norm
        cross_entropy = torch.nn.functional.cross_entropy
        first, second, third = (norm(self.seen[k], self.seen[k].shape[-1:]) for k in (0, 1, 2))
        before = 0.0
        for offset, linear in enumerate(self.before, 1):
            some = real[:, offset:] & (torch.rand(real[:, offset:].shape) < 0.25)  # to save time
            guess = llm.logits(linear(first[:, offset:][some])).float()
            before += cross_entropy(guess, tokens[:, :-offset][some]) / len(self.before)
        patch = batch["place"] != IGNORE
        place = cross_entropy(self.place(first[patch]).float(), batch["place"][patch])
        asked = batch["found"] != IGNORE
        found = cross_entropy(self.found(second[asked]).float(), batch["found"][asked])
        next_one = batch["spelled"] != IGNORE
        spelled = cross_entropy(self.spelled(third[next_one]).float(), batch["spelled"][next_one])
        return before, place, found.nan_to_num(0), spelled.nan_to_num(0)


def pretrain_llm(cfg):
    torch.manual_seed(cfg.seed)
    tokenizer = Tokenizer.from_pretrained(MINI / "llm")
    llm = LLM(LLMConfig(tokenizer.vocab_size, dim=256, hidden_dim=512, n_layers=5, n_heads=8,
                        n_kv_heads=4, tie_embeddings=True, max_positions=2048))  # fmt: skip
    torch.nn.init.normal_(llm.model.embed_tokens.weight, std=0.1)  # smaller ones get lost
    if cfg.init:
        llm = LLM.from_pretrained(cfg.init)
    probes = Probes(llm)
    trained = [*llm.parameters(), *probes.parameters()]
    optimizer = adamw(trained, cfg.lr)
    for block in llm.model.layers:
        block.compile(dynamic=False)
    start = time.time()
    bar = tqdm(range(cfg.steps), desc="llm")
    for step in bar:
        set_lr(optimizer, cfg.lr, step, cfg.steps)
        # Short questions about clean pictures come first: with noise, the look-up does not form.
        short = 0.35 if cfg.init else 1.0 if step < 0.2 * cfg.steps else 0.25
        noise = 1.0 if cfg.init else min(1.0, max(0.0, 8 * step / cfg.steps - 1))
        batch, _ = text_batch(tokenizer, "train", cfg.seed, step, short, noise)
        with torch.autocast("cpu", torch.bfloat16, has_fast_bf16("cpu")):
            x = blur(llm.embed(batch["tokens"]), batch["place"], noise)
            x, _ = llm.hidden(x, batch["segments"])
            loss = llm.loss(x, batch["labels"])
            *looked_up, spelled = probes.losses(llm, batch)
        # The weights of the probes fall to 0: of looking up at half-time, of spelling at the end.
        weight = 1 - step / cfg.steps
        early = 0.0 if cfg.init else max(0.0, 2 * weight - 1)
        (loss + early * sum(looked_up) + weight * spelled).backward()
        update(optimizer, trained)
        probed = " ".join(f"{probe.item():.2f}" for probe in (*looked_up, spelled))
        bar.set_postfix(loss=f"{loss.item():.3f}", probes=probed)
        if (step + 1) % 500 == 0 or step + 1 == cfg.steps:
            for split, noise in (("new", 0.0), ("new", 1.0), ("pairs", 1.0)):
                hits = text_answers(llm, tokenizer, split, noise)
                shares = {of_type: np.mean(right) for of_type, right in hits.items()}
                row = " ".join(f"{of_type} {share:.0%}" for of_type, share in shares.items())
                mean = np.mean([shares[of_type] for of_type in shares if of_type != "describe"])
                tqdm.write(f"step {step + 1}, {time.time() - start:.0f} s, {split}"
                           f"{' with noise' * (noise > 0)} {mean:.1%}: {row}")  # fmt: skip
            export_llm(llm, tokenizer, pathlib.Path(cfg.out))


def main():
    cfg, _ = parse(PretrainLLMConfig, description=__doc__)
    check_numbers(cfg, above_0=("steps", "lr"))
    pretrain_llm(cfg)


if __name__ == "__main__":
    run(main)
