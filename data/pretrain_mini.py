"""Make the miniature pretrained weights: data/mini/llm and data/mini/clip.

CuMo starts from a language model that can read and an image encoder that can see. This script makes
both at the size of a laptop, from the emoji world alone:

    python data/pretrain_mini.py tokenizer    # byte-level BPE, seconds
    python data/pretrain_mini.py llm          # a language model that answers about text scenes
    python data/pretrain_mini.py clip         # an image tower, trained against phrases

The language model never sees a picture. It reads scenes in two written forms: as a caption, and as
a *text picture*, 64 words for the 8x8 patches of an image, "blue blue cat cat blue ...". From the
second it learns what a large language model knows already: that what stands early in a sequence of
patches is at the top, how to find a name by its place and a place by its name.

Neither ever meets a scene with a pair of concepts that the split `pairs` holds out, nor a Fluent
drawing. (The lists of the first lesson are of random words and say nothing about scenes.)
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from clip_moe import CLIPVision, CLIPVisionConfig
from data import world
from data.chat import IGNORE, IMAGE_TOKEN, render
from data.images import preprocess
from data.packing import assemble
from data.tokenizer import Tokenizer, train_bpe
from data.weights import write_json, write_tensors
from llm import LLM, LLMConfig

MINI = pathlib.Path(__file__).parent / "mini"
PATCH, GRID = 8, 8
ROWS, LENGTH = 8, 280


def corpus(n=6000):
    """Text for the tokenizer: captions, questions and answers in their template, lists of names."""
    for i in range(n):
        rng = np.random.default_rng((9, i))
        scene = world.sample_scene(rng, "train")
        yield from (world.caption(scene) + "\n", world.short_caption(scene) + "\n")
        yield from (f"[INST] {q} [/INST] {a} " for _, q, a in world.questions(scene, rng, 4))
        yield "\n".join(turn["value"] for turn in drill(rng))
        yield " ".join(["", world.DESCRIBE, *(o.name for o in scene.objects), scene.background])


def drill(rng):
    """A conversation about a list of words: to repeat it, then to look things up in it.

    Copying a list is the shortest way to attention heads that find an earlier token and read what
    stands beside it (induction heads); scenes alone take ten times as long to form them.
    """
    words = [*world.CONCEPTS, *world.COLORS]
    listed = [words[i] for i in rng.permutation(len(words))[: rng.integers(3, 33)]]
    turns = [(f"Repeat: {' '.join(listed)}", " ".join(listed))]
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(listed) - 1))
        word, here = words[rng.integers(len(words))], bool(rng.random() < 0.5)
        word = listed[at] if here else word
        turns.append([
            (f"What comes after {listed[at]}?", listed[at + 1]),
            (f"What comes before {listed[at + 1]}?", listed[at]),
            (f"Is {word} in the list?", "yes" if word in listed else "no"),
        ][rng.integers(3)])  # fmt: skip
    return [
        {"from": role, "value": text}
        for turn in turns
        for role, text in zip(("human", "gpt"), turn)
    ]


def text_picture(scene):
    """64 words, one for each 8x8 patch in reading order: the object it shows, or the background."""
    words = np.full((GRID, GRID), scene.background, dtype=object)
    y, x = np.mgrid[:GRID, :GRID] * PATCH + PATCH / 2
    for o in scene.objects:
        left, top, size = o.box
        words[np.hypot(x - left - size / 2, y - top - size / 2) < size * 0.5] = o.name
    return " " + " ".join(words.ravel())


def quick_fire(tokenizer, rng, length):
    """(ids, labels) of a scene in words and as many questions as fit, in telegraph style.

    "... cat? yes owl? no cat: top left bottom right: bus cat bus? left animal: cat ..."
    The same look-ups as in the questions proper at a quarter of the tokens: with 20 of them a row,
    "is it there?" is learned in 150 steps; with one or two, not in 2,000.
    """
    scene = world.sample_scene(rng, "train")
    names = [o.name for o in scene.objects]
    once = [o for o in scene.objects if names.count(o.name) == 1]
    place = {o: o.place.replace("at the ", "").replace("in the ", "") for o in scene.objects}
    written = text_picture(scene) if rng.random() < 0.7 else " " + world.caption(scene)
    ids = [tokenizer.bos, *tokenizer.encode(written)]
    labels = [IGNORE] * len(ids)
    while True:
        kind = rng.choice(6, p=(0.25, 0.25, 0.15, 0.05, 0.15, 0.15))
        name = str(names[rng.integers(len(names))])
        if kind == 0:
            asked, answer = f" {name}?", " yes"
        elif kind == 1:
            name = world.CONCEPTS[rng.integers(len(world.CONCEPTS))]
            asked, answer = f" {name}?", " yes" if name in names else " no"
        elif kind == 2 and once:
            o = once[rng.integers(len(once))]
            asked, answer = f" {o.name}:", f" {place[o]}"
        elif kind == 3:
            o = scene.objects[rng.integers(len(names))]
            asked, answer = f" {place[o]}:", f" {o.name}"
        elif kind == 4 and (pair := world.ask_side(scene, rng)):
            a, b = pair[0].removeprefix("Is the ").removesuffix("?").split(" left or right of the ")
            asked, answer = f" {a} {b}?", f" {pair[1]}"
        elif kind == 5 and (pair := world.ask_kind(scene, rng)):
            asked = " " + pair[0].split()[1] + ":"
            answer = " " + pair[1].split()[1]
        else:
            continue
        asked, answer = tokenizer.encode(asked), tokenizer.encode(answer)
        if len(ids) + len(asked) + len(answer) > length:
            return ids, labels
        ids += asked + answer
        labels += [IGNORE] * len(asked) + answer


# What takes a small model longest to learn is asked most often.
HARD = world.QUESTION_TYPES + ("existence", "existence", "where", "kind", "side")


def text_sample(tokenizer, split, key, turns=9, types=world.QUESTION_TYPES):
    """(ids, labels, types) of one conversation about a scene given as text."""
    rng = np.random.default_rng(key)
    plain = split == "train" and rng.random() < 0.05
    scene = world.sample_scene(rng, split, n_objects=1 if plain else None)
    asked = [] if plain else world.questions(scene, rng, turns, types)
    asked.insert(
        int(rng.integers(len(asked) + 1)), ("describe", world.DESCRIBE, world.caption(scene))
    )
    if plain:
        asked = [("describe", world.DESCRIBE, world.short_caption(scene))]
    conversation = []
    for k, (_, q, a) in enumerate(asked):
        conversation += [
            {"from": "human", "value": ("" if k else "<image>\n") + q},
            {"from": "gpt", "value": a},
        ]
    written = text_picture(scene) if plain or rng.random() < 0.7 else " " + world.caption(scene)
    words = tokenizer.encode(written)
    template = "plain" if plain else "mistral_instruct"
    ids, labels = render(conversation, tokenizer, template, image_tokens=len(words), n_images=1)
    at = ids.index(IMAGE_TOKEN)
    return ids[:at] + words + ids[at + len(words) :], labels, [kind for kind, *_ in asked]


def text_batch(tokenizer, split, seed, step, drills=0.0, quick=0.0):
    """Packed rows of text scenes, a share of them replaced by drills, and the questions' types."""
    rows, types, i = [], [], 0
    while len(rows) < ROWS:
        key = (seed, world.SPLITS.index(split), step, i)
        rng = np.random.default_rng((*key, 5))
        i += 1
        if rng.random() < drills:
            if rng.random() < quick:
                rows.append([(*quick_fire(tokenizer, rng, LENGTH), [])])
                continue
            row, room = [], LENGTH
            while room > 0:
                ids, labels = render(drill(rng), tokenizer)
                room -= len(ids)
                row += [(ids, labels, [])] if room >= 0 else []
            rows.append(row)
            continue
        types_asked = HARD if split == "train" else world.QUESTION_TYPES
        ids, labels, kinds = text_sample(tokenizer, split, key, types=types_asked)
        if len(ids) <= LENGTH:
            rows.append([(ids, labels, [])])
            types.append(kinds)
    return assemble(rows, LENGTH), types


