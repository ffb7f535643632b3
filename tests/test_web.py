"""The web page: answers, mistakes, visitors who leave; which files it serves.

The slow tests run a server and need gradio, one of them a browser as well:
`pip install ".[web]" selenium`, and Debian's packages chromium and chromium-driver.
"""

import concurrent.futures
import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from refused import refusal
from tiny import ROOT, tiny_cumo

from cumo import CuMo
from data.tokenizer import Tokenizer
from engine.conversation import Conversation, template_for
from extras import web

MINI, CAT = ROOT / "data" / "mini" / "llm", str(ROOT / "cat.jpg")
TOKENIZER = Tokenizer.from_pretrained(MINI)
README = max((ROOT / "README.md").read_text(encoding="utf-8").splitlines(), key=len)[:40]


def talk(model, tokens=6):
    return Conversation(model, TOKENIZER, 32000, max_new_tokens=tokens)


def visitors(model, tokens=6, keep=4):
    return web.Visitors(lambda: talk(model, tokens), keep)


def last(model, visitor, text, files=()):
    """The last message after an answer, without the note that it is cut."""
    *_, messages = web.reply(model, visitor, text, files)
    assert messages is visitor.messages and messages[-1]["role"] == "assistant"
    return messages[-1]["content"].partition("\n\n(cut: ")[0]


@pytest.fixture(scope="module")
def sparse():
    return tiny_cumo(experts=4, vocab=1024, seed=3).eval()  # its answers depend on the picture


def test_the_page_answers_what_a_conversation_answers_and_remembers(sparse):
    visitor, alone = visitors(sparse).find("a"), talk(sparse)
    picture = [web.open_image(CAT)]
    first = alone.ask("What is it?", picture).answer
    assert last(sparse, visitor, "What is it?", [CAT]) == first
    assert last(sparse, visitor, "And now?") == alone.ask("And now?").answer
    assert last(sparse, visitor, "", [CAT]) == alone.ask(web.DESCRIBE, picture).answer
    assert [m["role"][0] for m in visitor.messages] == list("uuauaua")


def test_an_answer_grows(sparse):
    replies = web.reply(sparse, visitors(sparse).find("a"), "What?", [CAT])
    texts = [messages[-1]["content"] for messages in replies]
    assert len(set(texts)) > 3 and all(b.startswith(a) for a, b in zip(texts, texts[1:]))


def test_a_cut_answer_says_so_and_a_whole_or_stopped_one_does_not(sparse):
    visitor, alone = visitors(sparse).find("a"), talk(sparse)
    *_, messages = web.reply(sparse, visitor, "What?", [])
    cut = alone.ask("What?")
    assert cut.finish_reason == "length" and cut.tokens == 6
    assert messages[-1]["content"] == (f"{cut.answer}\n\n(cut: --max-new-tokens 6 allows no more)")
    stop = cut.answer[4:6]
    whole = web.Visitor(Conversation(sparse, TOKENIZER, 32000, stop=stop, max_new_tokens=6))
    stopped = visitors(sparse, tokens=30000).find("a")
    for visitor in (whole, stopped):
        for messages in web.reply(sparse, visitor, "What?", []):
            visitor.stopped = bool(messages[-1]["content"]) and visitor is stopped
        assert messages[-1]["content"] and "cut" not in messages[-1]["content"]
    assert len(stopped.conversation.turns[0].said) < 10000


