"""Pretrain the miniature's CLIP: pictures against phrases.

    python runs/make/pretrain_clip.py                             # writes data/mini/clip
    python runs/make/pretrain_clip.py --init out/clip --out out   # continues from these weights

CuMo starts from a pretrained image encoder. This one learns the emoji world and is small enough for
a laptop. It sees things and signs, but no chart, nothing that the split `pairs` holds out, and not
the drawings and signs of `style`.

`--init` needs a folder with heads.pt, which this script writes: it holds the parts of CLIP's
training that are not shipped.
"""

import pathlib
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from clip_moe import CLIPVision, CLIPVisionConfig
from data import world
from data.chat import IGNORE
from data.flags import check_numbers, parse, run
from data.images import preprocess
from data.signs import LETTERS, random_letters, sample_sign
from data.tokenizer import Tokenizer
from engine.rate import has_fast_bf16
from llm import LLM, LLMConfig
from runs.make.pretraining import MINI, adamw, export, set_lr, update
from runs.make.text_world import GRID, PATCH, letter_patches

BATCH = 96  # pictures of a step
HEADS = "heads.pt"  # all weights of Contrast; not shipped
# The phrases of the text tower are numbered: first the concepts, then the colors, then the letters.
FIRST_COLOR = len(world.CONCEPTS)
FIRST_LETTER = FIRST_COLOR + len(world.COLORS)


@dataclass
class PretrainCLIPConfig:
    steps: int = 6500  # optimizer steps
    lr: float = 1e-3  # peak learning rate
    seed: int = 0  # seeds the weights and the scenes
    init: str = ""  # folder with heads.pt to continue from; empty: new weights
    out: str = str(MINI)  # folder; clip/ is written there
    signs: float = 0.5  # share of the pictures that show signs
    hidden_dim: int = 768  # hidden features of the vision tower's MLPs


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


def pretrain_clip(cfg):
    torch.manual_seed(cfg.seed)
    vision = CLIPVision(CLIPVisionConfig(world.SIDE, PATCH, dim=192, hidden_dim=cfg.hidden_dim,
                                         n_layers=6, n_heads=3))  # fmt: skip
    model = Contrast(vision, Tokenizer.from_pretrained(MINI / "llm"))
    if cfg.init:
        load_heads(model, cfg.init)
    optimizer = adamw([*model.parameters()], cfg.lr)
    for block in model.vision.layers:
        block.compile(dynamic=False)
    start = time.time()
    bar = tqdm(range(cfg.steps), desc="clip")
    for step in bar:
        set_lr(optimizer, cfg.lr, step, cfg.steps)
        # Pictures of one object come first.
        p_single = 0.0 if cfg.init else max(0.0, 1 - step / (0.1 * cfg.steps))
        images, targets, truths = picture_batch("train", cfg.seed, step, BATCH, p_single,
                                                signs=cfg.signs)  # fmt: skip
        with torch.autocast("cpu", torch.bfloat16, has_fast_bf16("cpu")):
            loss = contrastive_loss(*model(images), targets, truths)
        loss.backward()
        update(optimizer, model.parameters())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % 250 == 0 or step + 1 == cfg.steps:
            for split in ("new", "pairs", "style"):
                alone, crowd = picture_accuracy(model, split)
                tqdm.write(f"step {step + 1}, {time.time() - start:.0f} s, {split}: "
                           f"alone {alone:.1%}, with others {crowd:.1%}, "
                           f"letters {letter_accuracy(model, split):.1%}")  # fmt: skip
            export_clip(model, pathlib.Path(cfg.out))


def main():
    cfg, _ = parse(PretrainCLIPConfig, description=__doc__)
    if not 0 <= cfg.signs <= 1:
        raise ValueError(f"--signs {cfg.signs} must be from 0 to 1")
    check_numbers(cfg, above_0=("steps", "lr", "hidden_dim"))
    pretrain_clip(cfg)


if __name__ == "__main__":
    run(main)