@torch.no_grad()
def text_accuracy(llm, tokenizer, split, batches=32):
    """Share of answers that greedy decoding gets exactly right, by question type.

    An answer is right when each of its tokens is the likeliest one after the right ones before it.
    """
    hits = {}
    for step in range(batches):
        batch, types = text_batch(tokenizer, split, 77, step)
        with torch.autocast("cpu", torch.bfloat16):
            x, _ = llm.hidden(llm.embed(batch["tokens"]), batch["segments"])
            guess = llm.logits(x).argmax(-1)[:, :-1]
        labels = batch["labels"][:, 1:]
        for row, kinds in enumerate(types):
            learn = labels[row] != IGNORE
            starts = (learn & ~torch.cat([learn.new_zeros(1), learn[:-1]])).nonzero()[:, 0].tolist()
            for kind, start in zip(kinds, starts):
                stop = (
                    start + learn[start:].long().argmin().item()
                    if not learn[start:].all()
                    else None
                )
                right = bool((guess[row, start:stop] == labels[row, start:stop]).all())
                hits.setdefault(kind, []).append(right)
    return {kind: sum(h) / len(h) for kind, h in sorted(hits.items())}


def export(folder, tensors, config):
    """An ordinary Hugging Face directory, in bfloat16 as public weights are."""
    write_tensors(folder, {name: t.to(torch.bfloat16) for name, t in tensors.items()})
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})


