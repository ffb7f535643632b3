"""Ask a model about pictures.

    python sample.py --image cat.jpg                          # describe it
    python sample.py --image cat.jpg --ask "Where is the cat?"
    echo "Is there a dog?" | python sample.py --image cat.jpg
    python sample.py --image cat.jpg --chat                   # a conversation
    python sample.py --image cat.jpg --experts experts.png    # and draw which expert saw what
    python sample.py --model weights/SmolLM2-135M-Instruct --ask "What is a cat?"

The model is the furthest stage found in `out/`, or any checkpoint given with `--model`. That may be
a language model alone; it answers what is asked without a picture.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import stat
import sys
from dataclasses import asdict, dataclass

import torch

from cumo import CuMo
from data.flags import check_device, parse, run
from data.hub import local_folder
from data.images import open_image
from data.tokenizer import Tokenizer
from data.weights import read_config
from data.world import DESCRIBE
from engine.conversation import Conversation, check_options
from engine.quant import quantize
from extras.plots import check_target, draw_routing
from llm import LLM

DTYPES = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
COMMANDS = "/image FILE adds a picture to the next question, /reset forgets all, /quit leaves"


@dataclass
class SampleConfig:
    image: tuple[str, ...] = ()  # the pictures; none: a question without one
    ask: str = ""  # the question; empty: the one piped in, or "Describe the picture."
    chat: bool = False  # a conversation: type questions, see the answers
    json: bool = False  # print each answer as JSON, with its tokens and seconds
    model: str = ""  # a checkpoint; empty: the furthest stage in out/
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    top_k: int = 0  # sample from so many likeliest tokens; 0: from all
    seed: int = 0  # of the sampling
    max_new_tokens: int = 128  # longest answer
    stop: tuple[str, ...] = ()  # end an answer before any of these texts
    context: int = 4096  # tokens of a conversation that are kept, if the model has no window
    experts: str = ""  # draw which expert saw which patch into this file
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    quant: str = ""  # int8: the language model's matrices in one byte a weight (engine/quant.py)
    compile: bool = False  # the steps: some seconds at first (C++ on a CPU, torch.compile on a GPU)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


def find_model(out="out"):
    """The furthest finished stage under `out`. ValueError when there is none."""
    for stage in (3, 2, 1):
        if (pathlib.Path(out) / f"stage{stage}" / "config.json").is_file():
            return pathlib.Path(out) / f"stage{stage}"
    raise ValueError(
        f"no trained model in {out}/; `python train.py` makes one, --model DIR names another"
    )


def load(path, device, dtype=None, quant=""):
    """The CuMo in a folder, or the LLM, if there is nothing else in it."""
    config = read_config(path)
    sees = "vision_config" in config or "mm_vision_tower" in config
    place = "cpu" if quant else device  # where a byte a weight has room, two may have none
    model = (CuMo if sees else LLM).from_pretrained(path, device=place, dtype=dtype).eval()
    if quant:
        quantize(model if isinstance(model, LLM) else model.llm)
    return model.to(device)


# ---------------------------------------------------------------------------- the terminal


@contextlib.contextmanager
def ctrl_c():
    """A function that tells whether Ctrl-C was pressed; it ends an answer and not the program."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def piped():
    """The question that another program or a file hands over, or ""; a pipe is read to its end."""
    kind = os.fstat(0).st_mode if sys.stdin else 0  # None: it was closed
    if stat.S_ISFIFO(kind) and not select.select([0], [], [], 1)[0]:
        print("waiting for a question on the pipe (--ask gives one) ...", file=sys.stderr)
    return sys.stdin.read().strip() if stat.S_ISFIFO(kind) or stat.S_ISREG(kind) else ""


def answer(conversation, cfg, path, question, images, interrupted=lambda: False):
    """Ask, and print the answer as it comes, or as JSON."""
    write = (lambda text: None) if cfg.json else None
    said = conversation.ask(question, images, write, interrupted)
    if cfg.json:
        print(json.dumps(asdict(said) | {"model": str(path)}))
        return
    print()
    if said.dropped:
        print(f"(the oldest turns, {said.dropped}, had no room any more and were dropped)")


def chat(conversation, cfg, path, images):
    """Questions typed line by line, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            line = input("> " * (sys.stdin.isatty() and sys.stdout.isatty())).strip()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/reset":
                conversation.reset()
                images = []
            elif word == "/image" and not rest.strip():
                raise ValueError("/image needs the name of a file: /image cat.jpg")
            elif word == "/image":
                images = [*images, conversation.look(open_image(rest.strip()))]
            elif word.startswith("/"):
                raise ValueError(f"{word} is no command; {COMMANDS}")
            elif line:
                with ctrl_c() as interrupted:
                    answer(conversation, cfg, path, line, images, interrupted)
                images = []
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def main():
    cfg, given = parse(SampleConfig, description=__doc__.split("\n")[0])
    if "ask" in given and cfg.chat:
        raise ValueError("--ask is for one answer; in a --chat the questions are typed")
    if cfg.chat and not sys.stdin:
        raise ValueError("--chat reads questions from standard input, which is closed")
    if cfg.experts and len(cfg.image) != 1:
        raise ValueError(f"--experts {cfg.experts} draws what experts see of one picture, here are "
                         f"{len(cfg.image)}: give --image FILE")  # fmt: skip
    check_target(cfg.experts)
    if cfg.dtype not in DTYPES:
        raise ValueError(f"--dtype {cfg.dtype!r} is unknown; choose float32 or bfloat16")
    if cfg.quant not in ("", "int8"):
        raise ValueError(f"--quant {cfg.quant!r} is unknown; there is int8")
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
    model = load(path, cfg.device, DTYPES[cfg.dtype], cfg.quant)
    if cfg.experts:
        draw_routing(model, images[0], cfg.experts)
    tokenizer = Tokenizer.from_pretrained(path)
    conversation = Conversation(model, tokenizer, compile=cfg.compile, **options)
    if cfg.chat:
        chat(conversation, cfg, path, list(map(conversation.look, images)))
    else:
        answer(conversation, cfg, path, question, images)


if __name__ == "__main__":
    run(main)
