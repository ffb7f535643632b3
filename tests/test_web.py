"""The web page: answers, mistakes, visitors who leave; which files it serves.

The slow tests run a server and need gradio, one of them a browser as well:
`pip install ".[web]" selenium`, and Debian's packages chromium and chromium-driver.
"""

import concurrent.futures
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
from engine.conversation import Conversation
from extras import web

MINI, CAT = ROOT / "data" / "mini" / "llm", str(ROOT / "cat.jpg")
TOKENIZER = Tokenizer.from_pretrained(MINI)
README = max((ROOT / "README.md").read_text(encoding="utf-8").splitlines(), key=len)[:40]


def talk(model, tokens=6):
    return Conversation(model, TOKENIZER, 32000, max_new_tokens=tokens)


def visitors(model, tokens=6, keep=4):
    return web.Visitors(lambda: talk(model, tokens), keep)


def last(model, visitor, text, files=(), maps=False):
    """The last message after an answer, and the map."""
    *_, (messages, chart) = web.reply(model, visitor, text, files, maps)
    assert messages is visitor.messages and messages[-1]["role"] == "assistant"
    return messages[-1]["content"], chart


@pytest.fixture(scope="module")
def sparse():
    return tiny_cumo(experts=4, vocab=1024, seed=3).eval()  # its answers depend on the picture


def test_the_page_answers_what_a_conversation_answers_and_remembers(sparse):
    visitor, alone = visitors(sparse).find("a"), talk(sparse)
    picture = [web.open_image(CAT)]
    first = alone.ask("What is it?", picture).answer
    assert last(sparse, visitor, "What is it?", [CAT])[0] == first
    assert last(sparse, visitor, "And now?")[0] == alone.ask("And now?").answer
    assert last(sparse, visitor, "", [CAT])[0] == alone.ask(web.DESCRIBE, picture).answer
    assert [m["role"][0] for m in visitor.messages] == list("uuauaua")


def test_an_answer_grows_and_the_map_comes_with_its_end(sparse):
    pytest.importorskip("matplotlib")
    seen = [
        (messages[-1]["content"], chart)
        for messages, chart in web.reply(sparse, visitors(sparse).find("a"), "What?", [CAT], True)
    ]
    texts, charts = zip(*seen)
    assert len(set(texts)) > 3 and all(b.startswith(a) for a, b in zip(texts, texts[1:]))
    assert charts[-1].width > 700 and set(charts[:-1]) == {None}
    assert web.has_maps(sparse)
    assert not web.has_maps(tiny_cumo()) and not web.has_maps(tiny_cumo().llm)


def test_mistakes_are_one_line_and_the_conversation_goes_on(sparse, tmp_path):
    broken, text = tmp_path / "broken.png", tmp_path / "text.png"
    Image.new("RGB", (90, 90)).save(broken)
    broken.write_bytes(broken.read_bytes()[:60])
    text.write_text("this is no picture")
    Image.new("RGB", (30000, 1)).save(tmp_path / "narrow.png")
    visitor, alone = visitors(sparse).find("a"), talk(sparse)
    assert last(sparse, visitor, "What?")[0] == alone.ask("What?").answer
    for question, files, line in [
        ("Is it?", [broken], "error: broken.png: "),
        ("Is it?", [CAT, text], "error: text.png: is no image Pillow can read"),
        ("Is it?", [tmp_path / "narrow.png"], "error: a picture of 30000x1 is too narrow"),
        (" ", [], "error: there is nothing to answer; type a question, or add a picture"),
        ("\ud800?", [tmp_path], f"error: {tmp_path.name}: is a folder"),
        ("x" * 4001, [], "error: a question has at most 4000 characters and 4 pictures"),
        ("What?", [CAT] * 5, "error: a question has at most 4000 characters and 4 pictures"),
    ]:
        said, _ = last(sparse, visitor, question, files)
        assert said.startswith(line) and "\n" not in said and str(tmp_path) not in said
    assert last(sparse, visitor, "And now?")[0] == alone.ask("And now?").answer


