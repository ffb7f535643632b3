"""A conversation with a model: questions about pictures, and answers that stream.

    talk = Conversation(model, tokenizer, max_new_tokens=128)
    talk.ask("Where is the cat?", [Image.open("cat.jpg")]).answer
    talk.ask("And the dog?").answer

While there is room, nothing is computed twice. The language model's cache holds the keys and values
of the conversation so far, so a question costs only its own tokens and those of its pictures:

    <s>[INST] <image> Where is it? [/INST] left </s>[INST] And the dog? [/INST] ...
    '------------------ in the cache ----------'    '------- new -------'

When the cache is full, the oldest turns are dropped, but not the last picture. The turns that stay
take at most half of the cache and are read again. The cache of a model with a sliding window is a
ring buffer, which is never full.
"""

import contextlib
import signal
import sys
import time
from dataclasses import dataclass, replace

import torch

from data.chat import IMAGE_TAG, render, render_next, template_of
from data.flags import check_options
from data.images import open_image, preprocess
from engine.decode import fast_step
from llm import LLM, Cache


def prompt(model, tokenizer, question, images=(), first=True):
    """A question about `images` (PIL, or their pixels) -> (ids, pixels [n, 3, S, S] or None).

    `first=False`: the ids that continue a conversation after an answer.
    """
    text, pixels = question.replace(IMAGE_TAG, ""), None
    alone, n_images = isinstance(model, LLM), len(images)
    if not text.strip():
        raise ValueError('the question is empty; ask something, as in --ask "What is this?"')
    if alone and n_images:
        raise ValueError("this is a language model without vision; ask without a picture")
    if n_images:
        size, mode = model.cfg.vision.image_size, model.cfg.image_mode
        new = not isinstance(images, torch.Tensor)
        pixels = torch.stack([preprocess(i, size, mode) for i in images]) if new else images
    template = template_of(tokenizer) if alone else model.cfg.template
    image_tokens = model.image_tokens if n_images else 0
    how = tokenizer, template, image_tokens, n_images, "--ask"
    text = f"{IMAGE_TAG}\n" * n_images + text
    if not first:
        return render_next(text, *how), pixels
    ids, _ = render([{"from": "human", "value": text}], *how)
    second = alone and template == "mistral_instruct"  # CuMo's second <s>, unknown to a Mistral
    return ids[second:], pixels


class Printer:
    """Writes ids as text while they come, only whole characters, up to the first `stop` text."""

    def __init__(self, tokenizer, stop=(), write=None):
        self.tokenizer, self.stop, self.ids, self.text, self.whole = tokenizer, stop, [], "", ""
        self.write = write or (lambda text: print(text, end="", flush=True))

    def __call__(self, ids):
        """Returns True once the answer contains a stop text."""
        self.ids += ids.flatten().tolist() if hasattr(ids, "flatten") else list(ids)
        text = self.tokenizer.decode(self.ids).strip()  # spaces wait for the text after them
        found = [text.find(stop) for stop in self.stop if stop in text]
        self.whole = text[: min(found)].rstrip() if found else text
        starts = {stop[:n] for stop in self.stop for n in range(1, len(stop))}
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        if not text.endswith("\ufffd"):  # half a character
            self.show(self.whole if found else text[: len(text) - held])
        return bool(found)

    def show(self, text):
        self.write(text[len(self.text) :])
        self.text = text

    def finish(self):
        """The whole answer. Writes what was held back because a stop text could have begun."""
        self.show(self.whole)
        return self.whole


@dataclass
class Turn:
    question: str
    ids: list  # the question's
    pixels: torch.Tensor | None  # not the pictures themselves, which can be far larger
    said: list  # the answer's ids, its end token included


@dataclass
class Answer:
    answer: str
    tokens: int  # generated, the end token included
    prompt_tokens: int  # read for this answer; those in the cache do not count
    first_token_seconds: float  # since the question
    seconds: float
    dropped: int  # turns that were dropped for lack of room


