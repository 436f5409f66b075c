"""scripts/serve.py: only its own page reaches it, nothing is kept or looked up, and a browser can use it."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.inference.report_index import ReportIndex
from modules.pages.local_page import MAX_WAITING, TYPE
from modules.run.predictor import load_predictor
from modules.runtime.answering import AnswerFailed, AnsweringProcess
from modules.runtime.errors import InputError
from scripts import index_reports
from tests.inference.test_prediction import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def index(demo, trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "reports.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        run(
            patch,
            index_reports,
            "--load",
            trained / "model_best.pth",
            "--ann_path",
            demo / "annotation.json",
            "--image_dir",
            demo / "images",
            "--out",
            path,
            "--batch_size",
            4,
        )
    return path


# Notes every look-up of a name, every connection that is begun and every file that is opened for writing.
WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect"):
        note = f"{event} {arguments[-1]!r}"
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        note = f"write {arguments[0]!r}"
    else:
        return
    if "/dev/" not in note:
        os.write(NOTES, (note + "\\n").encode())
NOTES = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
sys.addaudithook(watch)
"""


class Server:
    """scripts/serve.py in a process of its own, watched, with a folder for temporary files that must stay empty."""

    def __init__(self, folder: Path, *arguments):
        self.temporary, self.notes = folder / "tmp", folder / "notes"
        self.temporary.mkdir()
        (folder / "sitecustomize.py").write_text(WATCH)
        environment = os.environ | {
            "PYTHONPATH": str(folder),
            "NOTES": str(self.notes),
            "TMPDIR": str(self.temporary),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "scripts" / "serve.py", "--port", "0", *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.address = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", self.process.stdout.readline())[0]
        self.port, self.token = re.search(r":(\d+)/([\w-]+)/", self.address).groups()
        self.origin = f"http://127.0.0.1:{self.port}"
        self.notes.write_text("")  # what is opened before the page is up is the libraries' own

    def ask(self, method: str, route: str, body: bytes = b"", **headers) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request over a raw socket; ``headers`` replace the browser's, None drops."""
        told = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"}
        if method == "POST":
            told |= {"Origin": self.origin, "Content-Type": TYPE, "Content-Length": len(body)}
        told |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [f"{name}: {value}" for name, value in told.items() if value is not None]
        with socket.create_connection(("127.0.0.1", int(self.port)), timeout=60) as connection:
            connection.sendall("\r\n".join([f"{method} {route} HTTP/1.1", *lines, "", ""]).encode() + body)
            reply = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, rest = reply.partition(b"\r\n\r\n")
        first, *others = head.decode().split("\r\n")
        return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in others), rest


def request(images: list[Path], together: bool = True, beam_size: int = 2, **head) -> bytes:
    files = [path.read_bytes() for path in images]
    head = {
        "names": [path.name for path in images],
        "sizes": [len(content) for content in files],
        "together": together,
        "beam_size": beam_size,
    } | head
    return json.dumps(head).encode() + b"\n" + b"".join(files)


@pytest.fixture(scope="module")
def server(trained, index, tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("served"), "--load", trained / "model_best.pth", "--index", index)
    try:
        yield started
        started.process.send_signal(signal.SIGTERM)
        started.process.wait(timeout=60)
    finally:
        started.process.kill()
        started.process.stdout.close()


@pytest.fixture(scope="module")
def views(demo):
    folder = next(path for path in sorted((demo / "images").iterdir()) if path.is_dir())
    return sorted(folder.glob("*.png"))[:2]


def test_the_page_is_closed_to_everybody_else(server):
    page = f"/{server.token}/"
    status, headers, body = server.ask("GET", page)
    assert status == 200 and b"<h1>Report generation</h1>" in body
    assert headers["cache-control"] == "no-store" and "default-src 'none'" in headers["content-security-policy"]
    for route in (
        "/",
        "/report",
        f"/{server.token[:-1]}x/",
        "/gradio_api/queue/join",
        f"/{server.token}/../etc/passwd",
        f"/{server.token}/file=http://host.example",
        f"{page}docs",
    ):
        assert server.ask("GET", route)[0] == 404, route
    assert server.ask("GET", page, Host="evil.example")[0] == 400
    assert server.ask("GET", page, Host="127.0.0.1")[0] == 400
    assert server.ask("GET", page, Origin="http://evil.example")[0] == 403
    assert server.ask("GET", page, Sec_Fetch_Site="cross-site")[0] == 403
    for route in (page, f"{page}report", f"{page}example.png", "/"):
        for method in ("OPTIONS", "PUT", "DELETE", "POST"):
            status, headers, _ = server.ask(method, route, Origin="http://evil.example")
            assert status in (400, 403, 404, 405) and not any(name.startswith("access-control") for name in headers)


