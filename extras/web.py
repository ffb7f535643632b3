"""A page on which people ask a CuMo about pictures: the answers stream, beside them the expert map.

    pip install -e ".[web]"
    python extras/web.py                                    # the furthest stage in out/
    python extras/web.py --model mine --host 0.0.0.0        # for others on the network

There is one model and many visitors. gradio's queue lets them in one by one; each has a
`Conversation` of their own, with its cache, so a later question remembers the earlier ones:

    question --> queue --> reply() --> a thread: Conversation.ask(write, interrupted)
    growing answer <------ yields <--- the pieces that it writes

A visitor who leaves in mid-answer closes the generator `reply`; that interrupts the model before
its next token, and the next question's turn comes. `--keep` says how many conversations are
remembered, each with a cache of `--context` tokens; whoever has been silent for longest is
forgotten first.

Visitors are strangers. What they send is limited in size, mistakes get one line in the chat, and
of the files on this machine they can fetch the example picture and what they uploaded themselves;
that is deleted after an hour, and when the page is closed.
"""

import collections
import contextlib
import functools
import io
import os
import queue
import signal
import sys
import tempfile
import threading
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.flags import check_device, parse, run
from data.images import open_image
from data.tokenizer import Tokenizer
from data.world import DESCRIBE
from engine.conversation import Conversation, check_options
from extras.plots import draw_routing, pyplot
from llm import LLM
from sample import DTYPES, find_model, load

CSS = ".message img { max-height: 110px } .message-buttons { display: none }"
LETTERS, PICTURES = 4000, 4  # most of a question; gradio itself sets no limit
MESSAGES = 100  # that the page still shows; all of them go to the browser with each piece
MODEL_LOCK = threading.Lock()  # the one model answers, or draws, once at a time


@dataclass
class WebConfig:
    model: str = ""  # a checkpoint; empty: the furthest stage in out/
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: reachable from other machines
    port: int = 7860  # port to listen on
    keep: int = 32  # conversations in memory; the one silent for longest is forgotten first
    waiting: int = 64  # most questions in the queue; more are turned away
    upload_mb: int = 10  # largest file that is accepted
    temperature: float = 0.0  # 0: always the likeliest token
    max_new_tokens: int = 128  # longest answer
    context: int = 4096  # tokens of a conversation that are kept, if the model has no window
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


class Visitor:
    """A browser tab: its conversation with the model, and the messages that it shows."""

    def __init__(self, conversation):
        self.conversation, self.messages, self.left = conversation, [], False


class Visitors:
    """The last `keep` visitors, by gradio's session; `conversation()` makes one for a new one."""

    def __init__(self, conversation, keep):
        self.conversation, self.keep, self.known = conversation, keep, collections.OrderedDict()

    def find(self, session):
        if session not in self.known:
            self.known[session] = Visitor(self.conversation())
        self.known.move_to_end(session)
        while len(self.known) > self.keep:
            self.known.popitem(last=False)
        return self.known[session]

    def forget(self, session):
        """Also ends the answer that this visitor is being given."""
        if session in self.known:
            self.known.pop(session).left = True


@functools.cache
def jobs():
    """A queue of functions for one thread that does the heavy work of all visitors. What a thread
    has freed, the system's allocator keeps for that thread: with one each, memory would grow."""
    waiting = queue.SimpleQueue()

    def work():
        while True:
            waiting.get()()

    threading.Thread(target=work, daemon=True).start()
    return waiting


def done(job):
    """The result of `job()`, or its error, from that thread."""
    result = Future()

    def work():
        try:
            result.set_result(job())
        except Exception as error:
            result.set_exception(error)

    jobs().put(work)
    return result.result()


