"""Sixteen visitors at the web page for minutes: every question is answered, whatever others do.

    python tests/campaigns/crowd.py --minutes 5 --out bench/faults.json   # needs gradio

extras/web.py serves a tiny CuMo at 127.0.0.1. Each visitor is a thread that repeats one thing until
the time is over:

    nine ask      two questions of one conversation, with or without a picture; each answer must be
                  the one that the model gives to a single visitor
    four leave    during an answer: they close the stream once the answer has begun
    three upload  garbage: broken pictures, a decompression bomb, too large files, paths, broken
                  requests; and try to read the machine's files. No response may contain one

The server's memory (RSS) and open files are recorded after each answer.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import numpy as np
import torch
from test_web import CAT, MINI, README, begun, get, served, talk
from tiny import tiny_cumo

from data.images import open_image
from data.weights import write_json
from extras.web import cut_note
from runs.results import commit, machine

TOKENS, UPLOAD_MB = 40, 1  # longest answer; largest upload
SECRET = b"nobody may read this"
CONVERSATIONS = [  # questions, each with its pictures
    [("What is it?", [CAT]), ("And now?", [])],
    [("Where is the cat?", [CAT]), ("Is it red?", [CAT])],
    [("Hello", []), ("Who are you?", [])],
]


def png(width, height, rows):
    """A PNG with the pixels `rows` whose header claims this width and height."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def garbage_files():
    dice = random.Random(0)
    return {
        "text.png": b"this is no picture",
        "noise.jpg": dice.randbytes(20_000),
        "cut.jpg": Path(CAT).read_bytes()[:3000],
        "empty.png": b"",
        "huge.png": png(50_000, 50_000, bytes(1000)),
        "bomb.png": png(12_000, 12_000, bytes(50 * 2**20)),
        "page.html": b"<script>alert(1)</script>",
        "a.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
        "large.png": dice.randbytes(UPLOAD_MB * 2**20 + 1000),
    }


