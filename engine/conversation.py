"""A conversation with a model: questions about pictures, and answers that stream.

    talk = Conversation(model, tokenizer, max_new_tokens=128)
    talk.ask("Where is the cat?", [Image.open("cat.jpg")]).answer
    talk.ask("And the dog?").answer

While there is room, nothing is computed twice. The language model's cache holds the keys and values
of the conversation so far, so a question costs only its own tokens:

    <s>[INST] <image> Where is it? [/INST] left </s>[INST] And the dog? [/INST] ...
    '------------------ in the cache ----------'    '------- new -------'

A new picture joins those before it: a plain question means the last one, and "the first picture"
means the first. Stage 3 of the miniature trains on such conversations (data/world.py).

When the cache is full, the oldest turns are dropped, but not the pictures. The turns that stay take
at most half of the cache and are read again. A model with a sliding window has a ring buffer, which
is never full.
"""

import contextlib
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass

import torch

from data.chat import IMAGE_TAG, end_tokens, render, render_next, with_tags
from data.chat_template import native_template
from data.flags import check_options
from data.images import open_image, preprocess
from engine.decode import fast_step
from llm import LLM, Cache


def template_for(model, tokenizer):
    """How conversations with a model are written: a CuMo knows it, an LLM's tokenizer says it."""
    return native_template(tokenizer) if isinstance(model, LLM) else model.cfg.template


def set_template(model, tokenizer, template):
    """Write conversations in this template of data/chat.py; "": as the checkpoint says."""
    if template and isinstance(model, LLM):
        tokenizer.chat_template = template
    elif template:
        model.cfg.template = template


def prompt(model, tokenizer, question, images=(), first=True):
    """A question about `images` (PIL, or their pixels) -> (ids, pixels [n, 3, S, S] or None).

    `first=False`: the ids that continue a conversation after an answer. Several pictures go where
    the question has its `<image>` tags, or else before it. ValueError if their numbers differ; to a
    language model alone the tag is text. ValueError for more tokens than the model has positions.
    """
    alone, n_images, pixels = isinstance(model, LLM), len(images), None
    if not (question if alone else question.replace(IMAGE_TAG, "")).strip():
        raise ValueError('the question is empty; ask something, as in --ask "What is this?"')
    if alone and n_images:
        raise ValueError("this is a language model without vision; ask without a picture")
    if n_images:
        size, mode = model.cfg.vision.image_size, model.cfg.image_mode
        new = not isinstance(images, torch.Tensor)
        pixels = torch.stack([preprocess(i, size, mode) for i in images]) if new else images
    template, text = template_for(model, tokenizer), question
    text = text if alone else with_tags(text, n_images)
    how = tokenizer, template, model.image_tokens if n_images else 0, n_images, "--ask"
    if not first:
        return render_next(text, *how), pixels
    ids, _ = render([{"from": "human", "value": text}], *how)
    cfg = model.cfg if alone else model.cfg.llm
    if len(ids) > cfg.max_positions and not cfg.sliding_window:
        raise ValueError(f"the question takes {len(ids)} tokens, and the model has "
                         f"{cfg.max_positions} positions: ask less")  # fmt: skip
    return ids, pixels


