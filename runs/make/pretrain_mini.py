"""Make the miniature pretrained weights: data/mini/llm and data/mini/clip.

CuMo starts from a pretrained language model and a pretrained image encoder. This script trains both
on the emoji world, small enough for a laptop:

    python runs/make/pretrain_mini.py tokenizer    # byte-level BPE, seconds
    python runs/make/pretrain_mini.py llm          # answers questions about scenes in text
    python runs/make/pretrain_mini.py clip         # CLIP training: pictures against phrases

The language model sees no picture. It reads scenes as text (text_world.py), first with short
questions, then mostly in conversations; on signs it reads random letters, never words. CLIP sees
things and signs, but no chart. Of what the split `pairs` holds out they learn nothing but some
answers "no" (docs/RESULTS.md). Neither sees the drawings, signs and bars of `style`.

`--init` continues from weights that this script has written: `llm --init data/mini/llm`, or `clip
--init out/clip --out out` for a folder with heads.pt, which holds the parts of CLIP's training that
are not shipped.
"""

import json
import pathlib
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from clip_moe import CLIPVision, CLIPVisionConfig
from data import world
from data.chat import IGNORE
from data.flags import READ, Parser, run
from data.images import preprocess
from data.signs import LETTERS, random_letters, sample_sign
from data.tokenizer import Tokenizer, train_bpe
from data.weights import write_json, write_tensors
from engine.rate import has_fast_bf16
from llm import LLM, LLMConfig
from runs.make.text_world import FOUND, GRID, PATCH, blur, letter_patches, text_batch

MINI = ROOT / "data" / "mini"
HEADS = "heads.pt"  # all weights of Contrast; not shipped
# The phrases of the text tower are numbered: first the concepts, then the colors, then the letters.
FIRST_COLOR = len(world.CONCEPTS)
FIRST_LETTER = FIRST_COLOR + len(world.COLORS)


def corpus(n=6000):
    """Text for the tokenizer: captions, questions and answers in their template, and names."""
    for i in range(n):
        rng = np.random.default_rng((9, i))
        scene = world.sample_things(rng, "train")
        yield from (world.caption(scene) + "\n", world.short_caption(scene) + "\n")
        several = world.conversation(world.sample_scenes(rng, "train", 3, "things"), rng, 4)
        turns = world.questions(scene, rng, 4) + several
        yield from (f"[INST] {q} [/INST] {a} " for _, q, a in turns)
        yield " ".join(["", world.DESCRIBE, *(o.name for o in scene.objects), scene.background])


def export(folder, tensors, config):
    """Write a Hugging Face directory, in bfloat16 like most public weights."""
    write_tensors(folder, {name: t.to(torch.bfloat16) for name, t in tensors.items()})
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})


def adamw(parameters, lr):
    """AdamW with weight decay for matrices only."""
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def set_lr(optimizer, lr, step, steps):
    """Warm up for 100 steps, stay constant, decay to zero over the second half."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, (step + 1) / 100) * min(1, 2 * (1 - step / steps))


def update(optimizer, parameters):
    """One step with the gradients of all `parameters`, clipped to norm 1."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------ language model


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