def test_listens_on_loopback_only(server):
    outside = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in {address for address in outside if not address.startswith("127.")}:
        with pytest.raises(OSError):
            socket.create_connection((address, int(server.port)), timeout=5).close()


def test_a_report_comes_from_bytes_alone(server, views):
    route = f"/{server.token}/report"
    status, _, body = server.ask("POST", route, request(views))
    html = json.loads(body)["html"]
    assert status == 200 and html.count("<article") == 1 and "look most alike" in html and html.count("<figure") == 2
    assert json.loads(server.ask("POST", route, request(views, together=False))[2])["html"].count("<article") == 2
    named = json.loads(server.ask("POST", route, request(views[:1], names=["../../<b>x</b>\0.png"]))[2])["html"]
    assert "../" not in named and "<b>" not in named
    status, _, body = server.ask("POST", route, request([*views, views[0]]))
    assert status == 422 and b"this model reads 2" in body


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"path": "/dev/zero"}\n', {}, 400),
        (b'{"path": "/etc/hostname"}', {}, 400),
        (b'{"names": ["a"], "sizes": [99], "together": true, "beam_size": 1}\n', {}, 400),
        (b'{"names": ["a"], "sizes": [-1], "together": true, "beam_size": 1}\n', {}, 400),
        (b'{"names": [], "sizes": [], "together": true, "beam_size": 1}\n', {}, 422),
        (b'{"names": ["a"], "sizes": [1], "together": true, "beam_size": 999999}\nx', {}, 422),
        (b'{"names": ["a"], "sizes": [1], "together": true, "beam_size": 1}\nx', {}, 422),  # no image
        (b"[" * 60000, {}, 400),
        (b"", {"Origin": None}, 403),
        (b"", {"Origin": "null"}, 403),
        (b"", {"Content_Type": "text/plain"}, 415),
        (b"", {"Content_Type": "multipart/form-data; boundary=x"}, 415),
        (b"0\r\n\r\n", {"Content_Length": None, "Transfer_Encoding": "chunked"}, 411),
        (b"", {"Content_Length": 2**40}, 413),
    ],
)
def test_any_other_request_gets_one_line(server, body, headers, status):
    found, _, answer = server.ask("POST", f"/{server.token}/report", body, **headers)
    assert found == status and set(json.loads(answer)) == {"error"}
    assert str(ROOT) not in answer.decode()


def test_two_hundred_at_once_are_answered_or_refused(server, views):
    body = request(views[:1])
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda _: server.ask("POST", f"/{server.token}/report", body)[0], range(200)))
    assert set(found) <= {200, 503} and found.count(200) >= MAX_WAITING
    assert server.ask("POST", f"/{server.token}/report", body)[0] == 200


def test_nothing_was_looked_up_or_written(server, views):
    """After the requests above: no name was resolved, no connection begun, no file opened for writing."""
    assert server.ask("POST", f"/{server.token}/report", request(views))[0] == 200
    assert server.notes.read_text() == ""
    assert list(server.temporary.iterdir()) == []


@pytest.mark.thorough
def test_a_kill_leaves_no_file_and_no_process(trained, views, tmp_path):
    def shared():
        return set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()

    before = shared()
    started = Server(tmp_path, "--load", trained / "model_best.pth")
    with started.process.stdout:
        children = Path(f"/proc/{started.process.pid}/task/{started.process.pid}/children").read_text().split()
        assert children
        assert started.ask("POST", f"/{started.token}/report", request(views))[0] == 200
        started.process.kill()
        started.process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list(started.temporary.iterdir()) == [] and started.notes.read_text() == "" and shared() <= before