class Conversation:
    """Questions about pictures, and answers; all of it stays in the language model's cache.

    context: tokens to keep, if the model has no window. stop: texts, or one text, before which an
    answer ends; the stop text itself stays in the cache. options: those of `LLM.generate`; a seed
    starts the random numbers of all answers up to a reset.
    """

    def __init__(self, model, tokenizer, context=4096, compile=False, stop=(), max_new_tokens=128,
                 **options):  # fmt: skip
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        check_options(context=context, stop=stop, max_new_tokens=max_new_tokens, **options)
        self.model, self.tokenizer, self.stop, self.options = model, tokenizer, stop, options
        llm = model if isinstance(model, LLM) else model.llm
        window, weight = llm.cfg.sliding_window, llm.model.norm.weight
        self.room = None if window else min(context, llm.cfg.max_positions)
        size = window + 1 if window else self.room  # more than the window makes it a ring buffer
        self.new_cache = lambda: Cache(llm.cfg, 1, size, weight.dtype, weight.device)
        self.seed, self.generator = options.get("seed"), torch.Generator(weight.device)
        step = fast_step if compile else None
        self.options |= dict(max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos, step=step)
        self.reset()

    def reset(self):
        self.turns, self.pending, self.cache = [], [], None  # pending: ids not yet in the cache
        if self.seed is not None:
            self.options["seed"] = self.generator.manual_seed(self.seed)

    def look(self, image):
        """`image` (PIL), if the model can see it; ValueError otherwise."""
        prompt(self.model, self.tokenizer, "What is this?", [image])
        return image

    def ask(self, question, images=(), write=None, interrupted=lambda: False):
        """-> Answer. `write` gets its text piece by piece; `interrupted()` is called after each
        token and ends the answer. ValueError when not even the question has room."""
        start, first = time.perf_counter(), []
        ids, pixels = prompt(self.model, self.tokenizer, question, images, not self.turns)
        turns = [*self.turns, Turn(question, ids, pixels, [])]
        new, unseen, cache = self.pending + ids, turns[-1:], self.cache
        if not cache and self.turns:  # the last answer failed
            new, unseen = ids_of(turns), turns
        longest = self.options["max_new_tokens"]
        if self.room and (cache.seen if cache else 0) + len(new) + longest > self.room:
            turns = self.drop_oldest(turns, self.room // 2 - longest)
            new, unseen, cache = ids_of(turns), turns, None
            if len(new) + longest > self.room:
                raise ValueError(
                    f"question and answer may take {len(new) + longest} tokens, there is room for "
                    f"{self.room}: ask less, lower --max-new-tokens, or raise --context"
                )
        dropped = len(self.turns) + 1 - len(turns)
        cache, self.cache = cache or self.new_cache(), None  # until the answer is complete
        device, seen = cache.keys.device, [t.pixels for t in unseen if t.pixels is not None]
        pictures = {"images": torch.cat(seen).to(device)} if seen else {}
        printer = Printer(self.tokenizer, self.stop, write)

        def stream(token):
            first.append(time.perf_counter() - start)
            return printer(token) or interrupted()

        try:
            tokens = torch.tensor([new], device=device)
            how = self.options | {"cache": cache, "stream": stream}
            said = self.model.generate(tokens, **pictures, **how)[0].tolist()
        except BaseException:  # the cache holds half an answer: read the turns before it again
            kept = self.turns if self.room else []  # with a window the turns are not kept
            self.turns, self.pending, self.cache = kept, [], None
            raise
        self.cache = cache
        end = [] if said[-1] == self.tokenizer.eos else [self.tokenizer.eos]
        turns[-1].said, self.pending = said + end, said[-1:] + end
        self.turns = turns if self.room else turns[-1:]  # with a window none is ever read again
        return Answer(printer.finish(), len(said), len(new), first[0], time.perf_counter() - start,
                      dropped)  # fmt: skip

    def drop_oldest(self, turns, most):
        """Drop turns, but not the last one, until the rest has at most so many tokens. Keep the
        last picture: without it the model would have to guess."""
        kept = turns
        while len(kept) > 1 and (kept is turns or len(ids_of(kept)) > most):
            gone, first, *rest = kept
            pixels = first.pixels
            if all(turn.pixels is None for turn in (first, *rest)):
                pixels = gone.pixels
            images = () if pixels is None else pixels
            ids, _ = prompt(self.model, self.tokenizer, first.question, images)
            kept = [replace(first, ids=ids, pixels=pixels), *rest]
        return kept


def ids_of(turns):
    """The ids of whole turns, one after the other."""
    return [i for turn in turns for i in turn.ids + turn.said]


COMMANDS = "/image FILE adds a picture to the next question, /reset starts over, /quit leaves"


@contextlib.contextmanager
def ctrl_c():
    """A function that returns whether Ctrl-C was pressed; it ends an answer, not the program."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def chat(conversation, answer, images=()):
    """A chat in the terminal, until the end of the input: answer(question, images, interrupted)
    prints an answer, about all pictures since the last question."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys
    images = [conversation.look(image) for image in images]
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
                    answer(line, images, interrupted)
                images = []
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