def pretrain_llm(steps, out, lr=1e-3, seed=0, init=None):
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_pretrained(MINI / "llm")
    cfg = LLMConfig(vocab_size=tokenizer.vocab_size, dim=256, hidden_dim=512, n_layers=5, n_heads=8,
                    n_kv_heads=4, tie_embeddings=True, max_positions=2048)  # fmt: skip
    llm = LLM(cfg)
    torch.nn.init.normal_(llm.model.embed_tokens.weight, std=0.1)  # smaller ones get lost
    if init:
        llm = LLM.from_pretrained(init)
    probes = Probes(llm)
    trained = [*llm.parameters(), *probes.parameters()]
    optimizer = adamw(trained, lr)
    for block in llm.model.layers:
        block.compile(dynamic=False)
    start = time.time()
    bar = tqdm(range(steps), desc="llm")
    for step in bar:
        set_lr(optimizer, lr, step, steps)
        # Short questions about clean pictures come first: with noise, the look-up does not form.
        short = 0.35 if init else 1.0 if step < 0.2 * steps else 0.25
        noise = 1.0 if init else min(1.0, max(0.0, 8 * step / steps - 1))
        batch, _ = text_batch(tokenizer, "train", seed, step, short, noise)
        with torch.autocast("cpu", torch.bfloat16, has_fast_bf16("cpu")):
            x = blur(llm.embed(batch["tokens"]), batch["place"], noise)
            x, _ = llm.hidden(x, batch["segments"])
            loss = llm.loss(x, batch["labels"])
            *looked_up, spelled = probes.losses(llm, batch)
        # The weights of the probes fall to 0: of looking up at half-time, of spelling at the end.
        weight = 1 - step / steps
        early = 0.0 if init else max(0.0, 2 * weight - 1)
        (loss + early * sum(looked_up) + weight * spelled).backward()
        update(optimizer, trained)
        probed = " ".join(f"{probe.item():.2f}" for probe in (*looked_up, spelled))
        bar.set_postfix(loss=f"{loss.item():.3f}", probes=probed)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            for split, noise in (("new", 0.0), ("new", 1.0), ("pairs", 1.0)):
                hits = text_answers(llm, tokenizer, split, noise)
                shares = {of_type: np.mean(right) for of_type, right in hits.items()}
                row = " ".join(f"{of_type} {share:.0%}" for of_type, share in shares.items())
                mean = np.mean([shares[of_type] for of_type in shares if of_type != "describe"])
                tqdm.write(f"step {step + 1}, {time.time() - start:.0f} s, {split}"
                           f"{' with noise' * (noise > 0)} {mean:.1%}: {row}")  # fmt: skip
            export_llm(llm, tokenizer, out)


# ------------------------------------------------------------------------------ CLIP


def phrases():
    """The phrases of the text tower: every concept, every color, every letter."""
    concepts = [world.a(concept) for concept in world.CONCEPTS]
    colors = [f"a {color} background" for color in world.COLORS]
    return concepts + colors + [f"the sign {letter}" for letter in LETTERS]


def patch_targets(scene):
    """The index of the phrase of each of the 64 patches; IGNORE at the border of an object, a sign
    or a letter. A plate counts as background of its color; bars of a chart are not seen."""
    color_index = lambda color: FIRST_COLOR + list(world.COLORS).index(color)
    target = np.full((GRID, GRID), color_index(scene.background))
    y, x = np.mgrid[:GRID, :GRID] * PATCH + PATCH / 2
    for o in scene.objects:
        left, top, size = o.box
        distance = np.hypot(x - left - size / 2, y - top - size / 2) / size
        target[distance < 0.6] = IGNORE
        target[distance < 0.45] = world.CONCEPTS.index(o.name)
    for sign in scene.signs:
        left, top, width, height = sign.box
        beyond_x = np.abs(x - left - width / 2) - width / 2  # pixels from the edge of the plate
        beyond = np.maximum(beyond_x, np.abs(y - top - height / 2) - height / 2)
        target[beyond < 4] = IGNORE
        target[beyond < -1] = color_index(sign.plate)
        letters = letter_patches(sign, x, y)
        for _, distance in letters:
            target[distance < 0.2] = IGNORE
        for letter, distance in letters:
            target[distance <= 0] = FIRST_LETTER + LETTERS.index(letter)
    return target.ravel()


def sample_sheet(rng):
    """A scene of three lines of random letters and digits: many letters in one picture."""
    background, signs, third = world.pick(rng, *world.COLORS), [], world.SIDE // 3
    for k in range(3):
        text = random_letters(rng, int(rng.integers(3, 6)))
        sign = sample_sign(rng, "train", "in the middle", background, text)
        left, _, width, height = sign.box
        height = min(height, third)
        top = third * k + int(rng.integers(third + 1 - height))
        signs.append(replace(sign, box=(left, top, width, height)))
    return world.Scene(background, (), "noto", tuple(signs))


def sample_picture(rng, split, p_single, signs):
    """A scene of things (with chance `p_single` a single one) or, with chance `signs`, of signs. In
    training, half of the latter are sheets of letters, a quarter scenes of stage 1."""
    single = rng.random() < p_single
    n_objects = 1 if single else int(rng.choice(4, p=(0.15, 0.1, 0.25, 0.5))) + 1
    if rng.random() >= signs:
        return world.sample_things(rng, split, n_objects if split == "train" else None)
    which = rng.random() if split == "train" else 1
    scene = world.sample_scene(rng, split, "words")
    if which < 0.5:
        return sample_sheet(rng)
    return world.sample_one(rng, split) if which < 0.75 else scene


