"""The local page: it answers loopback only, keeps nothing, loads nothing from elsewhere, and a browser can use it."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.inference.report_index import ReportIndex
from modules.pages.local_page import answer, upload_folder
from modules.run.reporter import load_reporter
from modules.runtime.errors import InputError
from scripts import index_reports
from scripts.serve import Writer
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


@pytest.fixture(scope="module")
def server(trained, index):
    """Address of scripts/serve.py in a process of its own, which must end by itself when it is told to."""
    before = set(upload_folder().glob("uploads-*")) if upload_folder() else set()
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "scripts" / "serve.py",
            "--load",
            trained / "model_best.pth",
            "--index",
            index,
            "--port",
            "0",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        own = set(upload_folder().glob("uploads-*")) - before if upload_folder() else set()
        yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.stdout.close()
    assert not any(folder.exists() for folder in own)


def test_answers_loopback_only_and_forbids_the_rest(server):
    with urllib.request.urlopen(server) as reply:
        policy = reply.headers["Content-Security-Policy"]
        assert reply.headers["Cache-Control"] == "no-store"
    assert "default-src 'self'" in policy and "http" not in policy
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(server, headers={"Host": "evil.example"}))
    port = int(server.rsplit(":", 1)[1])
    outside = [entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for address in {address for address in outside if not address.startswith("127.")}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=5).close()


def test_in_a_browser(server, demo, tmp_path):
    """Drop two views, press the button, read the report, the confidences, the attention and the nearest reports."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser")
    outside = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on(
            "request",
            lambda request: (
                outside.append(request.url)
                if not request.url.startswith((server, "data:", "blob:", "about:"))
                else None
            ),
        )
        page.goto(server)
        folder = next(path for path in sorted((demo / "images").iterdir()) if path.is_dir())
        page.set_input_files("input[type=file]", [str(path) for path in sorted(folder.glob("*.png"))[:2]])
        page.wait_for_function("document.body.innerText.split('.png').length > 2")
        page.get_by_role("button", name="Write the report").press("Enter")
        frame = page.frame_locator("iframe[title='Generated reports']")
        frame.get_by_text("look most alike").wait_for(timeout=60_000)
        assert frame.locator(".similar li").count() == 3
        first = frame.locator(".mean").first
        first.focus()
        assert "attention on view 1" in frame.locator(".status").inner_text()
        page.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert not outside
    if upload_folder():
        assert not list(upload_folder().glob("uploads-*/**/*.png"))


def test_uploads_are_deleted_even_if_unreadable(tmp_path):
    gradio = pytest.importorskip("gradio")
    path = tmp_path / "x.png"
    path.write_bytes(b"no image")

    def refuse(*_):
        raise InputError("cannot be decoded")

    with pytest.raises(gradio.Error, match="cannot be decoded"):
        answer(refuse, [str(path)], True, 3)
    assert not path.exists()
    path.write_bytes(b"x")
    shown, files = answer(lambda *_: "<p title='\"'>a</p>", [str(path)], True, 3)
    assert not path.exists() and files is None
    assert "&lt;p title=" in shown and 'sandbox="allow-scripts"' in shown
    with pytest.raises(gradio.Error, match="Drop an image"):
        answer(refuse, None, True, 3)


def test_views_and_beams(demo, trained, index):
    reporter = load_reporter(str(trained / "model_best.pth"), {})
    images = sorted((demo / "images").rglob("*.png"))[:3]
    writer = Writer(reporter, ReportIndex.load(index), "c")
    assert writer(images, False, 2).count("<article") == 3
    assert reporter.decoding.beam_size == 2
    with pytest.raises(InputError, match="3 images for one study, but this model reads 2"):
        writer(images, True, 2)


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
    import json

    study = json.loads((demo / "annotation.json").read_text())["train"][0]
    reporter = load_reporter(str(trained / "model_best.pth"), {})
    pooled = reporter.pooled([[Image.open(demo / "images" / path) for path in study["image_path"][:2]]])[0]
    loaded = ReportIndex.load(index)
    loaded.check(str(index), reporter.extractor_sha256(), reporter.backbone.image_dim)
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