def test_a_failing_model_is_one_line_and_a_new_conversation(sparse, monkeypatch, capsys):
    visitor = visitors(sparse).find("a")
    last(sparse, visitor, "What?")
    fail = lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory"))
    with monkeypatch.context() as patched:
        patched.setattr(CuMo, "generate", fail)
        said, _ = last(sparse, visitor, "And?")
    assert said == "error: the model failed (OutOfMemoryError); the conversation starts again"
    assert "no memory" in capsys.readouterr().err
    assert last(sparse, visitor, "What?")[0] == talk(sparse).ask("What?").answer


def test_language_model_alone_answers_but_takes_no_picture():
    model = tiny_cumo(vocab=1024).llm.eval()
    visitor = visitors(model).find("a")
    assert last(model, visitor, "What?")[0] == talk(model).ask("What?").answer
    said = last(model, visitor, "What?", [CAT])[0]
    assert said == "error: this is a language model without vision; ask without a picture"


def test_visitors_at_the_same_time_get_the_answers_they_get_alone_one_by_one(sparse, monkeypatch):
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

    monkeypatch.setattr(web, "draw_map", logged(lambda model, image, width: image))
    known = web.Visitors(lambda: Logged(sparse, TOKENIZER, 32000, max_new_tokens=6), keep=8)
    turns = [[("What is it?", [CAT]), ("And now?", [])], [("Hello", []), ("Why?", [CAT])]]

    def visit(k):
        visitor = known.find(k)
        said = [last(sparse, visitor, text, files, maps=True)[0] for text, files in turns[k % 2]]
        return said, threading.get_ident()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers, threads = zip(*pool.map(visit, range(8)))
    for k in range(2):
        alone = talk(sparse)
        right = [alone.ask(text, [web.open_image(file) for file in files], lambda _: None).answer
                 for text, files in turns[k]]  # fmt: skip
        assert answers[k::2] == (right,) * 4
    assert [what for what, _ in log] == ["begin", "end"] * (8 * 2 + 8)  # answers and maps
    (worker,) = {thread for _, thread in log}
    assert worker not in threads


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_who_leaves_in_mid_answer_ends_it(sparse, how):
    known = visitors(sparse, tokens=30000)
    visitor = known.find("a")
    answer = web.reply(sparse, visitor, "What?", [], False)
    while not next(answer)[0][-1]["content"]:
        pass
    turn = web.submit(lambda: "the turn of the next one")
    assert not turn.done()
    answer.close() if how == "closed" else known.forget("a")
    assert turn.result(timeout=5)
    assert 0 < len(visitor.conversation.turns[0].said) < 10000
    assert how == "closed" or len(list(answer)) < 10000


def test_who_leaves_the_queue_is_not_answered(sparse):
    visitor, others = visitors(sparse).find("a"), threading.Event()
    answer = web.reply(sparse, visitor, "What?", [], False)
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
    *_, (_, chart) = web.reply(sparse, visitors(sparse).find("a"), "What?", [CAT], True, width)
    assert widest / 2 < chart.width <= widest
    assert web.width_for({}) == web.width_for({"user-agent": None}) == web.DESKTOP


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

    def __init__(self, model):
        self.gr, self.visitors = Recorder(), visitors(model)
        web.page(self.gr, model, self.visitors, "tiny")
        (self.box,) = [box for box in self.gr.parts["MultimodalTextbox"] if box.parts]
        (self.asking,), (self.stop,) = self.box.parts["submit"], self.box.parts["stop"]
        agent = {"user-agent": PHONE}
        self.visit = types.SimpleNamespace(session_hash="a", headers=agent)

    def shown(self, part):
        """The picture that an update shows; None if it leaves the page as it is."""
        return part.value if part.name == "Image" else None


def test_stop_while_the_map_is_drawn_does_not_lose_it(sparse, monkeypatch):
    pytest.importorskip("matplotlib")
    page = Page(sparse)
    ask, (late,) = page.asking.args[0], page.stop.parts["then"]
    drawn = []
    draw_map = web.draw_map
    monkeypatch.setattr(web, "draw_map", lambda *a: drawn.append(a) or draw_map(*a))
    for stop_at in ("the first word", "the map"):
        answer = ask({"text": "What?", "files": [CAT]}, page.visit)
        for messages, _, chart in answer:
            words = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
            if page.shown(chart) if stop_at == "the map" else words:
                break  # Stop: this value does not reach the page, and gradio closes the generator
        answer.close()
        assert len(drawn) == (stop_at == "the map")
        assert page.shown(late.args[0](page.visit)).width < 600
        assert page.shown(late.args[0](page.visit)) is None, "the page has it"
        drawn.clear()
    *_, (_, _, chart) = ask({"text": "What?", "files": [CAT]}, page.visit)
    assert page.shown(chart) and page.shown(late.args[0](page.visit)) is None
    *_, (_, _, chart) = ask({"text": "And?", "files": []}, page.visit)
    assert page.shown(chart) is None, "the map of the last picture stays"