class Crowd:
    def __init__(self, url, pid, place, expected, minutes):
        self.url, self.pid, self.place, self.expected = url, pid, place, expected
        self.deadline, self.lock = time.time() + 60 * minutes, threading.Lock()
        self.start, self.counts, self.rows = time.time(), Counter(), []
        self.files = {name: place / name for name in garbage_files()}
        for name, content in garbage_files().items():
            self.files[name].write_bytes(content)
        (place / "secret.txt").write_bytes(SECRET)

    def count(self, what, details=""):
        with self.lock:
            self.counts[what] += 1
            if details:
                print(f"{what}: {details}", flush=True)

    # --------------------------------------------------------------------------- the visitors

    def ask(self, k, turn):
        import gradio_client

        which = (k + turn) % len(CONVERSATIONS)
        patient = {"timeout": 300}  # on a busy machine an answer is late, not lost
        client = gradio_client.Client(self.url, verbose=False, httpx_kwargs=patient)
        for (text, files), right in zip(CONVERSATIONS[which], self.expected[which]):
            files = [gradio_client.handle_file(file) for file in files]
            self.count("asked")
            messages, *_ = client.predict({"text": text, "files": files}, api_name="/ask")
            said = messages[-1]["content"]
            said = said if isinstance(said, str) else said[0]["text"]
            self.count(*(["answered"] if said == right else ["lost", f"{said!r} not {right!r}"]))
            self.look()
        client.close()

    def leave(self, k, turn):
        self.gone(f"leaves{k}-{turn}", begun(self.url, f"leaves{k}-{turn}", "What is it?")[0])
        self.count("left")

    def gone(self, session, stream):
        """Leave like a closed browser: both its connections end."""
        stream.close()
        urllib.request.urlopen(f"{self.url}/gradio_api/heartbeat/{session}").close()

    def upload(self, k, turn):
        """Send each kind of garbage; the answer is one line, or a refusal, and contains no file."""
        name, file = list(self.files.items())[turn % len(self.files)]
        try:
            path = self.sent(name, file.read_bytes())
            stream, line = begun(self.url, f"garbage{k}-{turn}", "What?", path)
            self.gone(f"garbage{k}-{turn}", stream)
            self.refused("error: " in line or '"success":false' in line, line)
        except urllib.error.HTTPError as error:  # it is too large
            self.refused(name == "large.png", error.read().decode(errors="replace"))
        for path in (self.place / "secret.txt", "/etc/passwd", "../secret.txt", ROOT / ".git/HEAD"):
            stream, line = begun(self.url, f"path{k}-{turn}", "What?", str(path))
            self.gone(f"path{k}-{turn}", stream)
            self.refused('"success":false' in line, line)
        for body in (b"", b"{", b"[" * 10_000, b'{"data": 5, "fn_index": 0}', SECRET):
            try:
                self.post("/gradio_api/queue/join", body, "application/json").read()
            except urllib.error.HTTPError as error:
                self.refused(True, error.read().decode(errors="replace"))
        ways = ("/gradio_api/file=", "/file=", "/static/", "/gradio_api/proxy=")
        paths = (f"{self.place}/secret.txt", "/etc/passwd", f"{CAT}/../README.md",
                 "..%2f..%2fREADME.md")  # fmt: skip
        for way, path in itertools.product(ways, paths):
            status, body = get(self.url, way + path)
            self.refused(status >= 400, body.decode(errors="replace"))
        time.sleep(1)  # leaves the server time for the others

    def refused(self, good, answer):
        """Count a request that must be refused (`good`) without leaking a file's content."""
        leaks = "root:" in answer or SECRET.decode() in answer or README in answer
        good = good and not leaks
        self.count(*(["refused"] if good else ["let through", answer[:300]]))

    def post(self, path, body, kind):
        return urllib.request.urlopen(
            urllib.request.Request(self.url + path, body, {"Content-Type": kind}), timeout=120
        )

    def sent(self, name, content):
        """Upload a file -> its path on the server."""
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--x--\r\n"
        path = "/gradio_api/upload"
        return json.load(self.post(path, body, "multipart/form-data; boundary=x"))[0]

    # --------------------------------------------------------------------------- what is measured

    def look(self):
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        rss = pages * os.sysconf("SC_PAGESIZE") / 2**20
        files = len(os.listdir(f"/proc/{self.pid}/fd"))
        with self.lock:
            self.rows.append((time.time() - self.start, rss, files))

    def visit(self, k):
        job = [self.ask] * 9 + [self.leave] * 4 + [self.upload] * 3
        for turn in itertools.count():
            if time.time() > self.deadline:
                return
            try:
                job[k % 16](k, turn)
            except Exception as error:
                self.count("lost", f"{job[k % 16].__name__}: {error!r}")

    def found(self):
        rows = sorted(self.rows)
        late = rows[len(rows) // 2 :]
        slope = np.polyfit([t / 60 for t, _, _ in late], [rss for _, rss, _ in late], 1)[0]
        names = ("asked", "answered", "lost", "left", "refused", "let through")
        return {name: self.counts[name] for name in names} | {
            "rss_mib": [round(late[0][1], 1), round(late[-1][1], 1)],
            "rss_slope_mib_per_minute": round(slope, 2),
            "files": [min(n for *_, n in rows), max(n for *_, n in rows)],
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--out", help="JSON file whose `web` gets the counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        model = tiny_cumo(experts=4, vocab=1024, seed=3).eval()
        model.save_pretrained(place / "model")
        shutil.copy(MINI / "tokenizer.json", place / "model")
        expected = []
        for questions in CONVERSATIONS:
            alone = talk(model, TOKENS)
            answers = [alone.ask(text, [*map(open_image, files)], lambda _: None)
                       for text, files in questions]  # fmt: skip
            expected.append([answer.answer + cut_note(answer) for answer in answers])
        server = served(place / "model", "--max-new-tokens", TOKENS, "--context", 32000,
                        "--upload-mb", UPLOAD_MB)  # fmt: skip
        url, pid = next(server)
        crowd = Crowd(url, pid, place, expected, args.minutes)
        threads = [threading.Thread(target=crowd.visit, args=[k]) for k in range(args.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _ in server:  # checks that the server is still running, and ends it
            pass
    found = {"minutes": args.minutes, "clients": args.clients} | crowd.found()
    print(json.dumps(found, indent=1))
    if args.out:
        file = Path(args.out)
        there = json.loads(file.read_text()) if file.is_file() else {}
        go = f"python tests/campaigns/crowd.py --minutes {args.minutes:g}"
        about = {"command": go, "commit": commit(), "machine": machine()}
        write_json(file, there | {"web": about | found})
    sys.exit(bool(found["lost"] or found["let through"]))


if __name__ == "__main__":
    main()
