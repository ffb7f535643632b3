"""A web page to ask a CuMo about pictures: answers stream in, next to the map of the experts.

    pip install ".[web]"
    python extras/web.py                                    # the last finished stage in out/
    python extras/web.py --model mine --host 0.0.0.0        # reachable from the network

One model serves many visitors. Each browser tab has its own `Conversation`, with its own KV cache,
so a later question remembers the earlier ones. One thread does all model work, one job at a time,
so visitors never disturb each other:

    question ---> queue ---> model thread: Conversation.ask(write, interrupted)
    reply() yields the growing answer <--- the pieces that it writes

A visitor who leaves during an answer closes the generator `reply`. That stops the model before its
next token, and the next question starts. Stop ends the answer in the same place, and then the page
goes on as after a whole one: it asks for the map of the experts. `--keep` limits the conversations
in memory, each with a cache of `--context` tokens; the one idle for longest is dropped first.

Visitors are strangers: their input is limited in size, and a mistake is one line in the chat. They
can fetch two kinds of files from this machine: the pictures to try, and their own uploads. Uploads
are deleted after an hour and when the page is closed.
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
from data.chat_template import TEMPLATES
from data.flags import check_choice, check_device, check_options, parse, run
from data.hub import find_model
from data.images import open_image
from data.tokenizer import Tokenizer
from data.world import DESCRIBE
from engine.conversation import Conversation, set_template
from extras.plots import draw_routing, pyplot
from llm import LLM
from sample import DTYPES, load_model

CSS = "#map { gap: 4px } .message img { max-height: 110px } .message-buttons { display: none }"
DESKTOP, PHONE = None, 3.9  # inches of the map: as many as it takes, and those of a phone
CHARACTERS, PICTURES = 4000, 4  # limits of one question; gradio itself has none
NO_MAP = "After an answer about a picture, the map of the experts is drawn here."
MAP = "Which expert sees which part of the last picture:"
MESSAGES = 100  # limit of the history on the page; each update sends all of it to the browser


@dataclass
class WebConfig:
    model: str = ""  # a checkpoint or a folder of stages; empty: the last finished stage in out/
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: reachable from other machines
    port: int = 7860  # port to listen on
    keep: int = 32  # conversations in memory; the one idle for longest is dropped first
    waiting: int = 64  # most questions in the queue; more are refused
    upload_mb: int = 10  # largest upload, in MB
    template: str = ""  # how to ask; empty: as the model has learned, see data/chat_template.py
    temperature: float = 0.0  # 0: always the most probable token
    max_new_tokens: int = 128  # longest answer
    context: int = 4096  # tokens of a conversation that are kept, if the model has no window
    dtype: str = ""  # of the weights: float32 or bfloat16; empty: float32
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where to run


class Visitor:
    """A browser tab: its conversation with the model, and the messages on its page."""

    def __init__(self, conversation):
        self.conversation, self.messages = conversation, []
        self.left = self.stopped = False  # has closed the page; has pressed Stop
        self.undrawn = None  # the picture (PIL) whose map is not on the page yet


class Visitors:
    """The latest `keep` visitors by gradio's session; `conversation()` is called for a new one."""

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
        """Drop a visitor, and end the answer in progress."""
        if session in self.known:
            self.known.pop(session).left = True


@functools.cache
def jobs():
    """The queue of the one thread that does all work with the model and with pictures. More threads
    would also need more memory: the allocator keeps what each has freed for that thread."""
    waiting = queue.SimpleQueue()

    def work():
        while True:
            waiting.get()()

    threading.Thread(target=work, daemon=True).start()
    return waiting


def submit(job):
    """Have that thread run `job()`, after the jobs before it -> the Future of its result."""
    future = Future()

    def work():
        try:
            future.set_result(job())
        except Exception as error:
            future.set_exception(error)

    jobs().put(work)
    return future


def pieces(ask):
    """Yield what `ask(write, interrupted)` writes, and raise its error. Closing this generator
    interrupts `ask` without waiting for it, since the server's event loop may be the caller."""
    written, closed = queue.SimpleQueue(), threading.Event()
    answer = submit(lambda: closed.is_set() or ask(written.put, closed.is_set))
    answer.add_done_callback(lambda _: written.put(None))
    try:
        while (piece := written.get()) is not None:
            if piece:
                yield piece
        answer.result()
    finally:
        closed.set()