def export_llm(llm):
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    export(MINI / "llm", llm.original_state_dict(), llm.cfg.to_hf() | special)


def export_clip(model):
    """The vision tower and the norm behind its class token; the rest has done its work."""
    norm = {f"vision_model.post_layernorm.{name}": t for name, t in model.norm.state_dict().items()}
    architecture = {"architectures": ["CLIPVisionModel"]}
    export(
        MINI / "clip",
        model.vision.original_state_dict() | norm,
        architecture | model.vision.cfg.to_hf(),
    )


class Probes(torch.nn.Module):
    """What early layers should know, asked for directly, in training only.

    To look something up, a model must know at each token which tokens stood before it (layer 1),
    its place in the text (layer 2) and where the same token stands in the scene (layer 3); later
    layers then combine these. Waiting until the pieces appear by chance takes thousands of steps:
    repeating a list of 8 to 32 words is at a loss of 3.7 after 300 steps, and of 1.2 when the first
    layer is asked for the 4 tokens before each.
    """

    def __init__(self, llm, tokenizer, offsets=4, places=70):
        super().__init__()
        dim, self.places, self.seen = llm.cfg.dim, places, {}
        before = (torch.nn.Linear(dim, dim, bias=False) for _ in range(offsets))
        self.before = torch.nn.ModuleList(before)
        self.place = torch.nn.Linear(dim, places, bias=False)
        self.last = torch.nn.Linear(dim, places + 1, bias=False)
        self.names = torch.tensor([tokenizer.encode(" " + name)[0] for name in world.CONCEPTS])
        for k in range(3):
            layer = llm.model.layers[k]
            layer.register_forward_hook(lambda _, __, out, k=k: self.seen.update({k: out[0]}))

    def loss(self, llm, batch):
        tokens, segments = batch["tokens"], batch["segments"]
        cross_entropy = torch.nn.functional.cross_entropy
        x = [torch.nn.functional.rms_norm(self.seen[k], self.seen[k].shape[-1:]) for k in range(3)]
        total = 0.0
        for offset, linear in enumerate(self.before, 1):
            same = (segments[:, offset:] == segments[:, :-offset]) & (segments[:, offset:] > 0)
            guess = llm.logits(linear(x[0][:, offset:][same]))
            total = total + cross_entropy(guess.float(), tokens[:, :-offset][same]) / len(
                self.before
            )
        start = (segments[:, : self.places] == 1).nonzero(as_tuple=True)
        total = total + cross_entropy(self.place(x[1][start]).float(), start[1])
        # names in questions; 0: not in the scene, else the place where it stands there
        column = torch.arange(1, tokens.shape[1] + 1)
        asked = (segments == 1) & torch.isin(tokens, self.names) & (column > 70)
        scene = column[: self.places]
        alike = tokens[:, :, None] == tokens[:, None, : self.places]
        last = (alike * (column[:, None] > scene) * scene).amax(-1)
        return total + cross_entropy(self.last(x[2][asked]).float(), last[asked])


