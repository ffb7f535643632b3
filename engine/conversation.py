"""A conversation with a model: questions about pictures, answers as they come.

    talk = Conversation(model, tokenizer, max_new_tokens=128)
    talk.ask("Where is the cat?", [Image.open("cat.jpg")]).answer
    talk.ask("And the dog?").answer

As long as there is room, nothing is computed twice. The language model's cache holds keys and
values of all that was said, so a question costs its own tokens and those of its pictures alone:

    <s>[INST] <image> Where is it? [/INST] left </s>[INST] And the dog? [/INST] ...
    '------------------ in the cache ----------'    '------- new -------'

When the cache is full, the oldest turns are dropped (the last picture stays) and half the room is
read again. A model with a sliding window has a ring for a cache, in which there is always room.
"""

import time
from dataclasses import dataclass, replace

import torch

from data.chat import IMAGE_TAG, render, render_next, template_of
from data.images import preprocess
from llm import LLM, OPTIONS, Cache


def prompt(model, tokenizer, question, images=(), first=True):
    """A question about `images` (PIL) -> (its ids, pixels [n, 3, S, S] or None). If it is not the
    `first` one, the ids are those that go on behind an answer."""
    if not question.replace(IMAGE_TAG, "").strip():
        raise ValueError('the question is empty; ask something, as in --ask "What is this?"')
    if isinstance(model, LLM) and images:
        raise ValueError("this is a language model alone, it sees nothing; ask without a picture")
    pixels = None
    if images:
        size, mode = model.cfg.vision.image_size, model.cfg.image_mode
        pixels = torch.stack([preprocess(image, size, mode) for image in images])
    return prompt_ids(model, tokenizer, question, len(images), first), pixels


def prompt_ids(model, tokenizer, question, n_images=0, first=True):
    """The ids of `prompt`; for them the number of pictures is enough."""
    alone = isinstance(model, LLM)
    template = template_of(tokenizer) if alone else model.cfg.template
    text = f"{IMAGE_TAG}\n" * n_images + question.replace(IMAGE_TAG, "")
    how = tokenizer, template, model.image_tokens if n_images else 0, n_images, "--ask"
    if not first:
        return render_next(text, *how)
    ids, _ = render([{"from": "human", "value": text}], *how)
    second = alone and template == "mistral_instruct"  # <s>: it is CuMo's, no Mistral knows it
    return ids[second:]


class Printer:
    """Writes ids as text as they come, whole characters at a time, up to the first `stop` text."""

    def __init__(self, tokenizer, stop=(), write=None):
        self.tokenizer, self.stop, self.ids, self.text, self.whole = tokenizer, stop, [], "", ""
        self.write = write or (lambda text: print(text, end="", flush=True))

    def __call__(self, ids):
        """Returns True when a stop text has been said."""
        self.ids += ids.flatten().tolist() if hasattr(ids, "flatten") else list(ids)
        text = self.tokenizer.decode(self.ids).strip()  # blanks wait for what follows them
        said = [text.find(stop) for stop in self.stop if stop in text]
        self.whole = text[: min(said)].rstrip() if said else text
        begun = {stop[:n] for stop in self.stop for n in range(1, len(stop))}
        held = max((len(start) for start in begun if text.endswith(start)), default=0)
        if not text.endswith("\ufffd"):
            self.show(self.whole if said else text[: len(text) - held])
        return bool(said)

    def show(self, text):
        self.write(text[len(self.text) :])
        self.text = text

    def finish(self):
        """The whole answer; what was held back, since it might have become a stop, is written."""
        self.show(self.whole)
        return self.whole


@dataclass
class Turn:
    question: str
    ids: list  # of the question
    pixels: torch.Tensor | None  # of its pictures; the pictures themselves can be far larger
    said: list  # ids of the answer, its end token included


@dataclass
class Answer:
    answer: str
    tokens: int  # generated, the end token included
    prompt_tokens: int  # read for this answer, not counting what the cache held already
    first_token_seconds: float  # from the question
    seconds: float
    dropped: int  # turns that had no room any more


def check_options(context=4096, stop=(), **options):
    """ValueError, with the flag of sample.py, for what a `Conversation` cannot do; it is asked
    before a large model is loaded, too."""
    if "" in stop:
        raise ValueError("--stop '' is empty; name the text before which an answer ends")
    known = OPTIONS | {"context": (lambda n: n > 0, "1 or more")}
    for name, value in {"context": context, **options}.items():
        good, wanted = known.get(name, (lambda value: True, ""))
        if not good(value):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be {wanted}")