def picture_batch(split, seed, step, n, p_single, augment=True, signs=0.0):
    """`n` scenes -> images [n, 3, 64, 64], patch targets [n, 64], and which phrases are true [n,
    phrases]: those of the patches, without letters."""
    images, targets, truths = [], [], np.zeros((n, len(phrases())), dtype=bool)
    for i in range(n):
        rng = np.random.default_rng((seed, world.SPLITS.index(split), step, i))
        scene = sample_picture(rng, split, p_single, signs)
        images.append(preprocess(world.draw(scene, rng if augment else None), world.SIDE))
        targets.append(patch_targets(scene))
        seen = targets[-1]
        truths[i, seen[(seen >= 0) & (seen < FIRST_LETTER)]] = True
    return torch.stack(images), torch.from_numpy(np.stack(targets)), torch.from_numpy(truths)


class Contrast(torch.nn.Module):
    """CLIP's two towers with a shared space of 128 features; only `vision` is exported.

    The class token (after the last layer) is trained towards all phrases that are true of the
    picture. Each patch, in the layer that CuMo uses (the last but one), is trained towards the
    phrase of its region.
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
        """Logits over the phrases: of class tokens [n, phrases] and patches [n, 64, phrases]."""
        normalize = torch.nn.functional.normalize
        text, _ = self.text.hidden(self.text.embed(self.phrases))
        text = text[torch.arange(len(self.last)), self.last]  # at the last token of each phrase
        text = normalize(text.float(), dim=-1) * self.scale.exp()
        x, _ = self.vision.hidden(images, self.vision.cfg.n_layers - 1)
        last, _ = self.vision.layers[-1](x[: len(x) // 4])  # a quarter, to save time
        whole, patches = self.class_proj(self.norm(last[:, 0])), self.patch_proj(x[:, 1:])
        return tuple(normalize(seen.float(), dim=-1) @ text.T for seen in (whole, patches))


def contrastive_loss(whole, patches, targets, truths):
    log_p, truths = whole.log_softmax(-1), truths[: len(whole)]
    image_loss = -(log_p * truths).sum(-1) / truths.sum(-1).clamp(min=1)  # multi-positive softmax
    cross_entropy = torch.nn.functional.cross_entropy
    patch_loss = cross_entropy(patches.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    return image_loss.mean() + patch_loss


@torch.no_grad()
def picture_accuracy(model, split, n=256):
    """Share of objects that the mean logits of their patches classify correctly: (alone in a
    picture, with others)."""
    hits = {True: [], False: []}
    for step in range(2):
        images, targets, _ = picture_batch(split, 78, step, n // 2, 0.3, augment=False)
        with torch.autocast("cpu", torch.bfloat16, has_fast_bf16("cpu")):
            patches = model(images)[1]
        for logits, target in zip(patches, targets):
            shown = [t for t in target.unique().tolist() if 0 <= t < FIRST_COLOR]
            for t in shown:
                guess = logits[target == t, :FIRST_COLOR].log_softmax(-1).mean(0).argmax().item()
                hits[len(shown) == 1].append(guess == t)
    return np.mean(hits[True]) if hits[True] else float("nan"), np.mean(hits[False])


@torch.no_grad()
def letter_accuracy(model, split, n=128):
    """Share of patches with a letter whose most likely phrase is that letter's."""
    images, targets, _ = picture_batch(split, 79, 0, n, 0, augment=False, signs=1.0)
    letters = targets >= FIRST_LETTER
    with torch.autocast("cpu", torch.bfloat16, has_fast_bf16("cpu")):
        patches = model(images)[1]
    return (patches[letters].argmax(-1) == targets[letters]).float().mean().item()


def export_clip(model, out):
    """Write the vision tower and the norm of its class token; all weights go to heads.pt."""
    norm = {f"vision_model.post_layernorm.{name}": t for name, t in model.norm.state_dict().items()}
    config = {"architectures": ["CLIPVisionModel"]} | model.vision.cfg.to_hf()
    export(out / "clip", model.vision.public_state_dict() | norm, config)
    torch.save(model.state_dict(), out / "clip" / HEADS)