def pretrain_llm(steps, lr, seed):
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_pretrained(MINI / "llm")
    cfg = LLMConfig(vocab_size=tokenizer.vocab_size, dim=256, hidden_dim=512, n_layers=5, n_heads=8,
                    n_kv_heads=4, tie_embeddings=True, max_positions=2048)  # fmt: skip
    llm = LLM(cfg)
    torch.nn.init.normal_(llm.model.embed_tokens.weight, std=0.1)  # else the first layers drown it
    probes = Probes(llm, tokenizer)
    trained = [*llm.parameters(), *probes.parameters()]
    optimizer = adamw(trained, lr)
    start = time.time()
    bar = tqdm(range(steps), desc="llm")
    for step in bar:
        set_lr(optimizer, lr, step, steps)
        batch, _ = text_batch(tokenizer, "train", seed, step, *lessons(step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            x, _ = llm.hidden(llm.embed(batch["tokens"]), batch["segments"])
            loss = llm.loss(x, batch["labels"])
            probe = probes.loss(llm, batch)
        (loss + probe * max(0.0, 1 - step / (0.5 * steps))).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", probe=f"{probe.item():.2f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            for split in ("seen", "pairs"):
                acc = text_accuracy(llm, tokenizer, split)
                mean = np.mean([v for k, v in acc.items() if k != "describe"])
                row = " ".join(f"{k} {v:.0%}" for k, v in acc.items())
                tqdm.write(
                    f"step {step + 1}, {time.time() - start:.0f} s, {split} {mean:.1%}: {row}"
                )
            export_llm(llm)


def lessons(done):
    """Shares of (drills among all rows, quick fire among the drills) after a share of the steps."""
    if done < 0.1:
        return 1.0, 0.0  # lists
    if done < 0.25:
        return 0.9, 1.0  # telegraph style
    return 0.25, 0.8  # conversations, and something of the rest


def adamw(parameters, lr):
    """AdamW whose weight decay leaves vectors alone."""
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def set_lr(optimizer, lr, step, steps):
    """100 steps up, then level, and over the second half down to zero."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / 100) * min(1, 2 * (1 - step / steps))


# ------------------------------------------------------------------------------------- the eye


def phrases():
    """What the text tower is asked to tell apart: every concept and every background."""
    return [world.a(c) for c in world.CONCEPTS] + [f"a {c} background" for c in world.COLORS]


def patch_targets(scene):
    """For each of the 64 patches the index of its phrase; IGNORE at the rim of an object."""
    target = np.full((GRID, GRID), len(world.CONCEPTS) + list(world.COLORS).index(scene.background))
    y, x = np.mgrid[:GRID, :GRID] * PATCH + PATCH / 2
    for o in scene.objects:
        left, top, size = o.box
        distance = np.hypot(x - left - size / 2, y - top - size / 2) / size
        target[distance < 0.6] = IGNORE
        target[distance < 0.45] = world.CONCEPTS.index(o.name)
    return target.ravel()


def picture_batch(split, seed, step, n, p_single, augment=True):
    """`n` scenes -> images [n, 3, 64, 64], patch targets [n, 64], true phrases [n, phrases]."""
    images, targets, truths = [], [], np.zeros((n, len(phrases())), dtype=bool)
    for i in range(n):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), step, i))
        scene = world.sample_scene(rng, split, 1 if rng.random() < p_single else None)
        images.append(preprocess(world.draw(scene, rng if augment else None), world.SIDE))
        targets.append(patch_targets(scene))
        truths[i, np.unique(targets[-1][targets[-1] >= 0])] = True
    return torch.stack(images), torch.from_numpy(np.stack(targets)), torch.from_numpy(truths)


class Contrast(torch.nn.Module):
    """CLIP's two towers meeting in one space of 128 numbers; only `vision` is kept.

    The class token (after the last layer) is drawn to all phrases that are true of the picture;
    each patch, as the language model will see it (after the last layer but one), to the phrase of
    its region.
    """

    def __init__(self, vision, tokenizer):
        super().__init__()
        dim = vision.cfg.dim
        self.vision, self.norm = vision, torch.nn.LayerNorm(dim, vision.cfg.layer_norm_eps)
        self.class_proj = torch.nn.Linear(dim, 128, bias=False)
        self.patch_proj = torch.nn.Linear(dim, 128, bias=False)
        self.text = LLM(LLMConfig(tokenizer.vocab_size, dim=128, hidden_dim=256, n_layers=2,
                                  n_heads=2, n_kv_heads=2, tie_embeddings=True))  # fmt: skip
        self.scale = torch.nn.Parameter(torch.tensor(2.3))
        ids = [tokenizer.encode(" " + phrase) for phrase in phrases()]
        self.last = torch.tensor([len(i) - 1 for i in ids])
        width = max(map(len, ids))
        self.phrases = torch.tensor([i + [0] * (width - len(i)) for i in ids])

    def forward(self, images):
        """-> logits over the phrases, of class tokens [n, phrases] and patches [n, 64, phrases]."""
        text = self.text.hidden(self.text.embed(self.phrases))[0][
            torch.arange(len(self.last)), self.last
        ]
        text = torch.nn.functional.normalize(text.float(), dim=-1) * self.scale.exp()
        x, _ = self.vision.hidden(images, self.vision.cfg.n_layers - 1)
        last, _ = self.vision.layers[-1](x)
        whole, patches = self.class_proj(self.norm(last[:, 0])), self.patch_proj(x[:, 1:])
        return tuple(
            torch.nn.functional.normalize(v.float(), dim=-1) @ text.T for v in (whole, patches)
        )


def contrastive_loss(whole, patches, targets, truths):
    log_p = whole.log_softmax(-1)
    image_loss = -(log_p * truths).sum(-1) / truths.sum(-1)  # multi-positive softmax
    flat = torch.nn.functional.cross_entropy(
        patches.flatten(0, 1), targets.flatten(), ignore_index=IGNORE
    )
    return image_loss.mean() + flat


@torch.no_grad()
def picture_accuracy(model, split, n=256):
    """Share of the objects that their patches, averaged, name: (alone in a picture, in a crowd)."""
    hits = {1: [], 0: []}
    names = len(world.CONCEPTS)
    for step in range(2):
        images, targets, _ = picture_batch(split, 78, step, n // 2, 0.3, augment=False)
        with torch.autocast("cpu", torch.bfloat16):
            patches = model(images)[1]
        for logits, target in zip(patches, targets):
            shown = [t for t in target.unique().tolist() if 0 <= t < names]
            for t in shown:
                guess = logits[target == t, :names].log_softmax(-1).mean(0).argmax().item()
                hits[len(shown) == 1].append(guess == t)
    return np.mean(hits[1]) if hits[1] else float("nan"), np.mean(hits[0])


def pretrain_clip(steps, lr, seed, batch=96):
    torch.manual_seed(seed)
    cfg = CLIPVisionConfig(world.SIDE, PATCH, dim=192, hidden_dim=768, n_layers=6, n_heads=3)
    model = Contrast(CLIPVision(cfg), Tokenizer.from_pretrained(MINI / "llm"))
    optimizer = adamw(list(model.parameters()), lr)
    start = time.time()
    bar = tqdm(range(steps), desc="clip")
    for step in bar:
        set_lr(optimizer, lr, step, steps)
        p_single = max(0.0, 1 - step / (0.2 * steps))  # one object first
        images, targets, truths = picture_batch("train", seed, step, batch, p_single)
        with torch.autocast("cpu", torch.bfloat16):
            loss = contrastive_loss(*model(images), targets, truths)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            for split in ("seen", "pairs", "style"):
                alone, crowd = picture_accuracy(model, split)
                tqdm.write(f"step {step + 1}, {time.time() - start:.0f} s, {split}: "
                           f"alone {alone:.1%}, in a crowd {crowd:.1%}")  # fmt: skip
            export_clip(model)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("tokenizer", "llm", "clip"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "tokenizer":
        (MINI / "llm").mkdir(parents=True, exist_ok=True)
        (MINI / "llm" / "tokenizer.json").write_text(json.dumps(train_bpe(corpus(), 1024)))
    elif args.what == "llm":
        pretrain_llm(args.steps, args.lr, args.seed)
    else:
        pretrain_clip(args.steps, args.lr, args.seed)


if __name__ == "__main__":
    main()