def pieces(ask):
    """What `ask(write, interrupted)` writes, as it comes; its errors are raised here. To close this
    generator interrupts it, without waiting: who closes it may be the server's event loop."""
    heard, closed = queue.SimpleQueue(), threading.Event()

    def work():
        try:
            with MODEL_LOCK:
                closed.is_set() or ask(heard.put, closed.is_set)
            heard.put(None)
        except Exception as error:
            heard.put(error)

    jobs().put(work)
    try:
        while (piece := heard.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            if piece:
                yield piece
    finally:
        closed.set()


def open_pictures(model, text, files):
    """The pictures of a message (PIL). ValueError with one line if it cannot be answered."""
    if isinstance(model, LLM) and files:
        raise ValueError("this is a language model alone, it sees no pictures; ask without one")
    if not text and not files:
        raise ValueError("there is nothing to answer; type a question, or add a picture")
    if len(text) > LETTERS or len(files) > PICTURES:
        raise ValueError(f"a question has {LETTERS} letters and {PICTURES} pictures at most, here "
                         f"are {len(text)} and {len(files)}; ask less at once")  # fmt: skip
    images = []
    for file in files:
        try:
            images.append(open_image(file))
        except ValueError as error:  # whose text begins with a path, which is nobody's business
            raise ValueError(str(error).replace(str(file), Path(file).name)) from None
    return images


def reply(model, visitor, text, files, maps):
    """Answer a message -> the messages to show, as the answer grows, and the expert map (PIL) of
    the last picture, once it is drawn: if `maps`, else None."""
    text = text.strip().encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    said = {"role": "assistant", "content": ""}
    chart = None
    try:
        seen = visitor.messages
        del seen[:-MESSAGES]
        if text:
            seen.append({"role": "user", "content": text})
        images = done(lambda: open_pictures(model, text, files))
        seen += [{"role": "user", "content": {"path": str(file)}} for file in files]
        seen.append(said)
        yield seen, chart

        def ask(write, interrupted):
            gone = lambda: visitor.left or interrupted()
            gone() or visitor.conversation.ask(text or DESCRIBE, images, write, gone)

        with contextlib.closing(pieces(ask)) as answer:
            for piece in answer:
                said["content"] += piece
                yield seen, chart
        if images and maps:
            chart = done(lambda: draw_map(model, images[-1]))
    except Exception as error:
        if not isinstance(error, ValueError):  # the model's, who knows in what state
            traceback.print_exc()
            visitor.conversation.reset()
            error = f"the model failed ({type(error).__name__}), and has forgotten what was said"
        said["content"] = f"error: {error}"
        if not any(message is said for message in seen):
            seen.append(said)
    yield seen, chart


def draw_map(model, image):
    """Which expert sees which patch of `image` (PIL) -> a picture (PIL)."""
    file = io.BytesIO()
    with MODEL_LOCK:
        draw_routing(model, image, file)
    return Image.open(file)


def has_maps(model):
    """Whether experts of this model see pictures, and matplotlib is there to draw them."""
    sparse = not isinstance(model, LLM) and (model.cfg.vision.num_experts or model.cfg.mlp_experts)
    return bool(sparse and pyplot())


# ---------------------------------------------------------------------------- the page


def page(gr, model, visitors, name):
    """gradio's Blocks: a chat, and for a sparse model the map beside it."""
    sees, maps = not isinstance(model, LLM), has_maps(model)
    with gr.Blocks(title=f"CuMo: {name}", delete_cache=(600, 3600), fill_width=True) as blocks:
        gr.Markdown(f"## Ask CuMo about a picture\nThe model is `{name}`. " + (
            "Add a picture and a question; later questions need no new picture." if sees else
            "It is a language model alone: it sees no pictures."))  # fmt: skip
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(show_label=False, height=400, buttons=[], feedback_options=None,
                                  placeholder="Nothing has been asked yet.")  # fmt: skip
                box = gr.MultimodalTextbox(
                    show_label=False, autofocus=True, file_count="multiple",
                    file_types=["image"], sources=["upload"] if sees else [],
                    placeholder="Where is the cat?")  # fmt: skip
                clear = gr.Button("Start anew", size="sm")
            with gr.Column(scale=4):
                if maps:
                    chart = gr.Image(show_label=False, format="png", interactive=False,
                                     buttons=["download", "fullscreen"])  # fmt: skip
                    gr.Markdown("Above: which expert sees which part of the last picture.")
                cat = [str(ROOT / "cat.jpg")]
                asked = [("Where is the cat?", cat), ("List all objects.", cat)]
                asked = asked if sees else [("What is a cat?", [])]
                gr.Examples([{"text": text, "files": files} for text, files in asked], box)
    shown = [chat, box, chart] if maps else [chat, box]
    ready = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)

    def ask(message, request: gr.Request):
        message, visitor = message or {"text": "", "files": []}, visitors.find(request.session_hash)
        state = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        for messages, drawn in reply(model, visitor, message["text"], message["files"], maps):
            yield (messages, state, drawn or gr.skip())[: len(shown)]
            state = gr.skip()  # what is being typed meanwhile stays

    def start_anew(request: gr.Request):
        visitors.forget(request.session_hash)
        return ([], ready, None)[: len(shown)]

    def leave(request: gr.Request):
        visitors.forget(request.session_hash)

    with blocks:
        asking = box.submit(ask, box, shown, api_name="ask", show_progress="minimal")
        asking.then(lambda: ready, None, box, queue=False, api_visibility="private")
        box.stop(lambda: ready, None, box, cancels=asking, queue=False, api_visibility="private")
        gr.on([clear.click, chat.clear], start_anew, None, shown, cancels=asking, queue=False,
              api_name="start_anew")  # fmt: skip
        blocks.unload(leave)
    return blocks