class Printer:
    """Writes ids as text while they come, only whole characters, up to the first `stop` text."""

    def __init__(self, tokenizer, stop=(), write=None):
        self.tokenizer, self.stop, self.ids, self.shown, self.whole = tokenizer, stop, [], "", ""
        self.stopped = False  # whether the answer contains a stop text
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
            ready = self.whole if found else text[: len(text) - held]
            self.write(ready[len(self.shown) :])
            self.shown = ready
        self.stopped = bool(found)
        return self.stopped

    def finish(self):
        """The whole answer. Writes what was held back because a stop text could have begun."""
        self.write(self.whole[len(self.shown) :])
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
    finish_reason: str  # stop: complete; length: cut at max_new_tokens; interrupted: by the user
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
        self.positions = llm.cfg.max_positions
        self.room = None if window else min(context, self.positions)
        size = window + 1 if window else self.room  # more than the window makes it a ring buffer
        self.new_cache = lambda: Cache(llm.cfg, 1, size, weight.dtype, weight.device)
        self.seed, self.generator = options.get("seed"), torch.Generator(weight.device)
        step = fast_step if compile else None
        self.ends = end_tokens(tokenizer, template_for(model, tokenizer))
        self.options |= dict(max_new_tokens=max_new_tokens, eos_token_id=self.ends, step=step)
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
        start, first, ended = time.perf_counter(), [], []
        ids, pixels = prompt(self.model, self.tokenizer, question, images, not self.turns)
        turns = unseen = [*self.turns, Turn(question, ids, pixels, [])]
        cache, new = self.cache, ids_of(turns)  # all turns, if the last answer failed
        if cache:
            unseen, new = turns[-1:], self.pending + turns[-1].ids
        asked, longest = len(turns), self.options["max_new_tokens"]
        if self.room and (cache.seen if cache else 0) + len(new) + longest > self.room:
            turns = self.drop_oldest(turns, self.room // 2 - longest)
            new, unseen, cache = ids_of(turns), turns, None
            self.check_room(len(new) + longest)
        cache, self.cache = cache or self.new_cache(), None  # until the answer is complete
        device, seen = cache.keys.device, [t.pixels for t in unseen if t.pixels is not None]
        pictures = {"images": torch.cat(seen).to(device)} if seen else {}
        printer = Printer(self.tokenizer, self.stop, write)

        def stream(token):
            first.append(time.perf_counter() - start)
            if printer(token) or interrupted():
                ended.append("stop" if printer.stopped else "interrupted")
            return bool(ended)

        try:
            tokens = torch.tensor([new], device=device)
            how = self.options | {"cache": cache, "stream": stream}
            said = self.model.generate(tokens, **pictures, **how)[0].tolist()
        except BaseException:  # the cache holds half an answer: read the turns before it again
            kept = self.turns if self.room else []  # with a window the turns are not kept
            self.turns, self.pending, self.cache = kept, [], None
            raise
        self.cache = cache
        complete = said[-1] in self.ends
        reason = "stop" if complete else ended[0] if ended else "length"
        unread = [] if complete else said[-1:]  # the last token is not in the cache
        self.pending = [*unread, self.ends[0]]  # as the template ends an answer
        turns[-1].said = said[: len(said) - complete] + self.ends[:1]
        self.turns = turns if self.room else turns[-1:]  # with a window none is ever read again
        return Answer(printer.finish(), reason, len(said), len(new), first[0],
                      time.perf_counter() - start, asked - len(turns))  # fmt: skip

    def check_room(self, needed):
        """ValueError, with the limit and the way out, unless so many tokens have room."""
        if needed > self.positions:
            raise ValueError(
                f"question and answer may take {needed} tokens, and the model has {self.positions} "
                "positions: ask less, or lower --max-new-tokens"
            )
        if needed > self.room:
            raise ValueError(
                f"question and answer may take {needed} tokens, there is room for {self.room}: ask "
                f"less, lower --max-new-tokens, or raise --context (here up to {self.positions})"
            )

    def drop_oldest(self, turns, most):
        """Drop turns, but not the last one, until the rest has at most so many tokens. Keep the
        last pictures: without them the model would have to guess."""
        kept = turns
        while len(kept) > 1 and (kept is turns or len(ids_of(kept)) > most):
            gone, first, *rest = kept
            pixels = first.pixels
            if all(turn.pixels is None for turn in (first, *rest)):
                pixels = gone.pixels
            pixels = () if pixels is None else pixels
            ids, pixels = prompt(self.model, self.tokenizer, first.question, pixels)
            kept = [Turn(first.question, ids, pixels, first.said), *rest]
        return kept


def ids_of(turns):
    """The ids of whole turns, one after the other."""
    return [i for turn in turns for i in turn.ids + turn.said]


COMMANDS = (
    "/image FILE adds a picture to the next question, /reset starts over, /help shows this, "
    "/exit leaves"
)


@contextlib.contextmanager
def ctrl_c():
    """A function that returns whether Ctrl-C was pressed; it ends an answer, not the program. A
    second one, if no token comes, raises KeyboardInterrupt as always."""
    pressed = []

    def press(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def files_of(text):
    """The files that a user means by the words after /image: a path as it is, or, as a terminal
    writes it when a file is dropped, quoted, escaped, several of them; `~` is the home folder."""
    text = text.strip()
    whole = os.path.expanduser(text)
    if os.path.exists(whole):
        return [whole]
    try:
        words = [os.path.expanduser(word) for word in shlex.split(text)]
    except ValueError:  # a quote without its end
        return [whole]
    return words if len(words) == 1 or all(map(os.path.exists, words)) else [whole]


def add_pictures(conversation, images, names):
    """`images` and the pictures in the files `names`, and a line that says so."""
    new = [conversation.look(open_image(name)) for name in names]
    for image in new:
        print(f"added {image.filename}, {image.width} x {image.height} pixels", file=sys.stderr)
    return [*images, *new]


def obey(conversation, line, images):
    """Carry out a line of a chat that begins with "/" -> the pictures for the next question."""
    word, _, rest = line.partition(" ")
    if word == "/image" and rest.strip():
        return add_pictures(conversation, images, files_of(rest))
    if word == "/image":
        raise ValueError("/image needs the name of a file: /image cat.jpg")
    if word == "/reset":
        conversation.reset()
        print("started over: turns and pictures are forgotten", file=sys.stderr)
        return []
    if word == "/help":
        print(COMMANDS, file=sys.stderr)
        return images
    if os.path.isfile(files_of(line)[0]):
        raise ValueError(f"to add a picture, type /image {line}")
    raise ValueError(f"{word} is no command; {COMMANDS}")


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
            print("\n/exit leaves", file=sys.stderr)
            continue
        except EOFError:
            return
        try:
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                images = obey(conversation, line, images)
            elif line:
                with ctrl_c() as interrupted:
                    answer(line, images, interrupted)
                images = []
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