class Conversation:
    """Questions about pictures, and answers; what was said stays in the language model's cache.

    context: tokens to keep, if the model has no window. stop: texts, or one text, before which an
    answer ends; what is not shown of it stays in the cache, so the model remembers it. options:
    those of `LLM.generate`; a seed is that of all answers up to a reset, not of each anew.
    """

    def __init__(self, model, tokenizer, context=4096, compile=False, stop=(), max_new_tokens=128,
                 **options):  # fmt: skip
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        options = {"max_new_tokens": max_new_tokens, **options}
        check_options(context, stop, **options)
        self.model, self.tokenizer, self.stop, self.options = model, tokenizer, stop, options
        llm = model if isinstance(model, LLM) else model.llm
        window, weight = llm.cfg.sliding_window, llm.model.norm.weight
        self.room = None if window else min(context, llm.cfg.max_positions)
        size = window + 1 if window else self.room  # a longer text than the window makes a ring
        self.new_cache = lambda: Cache(llm.cfg, 1, size, weight.dtype, weight.device, compile)
        self.seed, self.generator = options.get("seed"), torch.Generator(weight.device)
        self.reset()

    def reset(self):
        self.turns, self.pending, self.cache = [], [], None  # pending: said, but not in the cache
        if self.seed is not None:
            self.options["seed"] = self.generator.manual_seed(self.seed)

    def look(self, image):
        """`image` (PIL), if the model can see it; ValueError otherwise."""
        prompt(self.model, self.tokenizer, "What is this?", [image])
        return image

    def ask(self, question, images=(), write=None, interrupted=lambda: False):
        """-> Answer. `write` gets its text piece by piece; `interrupted()` is asked token by token
        and ends it. ValueError when not even the question has room."""
        start, first = time.perf_counter(), []
        ids, pixels = prompt(self.model, self.tokenizer, question, images, not self.turns)
        turns = [*self.turns, Turn(question, ids, pixels, [])]
        new, unseen, dropped = self.pending + ids, turns[-1:], 0
        if not self.cache:  # nothing was said yet, or the last answer failed
            new, unseen = [i for turn in turns for i in turn.ids + turn.said], turns
        if self.room and (self.cache.seen if self.cache else 0) + self.longest(new) > self.room:
            while len(turns) > 1 and (not dropped or self.longest(new) > self.room // 2):
                turns, dropped = self.without_first(turns), dropped + 1
                new, unseen = [i for turn in turns for i in turn.ids + turn.said], turns
            if self.longest(new) > self.room:
                raise ValueError(
                    f"question and answer may take {self.longest(new)} tokens, there is room for "
                    f"{self.room}: ask less, lower --max-new-tokens, or raise --context"
                )
        if dropped or not self.cache:
            cache = self.new_cache()
        else:
            cache, self.cache = self.cache, None  # until the answer is whole
        pixels = [turn.pixels for turn in unseen if turn.pixels is not None]
        printer = Printer(self.tokenizer, self.stop, write)

        def stream(token):
            first.append(time.perf_counter() - start)
            return printer(token) or interrupted()

        try:
            said = self.generate(new, pixels, cache, stream)
        except BaseException:  # the cache holds half an answer: read what came before anew
            kept = self.turns if self.room else []  # with a window there is no more of it
            self.turns, self.pending, self.cache = kept, [], None
            raise
        self.cache = cache
        end = [] if said[-1] == self.tokenizer.eos else [self.tokenizer.eos]
        turns[-1].said, self.pending = said + end, said[-1:] + end
        self.turns = turns if self.room else turns[-1:]  # with a window none is ever read again
        return Answer(printer.finish(), len(said), len(new), first[0], time.perf_counter() - start,
                      dropped)  # fmt: skip

    def without_first(self, turns):
        """Forget a turn, but not the last picture: without it the model would go on guessing."""
        gone, first, *rest = turns
        pixels = first.pixels
        if all(turn.pixels is None for turn in (first, *rest)):
            pixels = gone.pixels
        n_images = 0 if pixels is None else len(pixels)
        ids = prompt_ids(self.model, self.tokenizer, first.question, n_images)
        return [replace(first, ids=ids, pixels=pixels), *rest]

    def longest(self, new):
        return len(new) + self.options["max_new_tokens"]

    def generate(self, ids, pixels, cache, stream):
        device = cache.keys.device
        seen = {"images": torch.cat(pixels).to(device)} if pixels else {}
        tokens = torch.tensor([ids], device=device)
        how = dict(cache=cache, stream=stream, eos_token_id=self.tokenizer.eos)
        return self.model.generate(tokens, **seen, **how, **self.options)[0].tolist()