def open_pictures(model, text, files):
    """The pictures of a message (PIL). ValueError, one line, for a message without an answer."""
    if isinstance(model, LLM) and files:
        raise ValueError("this is a language model without vision; ask without a picture")
    if not text and not files:
        raise ValueError("there is nothing to answer; type a question, or add a picture")
    if len(text) > CHARACTERS or len(files) > PICTURES:
        raise ValueError(f"a question has at most {CHARACTERS} characters and {PICTURES} pictures; "
                         f"this one has {len(text)} and {len(files)}")  # fmt: skip
    images = []
    for file in files:
        try:
            images.append(open_image(file))
        except ValueError as error:  # its text begins with a path of this machine
            raise ValueError(str(error).replace(str(file), Path(file).name)) from None
        images[-1].filename = Path(file).name  # later errors begin with it
    return images


def reply(model, visitor, text, files):
    """Answer a message: yields the messages to show, as the answer grows."""
    text = text.strip().encode("utf-8", "replace").decode()  # replaces lone surrogates
    answer, messages = {"role": "assistant", "content": ""}, visitor.messages
    visitor.stopped = False
    try:
        del messages[:-MESSAGES]
        if text:
            messages.append({"role": "user", "content": text})
        images = submit(lambda: open_pictures(model, text, files)).result()
        messages += [{"role": "user", "content": {"path": str(file)}} for file in files]
        visitor.undrawn = images[-1] if images else visitor.undrawn
        if not (images or visitor.conversation.turns or isinstance(model, LLM)):
            messages.append({"role": "assistant", "content": "(no picture in this conversation)"})
        messages.append(answer)
        yield messages

        def ask(write, interrupted):
            gone = lambda: visitor.left or visitor.stopped or interrupted()
            if not gone():
                said = visitor.conversation.ask(text or DESCRIBE, images, write, gone)
                write(cut_note(said))

        with contextlib.closing(pieces(ask)) as written:
            for piece in written:
                answer["content"] += piece
                yield messages
    except Exception as error:
        if not isinstance(error, ValueError):  # the state of the conversation is unknown
            traceback.print_exc()
            visitor.conversation.reset()
            error = f"the model failed ({type(error).__name__}); the conversation starts again"
        answer["content"] = f"error: {error}"
        if not any(message is answer for message in messages):
            messages.append(answer)
    yield messages


def cut_note(answer):
    """What stands after an answer (engine.conversation.Answer) that had no room for its end."""
    cut = f"\n\n(cut: --max-new-tokens {answer.tokens} allows no more)"
    return cut if answer.finish_reason == "length" else ""


def draw_map(model, image, width=DESKTOP):
    """Draw which expert sees which patch of `image` (PIL) -> the plot (PIL), `width` inches."""
    file = io.BytesIO()
    draw_routing(model, image, file, width)
    return Image.open(file)


def width_for(headers):
    """Inches of a map on the visitor's screen: phones call themselves `Mobi`."""
    return PHONE if "mobi" in (headers.get("user-agent") or "").lower() else DESKTOP


def has_maps(model):
    """Whether this model has experts on the vision side, and matplotlib is installed."""
    sparse = not isinstance(model, LLM) and (model.cfg.vision.num_experts or model.cfg.mlp_experts)
    return bool(sparse and pyplot())


# ---------------------------------------------------------------------------- the page


TO_TRY = cat, dog, owl, sign, chart = [
    str(ROOT / f"{name}.jpg") for name in ("cat", "dog", "owl", "open", "chart")
]


def examples(model):
    """[(question, files)] to click on, and a line on what this model can be asked."""
    if isinstance(model, LLM):
        return [("What is a cat?", [])], "It is a language model without vision."
    miniature = model.cfg.vision.image_size <= 64
    knows = ("This miniature knows drawings of 100 objects, signs with a word or a number, and bar "
             "charts: ask what is there, where, how many, what a sign says or how high a bar is."
             if miniature else "Ask anything about a picture.")  # fmt: skip
    asked = [("Where is the cat?", [cat]), (DESCRIBE, [owl]), ("Read the sign.", [sign]),
             ("Which bar is the tallest?", [chart]),
             ("Which picture has the dog?", [cat, dog])]  # fmt: skip
    return asked, f"{knows} A question means the last picture, unless it says which."