def test_mistakes_are_one_line_and_the_conversation_goes_on(sparse, tmp_path):
    broken, text = tmp_path / "broken.png", tmp_path / "text.png"
    Image.new("RGB", (90, 90)).save(broken)
    broken.write_bytes(broken.read_bytes()[:60])
    text.write_text("this is no picture")
    Image.new("RGB", (30000, 1)).save(tmp_path / "narrow.png")
    visitor, alone = visitors(sparse).find("a"), talk(sparse)
    assert last(sparse, visitor, "What?") == alone.ask("What?").answer
    for question, files, line in [
        ("Is it?", [broken], "error: broken.png: "),
        ("Is it?", [CAT, text], "error: text.png: is no image Pillow can read"),
        ("Is it?", [tmp_path / "narrow.png"], "error: narrow.png: 30000x1 is too narrow"),
        (" ", [], "error: there is nothing to answer; type a question, or add a picture"),
        ("\ud800?", [tmp_path], f"error: {tmp_path.name}: is a folder"),
        ("x" * 4001, [], "error: a question has at most 4000 characters and 4 pictures"),
        ("What?", [CAT] * 5, "error: a question has at most 4000 characters and 4 pictures"),
    ]:
        said = last(sparse, visitor, question, files)
        assert said.startswith(line) and "\n" not in said and str(tmp_path) not in said
    assert last(sparse, visitor, "And now?") == alone.ask("And now?").answer


def test_a_failing_model_is_one_line_and_a_new_conversation(sparse, monkeypatch, capsys):
    visitor = visitors(sparse).find("a")
    last(sparse, visitor, "What?")
    fail = lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    with monkeypatch.context() as patched:
        patched.setattr(CuMo, "generate", fail)
        said = last(sparse, visitor, "And?")
    assert said == "error: the model failed (OutOfMemoryError); the conversation starts again"
    assert "no memory" in capsys.readouterr().err
    assert last(sparse, visitor, "What?") == talk(sparse).ask("What?").answer


def test_language_model_alone_answers_but_takes_no_picture():
    model = tiny_cumo(vocab=1024).llm.eval()
    visitor = visitors(model).find("a")
    assert last(model, visitor, "What?") == talk(model).ask("What?").answer
    said = last(model, visitor, "What?", [CAT])
    assert said == "error: this is a language model without vision; ask without a picture"


def test_visitors_at_the_same_time_get_the_answers_they_get_alone_one_by_one(sparse):
    log = []

    def logged(work):
        def call(*args):
            log.append(("begin", threading.get_ident()))
            try:
                return work(*args)
            finally:
                log.append(("end", threading.get_ident()))

        return call

    class Logged(Conversation):
        ask = logged(Conversation.ask)

    known = web.Visitors(lambda: Logged(sparse, TOKENIZER, 32000, max_new_tokens=6), keep=8)
    turns = [[("What is it?", [CAT]), ("And now?", [])], [("Hello", []), ("Why?", [CAT])]]

    def visit(k):
        visitor = known.find(k)
        said = [last(sparse, visitor, text, files) for text, files in turns[k % 2]]
        return said, threading.get_ident()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers, threads = zip(*pool.map(visit, range(8)))
    for k in range(2):
        alone = talk(sparse)
        right = [alone.ask(text, [web.open_image(file) for file in files], lambda _: None).answer
                 for text, files in turns[k]]  # fmt: skip
        assert answers[k::2] == (right,) * 4
    assert [what for what, _ in log] == ["begin", "end"] * (8 * 2)
    (worker,) = {thread for _, thread in log}
    assert worker not in threads


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_who_leaves_in_mid_answer_ends_it(sparse, how):
    known = visitors(sparse, tokens=30000)
    visitor = known.find("a")
    answer = web.reply(sparse, visitor, "What?", [])
    while not next(answer)[-1]["content"]:
        pass
    turn = web.submit(lambda: "the turn of the next one")
    assert not turn.done()
    answer.close() if how == "closed" else known.forget("a")
    assert turn.result(timeout=5)
    assert 0 < len(visitor.conversation.turns[0].said) < 10000
    assert how == "closed" or len(list(answer)) < 10000


def test_who_leaves_the_queue_is_not_answered(sparse):
    visitor, others = visitors(sparse).find("a"), threading.Event()
    answer = web.reply(sparse, visitor, "What?", [])
    next(answer)
    web.submit(others.wait)
    thread = threading.Thread(target=lambda: next(answer, None), daemon=True)
    thread.start()
    visitor.left = True
    others.set()
    thread.join(10)
    assert not thread.is_alive()
    answer.close()
    assert not visitor.conversation.turns