def echo():
    """For AnsweringProcess: sleeps, dies, refuses or answers as it is asked."""

    def answer(asked, files):
        if asked["do"] == "sleep":
            time.sleep(600)
        if asked["do"] == "die":
            os._exit(1)
        if asked["do"] == "refuse":
            raise InputError("no\nimage")
        return {"bytes": sum(map(len, files))}

    return answer, {"ready": 1}


@pytest.mark.thorough
def test_a_request_that_takes_too_long_or_kills_its_process_is_given_up():
    answering = AnsweringProcess(echo, timeout=60.0)
    try:
        assert answering.wait_until_ready() == {"ready": 1}
        assert answering.ask({"do": "add"}, [b"12", b"3"]) == {"bytes": 3}
        with pytest.raises(InputError, match="^no image$"):
            answering.ask({"do": "refuse"}, [])
        with pytest.raises(AnswerFailed, match="died"):
            answering.ask({"do": "die"}, [])
        answering.timeout = 0.1
        answering.wait_until_ready()
        with pytest.raises(AnswerFailed, match="no report within 0.1 s"):
            answering.ask({"do": "sleep"}, [b"1"])
        answering.timeout = 60.0
        assert answering.ask({"do": "add"}, [b"1"]) == {"bytes": 1}
    finally:
        answering.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


def test_in_a_browser(server, views, browser):
    """Drop two views, press the button, read the report, where the model looked and nearest reports; write again."""
    page, outside, errors = browser.new_page(), [], []
    page.on("request", lambda sent: outside.append(sent.url))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(server.address)
    assert page.title() == page.locator("h1").inner_text() and page.locator("h1").count() == 1
    page.set_input_files("input[type=file]", [str(path) for path in views])
    assert page.locator("#chosen img").count() == 2
    page.get_by_role("button", name="Write the report").press("Enter")
    page.get_by_text("look most alike").wait_for(timeout=60_000)
    assert page.locator(".similar li").count() == 3
    page.locator(".mean").first.focus()
    assert "attention on view 1" in page.locator(".status").inner_text()
    page.locator("#beams").fill("1")
    page.get_by_role("button", name="Write the report").click()
    page.locator("#state", has_text="written in").wait_for()
    page.get_by_role("button", name="Try a synthetic example").click()
    page.locator("#chosen").get_by_text("synthetic example.png").wait_for()
    page.close()
    assert not errors and not [url for url in outside if not url.startswith((server.address, "blob:", "data:"))]


def test_nearest_reports(tmp_path):
    found = ReportIndex.of(np.array([[1.0, 0], [2, 0], [1, 1], [0, 3]]), ["a", "a", "b", "c"], "m")
    assert found.nearest(np.array([4.0, 0]), 2) == [(1.0, "a"), (pytest.approx(0.5**0.5), "b")]
    found.save(tmp_path / "i.safetensors")
    assert (tmp_path / "i.safetensors").stat().st_mode & 0o777 == 0o600
    again = ReportIndex.load(tmp_path / "i.safetensors")
    assert again.reports == found.reports and np.array_equal(again.features, found.features)
    again.check("i", "m", 2)
    for model, width in (("other", 2), ("m", 3)):
        with pytest.raises(InputError, match="another visual extractor"):
            again.check("i", model, width)
    (tmp_path / "bad").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    for path in ("bad", "absent"):
        with pytest.raises(InputError, match="--index"):
            ReportIndex.load(tmp_path / path)


def test_an_image_finds_its_own_report(demo, trained, index):
    study = json.loads((demo / "annotation.json").read_text())["train"][0]
    predictor = load_predictor(str(trained / "model_best.pth"), {})
    pooled = predictor.pooled([[Image.open(demo / "images" / path) for path in study["image_path"][:2]]])[0]
    loaded = ReportIndex.load(index)
    loaded.check(str(index), predictor.extractor_sha256(), predictor.backbone.image_dim)
    cosine, report = loaded.nearest(pooled, 1)[0]
    assert report == study["report"] and cosine == pytest.approx(1, abs=1e-5)


def test_a_taken_port_gets_one_line(trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = subprocess.run(
            [
                sys.executable,
                ROOT / "scripts" / "serve.py",
                "--load",
                trained / "model_best.pth",
                "--port",
                str(taken.getsockname()[1]),
            ],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2 and "--port" in done.stderr and "Traceback" not in done.stderr
