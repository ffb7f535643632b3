"""Ask a model about pictures.

    python sample.py --image cat.jpg                          # describe it
    python sample.py --image cat.jpg --ask "Where is the cat?"
    echo "Is there a dog?" | python sample.py --image cat.jpg
    python sample.py --image cat.jpg --chat                   # a conversation
    python sample.py --image cat.jpg --experts experts.png    # also draw the routing
    python sample.py --model weights/SmolLM2-135M-Instruct --ask "What is a cat?"

The model is the last finished stage in `out/`, or any checkpoint given with `--model`. A language
model alone works too: it answers questions without a picture.
"""

import json
import os
import pathlib
import select
import stat
import sys
from dataclasses import asdict, dataclass
from functools import partial

import torch

from cumo import CuMo
from data.flags import check_choice, check_device, check_options, parse, run
from data.hub import local_folder
from data.images import open_image
from data.tokenizer import Tokenizer
from data.weights import read_config
from data.world import DESCRIBE
from engine.conversation import Conversation, chat
from engine.quant import quantize
from llm import LLM

DTYPES = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class SampleConfig:
    image: tuple[str, ...] = ()  # pictures; empty: a question without one
    ask: str = ""  # the question; empty: the one piped in, or "Describe the picture."
    chat: bool = False  # a conversation: type questions, read answers
    json: bool = False  # print each answer as JSON, with its tokens and seconds
    model: str = ""  # a checkpoint; empty: the last finished stage in out/
    temperature: float = 0.0  # 0: always the most probable token
    top_p: float = 1.0  # sample from the most probable tokens that together reach this probability
    top_k: int = 0  # sample from this many most probable tokens; 0: from all
    seed: int = 0  # of the sampling
    max_new_tokens: int = 128  # longest answer
    stop: tuple[str, ...] = ()  # end an answer before any of these texts
    context: int = 4096  # tokens of a conversation to keep, if the model has no window
    experts: str = ""  # draw which expert each patch is routed to, into this file
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    quant: str = ""  # int8: the language model's matrices in one byte a weight (engine/quant.py)
    compile: bool = False  # faster steps after some seconds (C++ on a CPU, torch.compile on a GPU)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


def find_model(out="out"):
    """The last finished stage under `out`. ValueError when there is none."""
    for stage in (3, 2, 1):
        if (pathlib.Path(out) / f"stage{stage}" / "config.json").is_file():
            return pathlib.Path(out) / f"stage{stage}"
    raise ValueError(
        f"no trained model in {out}/; `python train.py` makes one, --model DIR names another"
    )


def load_model(path, device, dtype=None, quant=""):
    """The CuMo in a folder, or the LLM if the folder holds nothing else."""
    config = read_config(path)
    sees = "vision_config" in config or "mm_vision_tower" in config
    place = "cpu" if quant else device  # quantize there: the GPU may not hold the full weights
    model = (CuMo if sees else LLM).from_pretrained(path, device=place, dtype=dtype).eval()
    if quant:
        quantize(model if isinstance(model, LLM) else model.llm)
    return model.to(device)


def piped():
    """The question from a pipe or a file, "" if there is none; a pipe is read to its end."""
    kind = os.fstat(0).st_mode if sys.stdin else 0  # None: it was closed
    if stat.S_ISFIFO(kind) and not select.select([0], [], [], 1)[0]:
        print("waiting for a question on the pipe (--ask gives one) ...", file=sys.stderr)
    return sys.stdin.read().strip() if stat.S_ISFIFO(kind) or stat.S_ISREG(kind) else ""


def print_answer(conversation, cfg, path, question, images, interrupted=lambda: False):
    """Ask, and print the answer while it comes, or as JSON."""
    write = (lambda text: None) if cfg.json else None
    answer = conversation.ask(question, images, write, interrupted)
    if cfg.json:
        print(json.dumps(asdict(answer) | {"model": str(path)}))
        return
    print()
    if answer.dropped:
        print(f"(the oldest turns were dropped for lack of room: {answer.dropped})")


def check(cfg, given):
    """ValueError for impossible flags, before a large model is loaded."""
    if "ask" in given and cfg.chat:
        raise ValueError("--ask is for one answer; in a --chat the questions are typed")
    if cfg.chat and not sys.stdin:
        raise ValueError("--chat reads questions from standard input, which is closed")
    if cfg.experts:
        from extras.plots import check_target

        if len(cfg.image) != 1:
            raise ValueError(f"--experts {cfg.experts} draws the routing of one picture, not of "
                             f"{len(cfg.image)}: give --image FILE")  # fmt: skip
        check_target(cfg.experts)
    check_choice("dtype", cfg.dtype, DTYPES)
    check_choice("quant", cfg.quant, ("", "int8"))


def main():
    cfg, given = parse(SampleConfig, description=__doc__.split("\n")[0])
    check(cfg, given)
    options = dict(context=cfg.context, stop=cfg.stop, max_new_tokens=cfg.max_new_tokens,
                   temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k or None,
                   seed=cfg.seed)  # fmt: skip
    check_options(**options)
    images = [open_image(file) for file in cfg.image]
    question = cfg.ask if "ask" in given or cfg.chat else piped() or DESCRIBE * bool(images)
    if not (cfg.chat or images or "ask" in given or question):
        raise ValueError("nothing to do; give --image FILE, --ask QUESTION, or both")
    check_device(cfg.device)
    path = local_folder(cfg.model) if cfg.model else find_model()
    model = load_model(path, cfg.device, DTYPES[cfg.dtype], cfg.quant)
    if cfg.experts:
        from extras.plots import draw_routing

        draw_routing(model, images[0], cfg.experts)
    talk = Conversation(model, Tokenizer.from_pretrained(path), compile=cfg.compile, **options)
    answer = partial(print_answer, talk, cfg, path)
    if cfg.chat:
        chat(talk, answer, images)
    else:
        answer(question, images)


if __name__ == "__main__":
    run(main)