def test_the_one_idle_for_longest_is_dropped_first(sparse):
    known = visitors(sparse, keep=2)
    a, b = known.find("a"), known.find("b")
    assert known.find("a") is a
    known.find("c")
    assert list(known.known) == ["a", "c"] and known.find("b") is not b
    known.forget("nobody")
    assert len(known.known) == 2


def test_a_question_without_any_picture_is_told_so_once(sparse):
    visitor = visitors(sparse).find("a")
    last(sparse, visitor, "What?")
    last(sparse, visitor, "And?")
    note = {"role": "assistant", "content": "(no picture in this conversation)"}
    assert [m["role"][0] for m in visitor.messages] == list("uaaua") and visitor.messages[1] == note
    for model, files in ((sparse, [CAT]), (tiny_cumo(vocab=1024).llm.eval(), [])):
        visitor = visitors(model).find("a")
        last(model, visitor, "What?", files)
        assert note not in visitor.messages


PHONE = "Mozilla/5.0 (Linux; Android 15; Pixel 9) Chrome/140.0.0.0 Mobile Safari/537.36"
LAPTOP = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/140.0.0.0 Safari/537.36"


@pytest.mark.parametrize("agent, widest", [(PHONE, 600), (LAPTOP, 2000)])
def test_the_map_is_drawn_for_the_visitors_screen(sparse, agent, widest):
    pytest.importorskip("matplotlib")
    width = web.width_for({"user-agent": agent})
    chart = web.draw_map(sparse, web.open_image(CAT), width)
    assert widest / 2 < chart.width <= widest
    assert web.width_for({}) == web.width_for({"user-agent": None}) == web.DESKTOP
    assert web.has_maps(sparse)
    assert not web.has_maps(tiny_cumo()) and not web.has_maps(tiny_cumo().llm)


class Recorder:
    """Stands for gradio: any component, with its arguments; an event keeps its functions."""

    def __init__(self, name="gr", *args, **options):
        self.name, self.args, self.options, self.parts = name, args, options, {}
        self.value = options.get("value", args[0] if args else None)

    def __getattr__(self, name):
        def make(*args, **options):
            part = Recorder(name, *args, **options)
            self.parts.setdefault(name, []).append(part)
            return part

        return make

    __enter__ = lambda self: self
    __exit__ = lambda self, *_: None


class Page:
    """The page of a model, and what its visitor's clicks call."""

    def __init__(self, model, tokens=6):
        self.gr, self.visitors = Recorder(), visitors(model, tokens)
        web.page(self.gr, model, self.visitors, "tiny")
        (self.box,) = [box for box in self.gr.parts["MultimodalTextbox"] if box.parts]
        (self.asking,), (self.stop,) = self.box.parts["submit"], self.box.parts["stop"]
        agent = {"user-agent": PHONE}
        self.visit = types.SimpleNamespace(session_hash="a", headers=agent)

    def map(self):
        """The map that comes after an answer; None if the page stays as it is."""
        caption, chart = self.asking.parts["then"][1].args[0](self.visit)
        return chart.value if caption == web.MAP and chart.options["visible"] else None


def test_stop_ends_the_answer_and_the_map_comes_as_after_a_whole_one(sparse):
    pytest.importorskip("matplotlib")
    page = Page(sparse, tokens=30000)
    for messages, _ in page.asking.args[0]({"text": "What?", "files": [CAT]}, page.visit):
        if messages[-1]["role"] == "assistant" and messages[-1]["content"]:
            page.stop.args[0](page.visit)
    assert len(page.visitors.find("a").conversation.turns[0].said) < 10000
    assert page.map().width < 600
    assert page.map() is None, "the page has it"
    page = Page(sparse)
    for text, files in (("What?", [CAT]), ("And?", [])):
        *_, (messages, _) = page.asking.args[0]({"text": text, "files": files}, page.visit)
        assert messages[-1]["content"] and (page.map() is None) == (not files)


