"""Ask a model about pictures.

    python sample.py --image cat.jpg                          # describe it
    python sample.py --image cat.jpg --ask "Where is the cat?"
    echo "Is there a dog?" | python sample.py --image cat.jpg --ask -
    python sample.py --image cat.jpg --chat                   # a conversation
    python sample.py --image cat.jpg --experts experts.png    # also draw the routing
    python sample.py --model weights/SmolLM2-135M-Instruct --ask "What is a cat?"

The model is the last finished stage in `out/`, or any checkpoint given with `--model`. A language
model alone works too: it answers questions without a picture. A chat is about its last picture.
"""

import data  # noqa: F401  isort: skip  before torch: sets how OpenMP waits
import json
import select
import sys
from dataclasses import asdict, dataclass
from functools import partial

import torch

from cumo import CuMo
from data.chat_template import TEMPLATES
from data.flags import check_choice, check_device, check_options, parse, run, unescape
from data.hub import find_model
from data.images import open_image
from data.tokenizer import Tokenizer
from data.weights import read_config
from data.world import DESCRIBE
from engine.conversation import Conversation, chat, ctrl_c, set_template
from engine.quant import quantize
from llm import LLM

DTYPES = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class SampleConfig:
    image: tuple[str, ...] = ()  # pictures of one question, where it says <image> or before it
    ask: str = ""  # the question; -: read it from a pipe; not given: "Describe the picture."
    chat: bool = False  # a conversation: type questions, read answers
    json: bool = False  # print each answer as JSON, with its tokens and seconds
    model: str = ""  # a checkpoint or a folder of stages; empty: the last finished stage in out/
    template: str = ""  # how to ask; empty: as the model has learned, see data/chat_template.py
    temperature: float = 0.0  # 0: always the most probable token
    top_p: float = 1.0  # sample from the most probable tokens that together reach this probability
    top_k: int = 0  # sample from this many most probable tokens; 0: from all
    seed: int = 0  # of the sampling
    max_new_tokens: int = 128  # longest answer
    stop: tuple[str, ...] = ()  # end an answer before any of these texts; \n is a line break
    context: int = 4096  # tokens of a conversation to keep, if the model has no window
    experts: str = ""  # draw which expert each patch is routed to, into this file
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    quant: str = ""  # int8: the language model's matrices in one byte a weight (engine/quant.py)
    compile: bool = False  # faster steps, after seconds (C++ on a CPU) or a minute (a CUDA graph)
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


def load_model(path, device, dtype=None, quant=""):
    """The CuMo in a folder, or the LLM if the folder holds nothing else."""
    config = read_config(path)
    sees = "vision_config" in config or "mm_vision_tower" in config
    place = "cpu" if quant else device  # quantize there: the GPU may not hold the full weights
    model = (CuMo if sees else LLM).from_pretrained(path, device=place, dtype=dtype).eval()
    if quant:
        quantize(model if isinstance(model, LLM) else model.llm)
    return model.to(device)


def read_question():
    """The question on standard input, which is read to its end (--ask -)."""
    if sys.stdin and not select.select([0], [], [], 1)[0]:
        print("waiting for a question on standard input (Ctrl-D ends it) ...", file=sys.stderr)
    return sys.stdin.read().strip() if sys.stdin else ""  # None: it was closed


def print_answer(conversation, cfg, path, question, images, interrupted):
    """Ask, and print the answer while it comes, or as JSON. Notes about it go to stderr."""
    if isinstance(conversation.model, CuMo) and not (images or conversation.turns):
        how = "/image FILE" if cfg.chat else "--image FILE"
        print(f"(no picture in this conversation; {how} adds one)", file=sys.stderr)
    write = (lambda text: None) if cfg.json else None
    answer = conversation.ask(question, images, write, interrupted)
    asked = {"question": question, "images": [image.filename for image in images]}
    print(json.dumps(asked | asdict(answer) | {"model": str(path)}) if cfg.json else "")
    if answer.finish_reason == "length" and not cfg.json:
        print(f"(cut: --max-new-tokens {cfg.max_new_tokens} allows no more)", file=sys.stderr)
    if answer.dropped and not cfg.json:
        print(f"(the oldest turns were dropped for lack of room: {answer.dropped})")
    return answer


def check(cfg, given):
    """ValueError for impossible flags, before a large model is loaded."""
    if "ask" in given and cfg.chat:
        raise ValueError("--ask is for one answer; in a --chat the questions are typed")
    if cfg.chat and not sys.stdin:
        raise ValueError("--chat reads questions from standard input, which is closed")
    if not (cfg.chat or cfg.image or "ask" in given):
        raise ValueError("nothing to do; give --image FILE, --ask QUESTION, or both")
    if cfg.experts:
        from extras.plots import check_target

        if len(cfg.image) != 1:
            raise ValueError(f"--experts {cfg.experts} draws the routing of one picture, not of "
                             f"{len(cfg.image)}: give --image FILE")  # fmt: skip
        check_target(cfg.experts, cfg.image)
    for name in ("top_p", "top_k", "seed"):
        if name in given and not cfg.temperature:
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --temperature: 0 "
                             "takes the most probable token; add --temperature 0.7")  # fmt: skip
    check_choice("dtype", cfg.dtype, DTYPES)
    check_choice("quant", cfg.quant, ("", "int8"))
    check_choice("template", cfg.template, ("", *TEMPLATES[1:]))


def main():
    cfg, given = parse(SampleConfig, description=__doc__.split("\n")[0])
    stop = tuple(unescape(text) for text in cfg.stop)
    options = dict(context=cfg.context, stop=stop, max_new_tokens=cfg.max_new_tokens,
                   temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k or None,
                   seed=cfg.seed)  # fmt: skip
    check_options(**options)
    check(cfg, given)
    images = [open_image(file) for file in cfg.image]
    check_device(cfg.device)
    path = find_model(cfg.model)
    question = read_question() if cfg.ask == "-" else cfg.ask if "ask" in given else DESCRIBE
    model = load_model(path, cfg.device, DTYPES[cfg.dtype], cfg.quant)
    if cfg.experts:
        from extras.plots import draw_routing

        draw_routing(model, images[0], cfg.experts)
    tokenizer = Tokenizer.from_pretrained(path)
    set_template(model, tokenizer, cfg.template)
    talk = Conversation(model, tokenizer, compile=cfg.compile, **options)
    answer = partial(print_answer, talk, cfg, path)
    if cfg.chat:
        return chat(talk, answer, images)
    with ctrl_c() as interrupted:
        if answer(question, images, interrupted).finish_reason == "interrupted":
            raise KeyboardInterrupt


if __name__ == "__main__":
    run(main)
