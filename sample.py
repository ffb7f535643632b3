"""Ask a model about a picture.

    python sample.py --image cat.jpg                          # describe it
    python sample.py --image cat.jpg --ask "Where is the cat?"
    python sample.py --image cat.jpg --experts experts.png    # and draw which expert saw what
    python sample.py --model weights/SmolLM2-135M-Instruct --ask "What is a cat?"

The model is the furthest stage found in `out/`, or any checkpoint given with `--model`. That may be
a language model alone; it answers what is asked without a picture.
"""

import pathlib
from dataclasses import dataclass

import torch

from cumo import CuMo, check_device
from data.chat import IMAGE_TAG, render, template_of
from data.flags import parse, run
from data.images import open_image, preprocess, squared
from data.tokenizer import Tokenizer
from data.weights import read_config
from data.world import DESCRIBE
from llm import LLM
from plots import draw_experts


@dataclass
class SampleConfig:
    image: str = ""  # the picture; empty: a question without one
    ask: str = ""  # the question; empty: "Describe the picture."
    model: str = ""  # a checkpoint; empty: the furthest stage in out/
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    seed: int = 0  # of the sampling
    max_new_tokens: int = 128  # longest answer
    experts: str = ""  # draw which expert saw which patch into this file
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


def find_model(out="out"):
    """The furthest finished stage under `out`. ValueError when there is none."""
    for stage in (3, 2, 1):
        if (pathlib.Path(out) / f"stage{stage}" / "config.json").is_file():
            return pathlib.Path(out) / f"stage{stage}"
    raise ValueError(
        f"no trained model in {out}/; `python train.py` makes one, --model DIR names another"
    )


def load(path, device):
    """The CuMo in a folder, or the LLM, if there is nothing else in it."""
    config = read_config(path)
    sees = "vision_config" in config or "mm_vision_tower" in config
    return (CuMo if sees else LLM).from_pretrained(path, device=device).eval()


def prompt(model, tokenizer, question, images):
    """A question about `images` (PIL) -> (tokens [1, T], pixels [n, 3, S, S] or None)."""
    if not question.strip():
        raise ValueError('the question is empty; ask something, as in --ask "What is this?"')
    value = f"{IMAGE_TAG}\n" * len(images) + question.replace(IMAGE_TAG, "")
    turns = [{"from": "human", "value": value}]
    if isinstance(model, LLM):
        if images:
            raise ValueError("this is a language model alone, it sees nothing; leave out --image")
        template = template_of(tokenizer)
        ids, _ = render(turns, tokenizer, template, where="--ask")
        second = template == "mistral_instruct"  # the second <s> is CuMo's, no Mistral knows it
        return torch.tensor([ids[second:]]), None
    ids, _ = render(turns, tokenizer, model.cfg.template, model.image_tokens, len(images), "--ask")
    size, mode = model.cfg.vision.image_size, model.cfg.image_mode
    pixels = torch.stack([preprocess(i, size, mode) for i in images]) if images else None
    return torch.tensor([ids]), pixels


@torch.no_grad()
def routing(model, pixels):
    """Where the patches of a picture [3, S, S] go -> ({name of a sparse block: the expert that each
    patch chose first [rows, columns]}, {name: each expert's share of all choices}); {} if dense."""
    _, aux = model.encode_images(pixels[None].to(model.device), with_aux=True)
    choices, load = {}, {}
    if aux["clip"]:  # at several scales: the choices of the whole image, the load of its tiles too
        for layer, (choice, share) in enumerate(zip(aux["clip"].choice, aux["clip"].load)):
            choices[f"CLIP layer {layer}"] = choice[0, 1:, 0]  # the class token is no patch
            load[f"CLIP layer {layer}"] = share
    if aux["mlp"]:
        choices["connector"], load["connector"] = aux["mlp"].choice[0, :, 0], aux["mlp"].load
    side = int(model.image_tokens**0.5)
    choices = {name: choice.view(side, side).cpu().numpy() for name, choice in choices.items()}
    return choices, {name: share.tolist() for name, share in load.items()}


def draw_routing(model, image, file):
    """Draw which expert sees which patch of `image` (PIL). ValueError when none sees any."""
    choices = {}
    if not isinstance(model, LLM):
        size, mode = model.cfg.vision.image_size, model.cfg.image_mode
        choices, load = routing(model, preprocess(image, size, mode))
    if not choices:
        raise ValueError(f"--experts {file}: no expert of this model sees pictures; leave it out, "
                         "or give a sparse --model (train.py --stage 3 makes one)")  # fmt: skip
    draw_experts(squared(image, 336, mode), choices, load, file)  # sharper than a small CLIP's 64


class Printer:
    """Prints ids as text as they come, whole characters at a time."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.text = tokenizer, [], ""

    def __call__(self, ids):
        self.ids += ids.flatten().tolist() if hasattr(ids, "flatten") else list(ids)
        text = self.tokenizer.decode(self.ids).strip()  # blanks wait for what follows them
        if not text.endswith("\ufffd"):
            print(text[len(self.text) :], end="", flush=True)
            self.text = text


def main():
    cfg, given = parse(SampleConfig, description=__doc__.split("\n")[0])
    question = cfg.ask if "ask" in given else DESCRIBE
    if not cfg.image and "ask" not in given:
        raise ValueError("nothing to do; give --image FILE, --ask QUESTION, or both")
    if cfg.experts and not cfg.image:
        raise ValueError(f"--experts {cfg.experts} draws what experts see: give --image FILE too")
    images = [open_image(cfg.image)] if cfg.image else []
    check_device(cfg.device)
    path = cfg.model or find_model()
    model = load(path, cfg.device)
    if cfg.experts:
        draw_routing(model, images[0], cfg.experts)
    tokenizer = Tokenizer.from_pretrained(path)
    tokens, pixels = prompt(model, tokenizer, question, images)
    seen = {} if pixels is None else {"images": pixels.to(cfg.device)}
    model.generate(
        tokens.to(cfg.device),
        **seen,
        max_new_tokens=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        seed=cfg.seed,
        eos_token_id=tokenizer.eos,
        stream=Printer(tokenizer),
    )
    print()


if __name__ == "__main__":
    run(main)