def test_there_is_no_empty_box_before_the_first_map_and_after_starting_over(sparse):
    pytest.importorskip("matplotlib")
    page = Page(sparse)
    (chart,) = page.gr.parts["Image"]
    assert chart.options["visible"] is False and "which part" in chart.options["label"]
    (clear,) = page.gr.parts["on"]
    *_, gone = clear.args[1](page.visit)
    assert gone.options == {"value": None, "visible": False}


def test_the_page_has_three_pictures_to_try_and_says_what_can_be_asked(sparse):
    page = Page(sparse)
    (examples,), (title,) = page.gr.parts["Examples"], page.gr.parts["Markdown"]
    files = {file for row in examples.args[0] for file in row["files"]}
    assert len(files) == 3 and max(len(row["files"]) for row in examples.args[0]) == 2
    assert all(web.open_image(file).width for file in files)
    assert "knows drawings of 100 objects" in title.args[0]
    assert "language model" in web.examples(tiny_cumo().llm)[1]


def test_missing_gradio_is_one_line_that_names_the_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    line = refusal(web.main, [], monkeypatch, capsys)
    assert line == 'error: the page needs gradio: pip install ".[web]"'


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
    """The answer to a new client, and the map's address."""
    import gradio_client

    client = gradio_client.Client(url, verbose=False)
    files = [gradio_client.handle_file(str(file)) for file in files]
    messages, _, chart = client.predict({"text": text, "files": files}, api_name="/ask")
    client.close()
    content = messages[-1]["content"]
    return content if isinstance(content, str) else content[0]["text"], chart


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
    alone = [talk(sparse, 150).ask("What?", images).answer
             for images in ([], [web.open_image(CAT)])]  # fmt: skip

    def answered(i):
        return asked(url, "What?", *[CAT] * (i % 2))[0] == alone[i % 2]

    def leaves(i):
        begun(url, f"leaves{i}", "What is it?")[0].close()
        return True

    def garbage(i):
        if i % 2:
            said = asked(url, "What?", tmp_path / "text.png")[0]
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


@pytest.mark.slow
def test_a_browser_shows_the_streamed_answer_and_the_map(url, sparse):
    selenium = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium with its chromedriver")
    pytest.importorskip("matplotlib")
    options = selenium.ChromeOptions()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-proxy-server"):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    service = selenium.ChromeService(shutil.which("chromedriver"))
    with selenium.Chrome(options=options, service=service) as browser:
        find = lambda css: browser.find_elements("css selector", css)

        def wait(ready):
            for _ in range(300):
                if found := ready():
                    return found
                time.sleep(0.1)
            raise AssertionError("30 seconds passed")

        browser.get(url)
        wait(lambda: find("input[type=file]"))[0].send_keys(CAT)
        wait(lambda: find(".thumbnail-item img, .thumbnail-image"))
        find("textarea")[0].send_keys("Where is the cat?\n")
        lengths = set()
        answer = talk(sparse, 150).ask("Where is the cat?", [web.open_image(CAT)]).answer

        def finished():
            texts = [e.text for e in find(".message.bot")]
            lengths.update(map(len, texts))
            return [src for e in find("img") if "/image.png" in (src := e.get_attribute("src"))]

        (chart,) = wait(finished)
        assert len(lengths) > 3, "it came piece by piece"
        shown = "".join(find(".message.bot")[0].text.split())
        assert shown[:20] == "".join(answer.split())[:20]
        assert Image.open(urllib.request.urlopen(chart)).width > 700
        sent = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in sent
                if m["method"] == "Network.requestWillBeSent"]  # fmt: skip
        assert all(where.startswith((url, "data:", "blob:")) for where in sent), "works offline"
        [e for e in find("button") if e.text == "Start over"][0].click()
        wait(lambda: not find(".message"))