def page(gr, model, visitors, name):
    """gradio's Blocks: a chat, and next to it the map of a sparse model, once there is one."""
    sees, maps = not isinstance(model, LLM), has_maps(model)
    asked, about = examples(model)
    with gr.Blocks(title=f"CuMo: {name}", delete_cache=(600, 3600), fill_width=True) as blocks:
        gr.Markdown(f"## Ask CuMo about a picture\nThe model is `{name}`. {about}")
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(
                    show_label=False, height="min(400px, 45vh)", buttons=[],
                    feedback_options=None, placeholder="No question yet.")  # fmt: skip
                box = gr.MultimodalTextbox(
                    show_label=False, autofocus=True, file_count="multiple",
                    file_types=["image"], sources=["upload"] if sees else [],
                    placeholder="Where is the cat?")  # fmt: skip
                gr.Examples([{"text": text, "files": files} for text, files in asked], box)
                clear = gr.Button("Start over", size="sm")
            with gr.Column(scale=4, visible=maps, elem_id="map"):
                caption = gr.Markdown(NO_MAP)
                chart = gr.Image(visible=False, show_label=False, format="png", interactive=False,
                                 buttons=["download", "fullscreen"])  # fmt: skip

    def ask(message, request: gr.Request):
        message, visitor = message or {"text": "", "files": []}, visitors.find(request.session_hash)
        state = gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)
        for messages in reply(model, visitor, message["text"], message["files"]):
            yield messages, state
            state = gr.skip()  # keeps what the visitor is typing

    def expert_map(request: gr.Request):
        visitor = visitors.find(request.session_hash)
        image, visitor.undrawn = visitor.undrawn, None
        if image is None:
            return gr.skip(), gr.skip()
        width = width_for(request.headers)
        chart = submit(lambda: draw_map(model, image, width)).result()
        return MAP, gr.Image(chart, visible=True)

    def stop(request: gr.Request):
        visitors.find(request.session_hash).stopped = True

    def leave(request: gr.Request):
        visitors.forget(request.session_hash)

    ready = gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
    private = dict(queue=False, api_visibility="private")
    with blocks:
        asking = box.submit(ask, box, [chat, box], api_name="ask", show_progress="minimal")
        asking.then(lambda: ready, None, box, **private)
        if maps:  # an event of its own: the next question can be typed meanwhile
            asking.then(expert_map, None, [caption, chart], trigger_mode="multiple",
                        show_progress="minimal", **private)  # fmt: skip
        # Not gradio's own `cancels`: it sometimes covers the chat with the word "Error".
        box.stop(stop, None, None, **private)
        gr.on([clear.click, chat.clear], None, js="() => location.reload()")
        blocks.unload(leave)
    return blocks


def serve(cfg, folder):
    """Serve the page until Ctrl-C; uploads go into `folder`."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
    os.environ.setdefault("MPLBACKEND", "Agg")  # draws in a thread, opens no window
    try:
        import gradio as gr
    except ImportError:
        raise ValueError('the page needs gradio: pip install ".[web]"') from None
    check_choice("dtype", cfg.dtype, DTYPES)
    check_choice("template", cfg.template, ("", *TEMPLATES[1:]))
    check_device(cfg.device)
    if not 0 < cfg.port < 2**16:
        raise ValueError(f"--port {cfg.port} must be 1 to 65535")
    for name in ("keep", "waiting", "upload_mb"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be 1 or more")
    check_options(context=cfg.context, max_new_tokens=cfg.max_new_tokens,
                  temperature=cfg.temperature)  # fmt: skip
    path = find_model(cfg.model)
    model, tokenizer = (
        load_model(path, cfg.device, DTYPES[cfg.dtype]),
        Tokenizer.from_pretrained(path),
    )
    set_template(model, tokenizer, cfg.template)
    new = lambda: Conversation(model, tokenizer, cfg.context, max_new_tokens=cfg.max_new_tokens,
                               temperature=cfg.temperature)  # fmt: skip
    # A first token before the page opens: a wrong flag fails here and not at a visitor's question.
    new().ask("Hi", write=lambda piece: None, interrupted=lambda: True)
    blocks = page(gr, model, Visitors(new, cfg.keep), Path(cfg.model or path).name)
    blocks.queue(max_size=cfg.waiting, default_concurrency_limit=1, api_open=False)
    print(f"http://{cfg.host}:{cfg.port} serves {path}; Ctrl-C ends it", flush=True)
    try:
        blocks.launch(
            server_name=cfg.host, server_port=cfg.port, share=False, quiet=True, ssr_mode=False,
            mcp_server=False, enable_monitoring=False, footer_links=[], pwa=False,
            run_history=False,
            state_session_capacity=cfg.keep + cfg.waiting,  # gradio's own limit of tabs
            max_file_size=cfg.upload_mb * 2**20,
            allowed_paths=TO_TRY,
            css=CSS, theme=gr.themes.Default(font=["system-ui", "sans-serif"],
                                    font_mono=["ui-monospace", "monospace"]))  # fmt: skip
    except OSError:  # gradio's own text names a variable of its own
        raise ValueError(f"port {cfg.port} of {cfg.host} cannot be used, maybe it is taken; name "
                         "another --port") from None  # fmt: skip


def main():
    cfg, _ = parse(WebConfig, description=__doc__.split("\n")[0])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # deletes the folder, too
    with tempfile.TemporaryDirectory(prefix="nanocumo-web-") as folder:
        serve(cfg, folder)


if __name__ == "__main__":
    run(main)