def load_heads(model, folder):
    """Load the weights with which `--init` continues. ValueError if `folder` has none that fit."""
    file = pathlib.Path(folder, HEADS)
    if not file.is_file():
        raise ValueError(f"--init {folder} has no {HEADS}, which continues a training of CLIP; "
                         "give the clip/ that this script wrote, or leave out --init")  # fmt: skip
    try:
        model.load_state_dict(torch.load(file))
    except RuntimeError as error:
        raise ValueError(f"--init {file} is of another model: {error}") from None


def pretrain_clip(steps, out, lr=1e-3, seed=0, init=None, signs=0.5, hidden_dim=768, batch=96):
    torch.manual_seed(seed)
    cfg = CLIPVisionConfig(world.SIDE, PATCH, dim=192, hidden_dim=hidden_dim, n_layers=6,
                           n_heads=3)  # fmt: skip
    model = Contrast(CLIPVision(cfg), Tokenizer.from_pretrained(MINI / "llm"))
    if init:
        load_heads(model, init)
    optimizer = adamw([*model.parameters()], lr)
    for block in model.vision.layers:
        block.compile(dynamic=False)
    start = time.time()
    bar = tqdm(range(steps), desc="clip")
    for step in bar:
        set_lr(optimizer, lr, step, steps)
        # Pictures of one object come first.
        p_single = 0.0 if init else max(0.0, 1 - step / (0.1 * steps))
        images, targets, truths = picture_batch("train", seed, step, batch, p_single, signs=signs)
        with torch.autocast("cpu", torch.bfloat16, has_fast_bf16("cpu")):
            loss = contrastive_loss(*model(images), targets, truths)
        loss.backward()
        update(optimizer, model.parameters())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 250 == 0 or step + 1 == steps:
            for split in ("new", "pairs", "style"):
                alone, crowd = picture_accuracy(model, split)
                tqdm.write(f"step {step + 1}, {time.time() - start:.0f} s, {split}: "
                           f"alone {alone:.1%}, with others {crowd:.1%}, "
                           f"letters {letter_accuracy(model, split):.1%}")  # fmt: skip
            export_clip(model, out)


def check_flags(what, given):
    """ValueError for a flag without effect on `what`, or out of range."""
    known = {"tokenizer": (), "llm": ("steps", "lr", "seed", "init"),
             "clip": ("steps", "lr", "seed", "init", "signs", "hidden_dim")}[what]  # fmt: skip
    for flag, value in given.items():
        if flag not in known:
            raise ValueError(f"--{flag.replace('_', '-')} has no effect on {what}")
        if flag in ("steps", "lr", "hidden_dim") and value <= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {value} must be above 0")
        if flag == "signs" and not 0 <= value <= 1:
            raise ValueError(f"--signs {value} must be from 0 to 1")


def main():
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("tokenizer", "llm", "clip"))
    parser.add_argument("--steps", type=READ[int], help="default: 5000 (llm), 6500 (clip)")
    parser.add_argument("--lr", type=READ[float], help="peak learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=READ["seed"], help="default: 0")
    parser.add_argument("--init", help=f"continue from this folder (clip: one with {HEADS})")
    parser.add_argument("--out", type=pathlib.Path, default=MINI, help="write llm/ or clip/ here")
    parser.add_argument("--signs", type=READ[float], help="share of signs (clip; default: 0.5)")
    parser.add_argument("--hidden-dim", type=READ[int], help="of the MLPs (clip; default: 768)")
    args = parser.parse_args()
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("what", "out")}
    check_flags(args.what, given)
    if args.what == "tokenizer":
        (args.out / "llm").mkdir(parents=True, exist_ok=True)
        (args.out / "llm" / "tokenizer.json").write_text(json.dumps(train_bpe(corpus(), 1024)))
    elif args.what == "llm":
        pretrain_llm(**{"steps": 5000, "out": args.out} | given)
    else:
        pretrain_clip(**{"steps": 6500, "out": args.out} | given)


if __name__ == "__main__":
    run(main)