def test_no_event_cancels_another(sparse):
    """gradio's `cancels` is a race in the browser; some of the time the chat becomes "Error"."""
    page = Page(sparse)
    (over,) = page.gr.parts["on"]
    for event in (over, page.stop, page.asking, *page.asking.parts["then"]):
        assert "cancels" not in event.options
    assert "reload" in over.options["js"], "a page that is left ends its answer"


def test_the_map_has_its_caption_above_it_and_before_a_line_in_place_of_an_empty_box(sparse):
    pytest.importorskip("matplotlib")
    page = Page(sparse)
    (chart,), (_, caption) = page.gr.parts["Image"], page.gr.parts["Markdown"]
    assert page.gr.parts["Column"][-1].options["visible"] and not chart.options["visible"]
    assert caption.args[0] == web.NO_MAP and "is drawn here" in web.NO_MAP
    assert not Page(tiny_cumo(vocab=1024)).gr.parts["Column"][-1].options["visible"], "no experts"
    assert chart.options["show_label"] is False, "gradio writes a label over the picture"


def test_the_page_has_five_pictures_to_try_and_says_what_can_be_asked(sparse):
    page = Page(sparse)
    (examples,), (title, *_) = page.gr.parts["Examples"], page.gr.parts["Markdown"]
    files = {file for row in examples.args[0] for file in row["files"]}
    assert len(files) == 5 and max(len(row["files"]) for row in examples.args[0]) == 2
    assert all(web.open_image(file).width for file in files)
    assert "knows drawings of 100 objects" in title.args[0]
    assert "language model" in web.examples(tiny_cumo().llm)[1]


def test_missing_gradio_is_one_line_that_names_the_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = refusal(web.main, [], monkeypatch, capsys)
    assert line == 'error: the page needs gradio: pip install ".[web]"'


def test_a_template_can_be_named_for_a_model_that_has_none(tmp_path, monkeypatch, capsys):
    def page(gr, model, visitors, name):
        talk = visitors.find("a").conversation
        raise ValueError(f"asks in {template_for(model, talk.tokenizer)}")

    monkeypatch.setitem(sys.modules, "gradio", sys)
    monkeypatch.setattr(web, "page", page)
    model = tiny_cumo(vocab=1024)
    for saved in (model, model.llm):
        saved.save_pretrained(tmp_path)
        shutil.copy(MINI / "tokenizer.json", tmp_path)
        start = lambda *flags: refusal(web.main, ["--model", tmp_path, *flags], monkeypatch, capsys)
        without = start()
        assert start("--template", "llama2") == "error: asks in llama2"
        assert "'llama3' is unknown; choose from" in start("--template", "llama3")
    assert "may be a base model; name the nearest with --template: " in without


def test_a_model_is_found_by_name_from_any_folder(tmp_path, monkeypatch, capsys):
    def load_model(path, device, dtype):
        raise ValueError(f"would load {path}")

    monkeypatch.setitem(sys.modules, "gradio", sys)
    monkeypatch.setattr(web, "load_model", load_model)
    monkeypatch.chdir(tmp_path)
    line = refusal(web.main, ["--model", "data/mini/llm"], monkeypatch, capsys)
    assert line == f"error: would load {ROOT / 'data' / 'mini' / 'llm'}"