def serve(cfg, folder):
    """Serve the page until Ctrl-C; `folder` takes what visitors upload."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
    os.environ.setdefault("MPLBACKEND", "Agg")  # draws in threads, opens no window
    try:
        import gradio as gr
    except ImportError:
        raise ValueError('the page needs gradio: pip install -e ".[web]"') from None
    if cfg.dtype not in DTYPES:
        raise ValueError(f"--dtype {cfg.dtype!r} is unknown; choose float32 or bfloat16")
    check_device(cfg.device)
    for name in ("keep", "waiting", "upload_mb"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be 1 or more")
    check_options(cfg.context, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature)
    path = cfg.model or find_model()
    model, tokenizer = load(path, cfg.device, DTYPES[cfg.dtype]), Tokenizer.from_pretrained(path)
    new = lambda: Conversation(model, tokenizer, cfg.context, max_new_tokens=cfg.max_new_tokens,
                               temperature=cfg.temperature)  # fmt: skip
    new().ask(
        "Hi", write=lambda piece: None, interrupted=lambda: True
    )  # a mistaken flag shows now, not to a visitor
    blocks = page(gr, model, Visitors(new, cfg.keep), Path(path).name)
    blocks.queue(max_size=cfg.waiting, default_concurrency_limit=1, api_open=False)
    print(f"http://{cfg.host}:{cfg.port} asks {path}; Ctrl-C ends it", flush=True)
    blocks.launch(
        server_name=cfg.host, server_port=cfg.port, share=False, quiet=True, ssr_mode=False,
        mcp_server=False, enable_monitoring=False, footer_links=[], pwa=False, run_history=False,
        state_session_capacity=cfg.keep + cfg.waiting,  # gradio's own memory of tabs, too
        max_file_size=cfg.upload_mb * 2**20, allowed_paths=[str(ROOT / "cat.jpg")],
        css=CSS, theme=gr.themes.Default(font=["system-ui", "sans-serif"],
                                font_mono=["ui-monospace", "monospace"]))  # fmt: skip


def main():
    cfg, _ = parse(WebConfig, description=__doc__.split("\n")[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is deleted then too
    with tempfile.TemporaryDirectory(prefix="nanocumo-web-") as folder:
        serve(cfg, folder)


if __name__ == "__main__":
    run(main)