# ---------------------------------------------------------------------------- a running server


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def served(model, *flags):
    """Run extras/web.py until this generator is closed -> (its address, its process id)."""
    port = free_port()
    command = [sys.executable, "extras/web.py", "--model", model, "--port", port, *flags]
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL) as server:
        try:
            for _ in range(240):
                with socket.socket() as probe:
                    if not probe.connect_ex(("127.0.0.1", port)):
                        break
                assert server.poll() is None, "the server has ended"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}", server.pid
            assert server.poll() is None, "the server has ended"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, sparse):
    folder = tmp_path_factory.mktemp("model")
    sparse.save_pretrained(folder)
    shutil.copy(MINI / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def gradio_client():
    pytest.importorskip("gradio")
    return pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def url(gradio_client, model_dir):
    for address, _ in served(model_dir, "--max-new-tokens", 150, "--context", 32000):
        yield address


@pytest.fixture(scope="module")
def endless(gradio_client, model_dir):
    for address, _ in served(model_dir, "--max-new-tokens", 30000, "--context", 32000):
        yield address


def asked(url, text, *files):
    """The answer to a new client."""
    import gradio_client

    client = gradio_client.Client(url, verbose=False)
    files = [gradio_client.handle_file(str(file)) for file in files]
    messages, _ = client.predict({"text": text, "files": files}, api_name="/ask")
    client.close()
    content = messages[-1]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def begun(url, session, text, path=""):
    """Ask over plain HTTP -> (the open stream, its line) once the answer has begun."""
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}}] if path else []
    config = json.load(urllib.request.urlopen(url + "/config"))
    index = [d["id"] for d in config["dependencies"] if d["api_name"] == "ask"][0]
    body = {"data": [{"text": text, "files": files}], "fn_index": index, "session_hash": session}
    request = urllib.request.Request(url + "/gradio_api/queue/join", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    urllib.request.urlopen(request).read()
    stream = urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}")
    lines = (line for line in stream if b'"process_' in line and b"process_starts" not in line)
    for n, line in enumerate(lines):
        if n == 2 or b"process_completed" in line:  # the first one only repeats the question
            return stream, line.decode()
    raise AssertionError("the stream ended without an answer")


def get(url, path):
    """Status and content of a literal path; urllib would resolve the dots."""
    connection = http.client.HTTPConnection(url.rpartition("/")[2], timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.slow
def test_sixteen_clients_at_once_some_leaving_and_some_sending_garbage(
    url, model_dir, sparse, tmp_path
):
    (tmp_path / "text.png").write_text("this is no picture")
    alone = [talk(sparse, 150).ask("What?", images) for images in ([], [web.open_image(CAT)])]
    alone = [answer.answer + web.cut_note(answer) for answer in alone]

    def answered(i):
        return asked(url, "What?", *[CAT] * (i % 2)) == alone[i % 2]

    def leaves(i):
        begun(url, f"leaves{i}", "What is it?")[0].close()
        return True

    def garbage(i):
        if i % 2:
            said = asked(url, "What?", tmp_path / "text.png")
            return said.startswith("error: text.png: is no")
        _, line = begun(url, f"garbage{i}", "What?", "/etc/passwd")
        return "root:" not in line and '"success":false' in line

    jobs = [answered] * 9 + [leaves] * 4 + [garbage] * 3
    jobs = [jobs[7 * i % 16] for i in range(16)]  # mixed
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        good = list(pool.map(lambda job, i: job(i), jobs, range(16)))
    assert all(good), [(job.__name__, ok) for job, ok in zip(jobs, good)]
    assert answered(0)


@pytest.mark.slow
def test_when_someone_leaves_the_next_one_is_served_at_once(endless):
    for i in range(3):  # each answer would take minutes
        start = time.perf_counter()
        begun(endless, f"one{i}", "What is it?")[0].close()
        assert time.perf_counter() - start < 25


@pytest.mark.slow
def test_only_the_examples_can_be_fetched(url):
    assert get(url, f"/gradio_api/file={CAT}") == (200, Path(CAT).read_bytes())
    config = json.loads(get(url, "/config")[1])
    assert not config["analytics_enabled"] and config["space_id"] is None
    places = ["/etc/passwd", f"{ROOT}/README.md", "README.md", "./README.md", "../README.md",
              f"{ROOT}/extras/web.py", f"{CAT}/../README.md", f"{ROOT}/.git/HEAD",
              "..%2f..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "//etc/passwd",
              f"{ROOT}/out/stage3/config.json", "file:///etc/passwd"]  # fmt: skip
    ways = ["/file=", "/gradio_api/file=", "/gradio_api/file/", "/static/", "/assets/", "/",
            "/static/../../../../../../../..", "/assets/..%2f..%2f..%2f.."]  # fmt: skip
    for path in (way + place for way in ways for place in places):
        status, body = get(url, path)
        assert status >= 400, path
        assert b"root:" not in body and README.encode() not in body


class Browser:
    """Chromium, and what a visitor does in it."""

    def __init__(self, driver):
        self.driver = driver
        self.find = lambda css: driver.find_elements("css selector", css)

    def wait(self, ready):
        from selenium.common.exceptions import StaleElementReferenceException

        for _ in range(600):
            with contextlib.suppress(StaleElementReferenceException):  # the page is changing
                if found := ready():
                    return found
            time.sleep(0.1)
        raise AssertionError("60 seconds passed")

    def open(self, url):
        self.driver.get(url)
        self.wait(lambda: self.find(".gallery-item"))
        self.wait(lambda: self.find("textarea"))

    def try_example(self, n):
        self.find(".gallery-item")[n].click()
        self.wait(lambda: self.find(".thumbnail-item img, .thumbnail-image"))
        self.find("textarea")[0].send_keys("\n")

    def maps(self):
        return [src for e in self.find("img") if "/image.png" in (src := e.get_attribute("src"))]

    def said(self):
        return [e.text for e in self.find(".message.bot") if e.text]

    def start_over(self):
        [e for e in self.find("button") if e.text == "Start over"][0].click()
        self.wait(lambda: not self.find(".message") and self.find(".gallery-item"))


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with its chromedriver")
    pytest.importorskip("matplotlib")
    options = selenium.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-proxy-server"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = selenium.ChromeService(shutil.which("chromedriver"))
    with selenium.Chrome(options=options, service=service) as driver:
        yield Browser(driver)


@pytest.mark.slow
def test_a_browser_shows_the_streamed_answer_and_the_map(browser, url, sparse):
    find, wait = browser.find, browser.wait
    browser.open(url)
    assert [e.text for e in find("#map p")] == [web.NO_MAP] and not browser.maps()
    wait(lambda: find("input[type=file]"))[0].send_keys(CAT)
    wait(lambda: find(".thumbnail-item img, .thumbnail-image"))
    find("textarea")[0].send_keys("Where is the cat?\n")
    lengths = set()
    answer = talk(sparse, 150).ask("Where is the cat?", [web.open_image(CAT)]).answer

    def finished():
        lengths.update(map(len, browser.said()))
        return browser.maps()

    (chart,) = wait(finished)
    assert [e.text for e in find("#map p")] == [web.MAP]
    assert len(lengths) > 3, "it came piece by piece"
    (shown,) = browser.said()
    assert "".join(shown.split())[:20] == "".join(answer.split())[:20]
    assert shown.endswith("(cut: --max-new-tokens 150 allows no more)")
    assert Image.open(urllib.request.urlopen(chart)).width > 700
    sent = [json.loads(e["message"])["message"] for e in browser.driver.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in sent
            if m["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert all(where.startswith((url, "data:", "blob:")) for where in sent), "works offline"
    browser.start_over()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_answer_that_was_stopped_and_the_map_below_its_caption(
    browser, endless, width
):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.open(endless)
    for n in range(3):
        browser.try_example(n % 2)
        browser.wait(lambda n=n: len(browser.said()) > n)
        browser.wait(lambda: browser.find("button.stop-button"))[0].click()
        browser.wait(lambda: browser.find("button.submit-button"))
        before = browser.maps() if n else []
        browser.wait(lambda before=before: browser.maps() not in ([], before))
        time.sleep(1)
        assert len(browser.said()) == n + 1
        assert "Error" not in browser.find("body")[0].text
    (caption,), (chart,) = browser.find("#map p"), browser.find("#map img")
    assert caption.rect["y"] + caption.rect["height"] <= chart.rect["y"]
    over = browser.find("#map [data-testid=block-label]")  # for screen readers it is one pixel wide
    assert all(label.rect["width"] < 5 for label in over), "it hides the names of the experts"
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
    browser.try_example(0)
    browser.wait(lambda: len(browser.said()) > 3)
    browser.start_over()  # in the middle of an answer, which ends
    browser.try_example(1)
    browser.wait(lambda: browser.said())
