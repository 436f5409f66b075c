"""A whole job on marked data, in a process that writes down every connection: nothing private where it must not be."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
MARK = "zyxcanary"
# Runs the programs one after another under umask 0; every connection, name look-up and started program is written down.
DRIVER = """
import os, runpy, sys
os.umask(0)
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

def write_down(event, arguments):
    if event == "socket.connect" and not isinstance(arguments[1], (str, bytes)):  # a path: this machine's own sockets
        os.write(log, f"connect {arguments[1]}\\n".encode())
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        os.write(log, f"look-up {arguments[0]}\\n".encode())
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        os.write(log, f"start {os.path.basename(os.fsdecode(arguments[0]))}\\n".encode())

sys.addaudithook(write_down)
if sys.argv[2] == "try":
    import socket
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError:
        sys.exit()
import json
for program, *arguments in json.loads(sys.argv[2]):
    sys.argv = [program, *arguments]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
"""


def driven(log, jobs):
    # A user's environment: nothing in it that keeps the libraries from the network.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(log), jobs],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=250,
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder of a job on data with the mark in every report, id and path; what it printed; what it connected to."""
    folder = tmp_path_factory.mktemp("job")
    splits = {}
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        splits[split] = []
        for i in range(count):
            path = f"{MARK}image{split}{i}.png"
            (folder / "images").mkdir(exist_ok=True)
            Image.effect_noise((40, 40), 20 + i).save(folder / "images" / path)
            splits[split].append(
                {
                    "id": f"{MARK}id{split}{i}",
                    "image_path": [path],
                    "split": split,
                    "study_id": i,
                    "report": f"{MARK}word the heart of {split} {i} is normal . no effusion {i} .",
                }
            )
    (folder / "annotation.json").write_text(json.dumps(splits))
    data = ["--ann_path", folder / "annotation.json"]
    flags = [
        *data,
        "--image_dir",
        folder / "images",
        "--record_dir",
        folder / "records" / "deep",
        *TINY,
        "--threshold",
        1,
        "--tensorboard",
        "true",
        "--num_workers",
        1,
        "--epochs",
        1,
        "--log_period",
        1,
    ]
    index = folder / "mined" / "deep" / "index.safetensors"
    results = folder / "results" / "deep"
    (folder / "old").mkdir()
    (folder / "old").chmod(0o755)
    jobs = [
        ["scripts/mine_hard_negatives.py", *data, "--out", index, "--text_encoder", "tfidf", "--examples", 0],
        ["main_train.py", *flags, "--negative_index", index, "--save_dir", results],
        ["main_test.py", "--load", results / "model_best.pth", "--save_dir", folder / "old"],
    ]
    done = driven(folder / "connections", json.dumps([[str(part) for part in line] for line in jobs]))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr, (folder / "connections").read_text().splitlines()


def test_connections_are_seen(tmp_path):
    driven(tmp_path / "log", "try")
    assert any(line.startswith("connect ('127.0.0.1', 9)") for line in (tmp_path / "log").read_text().splitlines())


def test_nothing_is_connected_to_or_looked_up(job):
    _, _, connections = job
    assert not [line for line in connections if not line.startswith("start ")]
    # git for the provenance; the others look for shared libraries and name the machine.
    started = {line.removeprefix("start ") for line in connections}
    assert started <= {"git", "uname", "ldconfig", "gcc", "cc", "ld", "sh"}


def test_no_library_is_told_to_report(job):
    text = (ROOT / "requirements.txt").read_text().lower()
    assert not [name for name in ("wandb", "mlflow", "comet", "sentry", "neptune", "clearml") if name in text]


# Where reports, ids or paths are meant to be: each of these is for the owner's eyes, and the README says so.
ALLOWED = {
    "report.html",
    "res.csv",
    "gts.csv",
    "reports.json",
    "rexrank.json",
    "captions.json",
    "predicted_reports.csv",
    "gt_reports.csv",
    "res_labeled.csv",
    "gts_labeled.csv",
}
# The vocabulary is part of a checkpoint: words of the training reports, in alphabetical order.
VOCABULARY = (".pth",)


def produced(folder):
    return [path for name in ("results", "records", "mined", "old") for path in sorted((folder / name).rglob("*"))]


def test_the_mark_is_only_where_reports_are_meant_to_be(job):
    folder, said, _ = job
    files = [path for path in produced(folder) if path.is_file()]
    marked = {path.name for path in files if MARK.encode() in path.read_bytes() and path.suffix not in VOCABULARY}
    assert {"report.html", "gts.csv"} <= marked <= ALLOWED
    for private in (f"{MARK}image", f"{MARK}id"):
        assert not [path for path in files if path.suffix in VOCABULARY and private.encode() in path.read_bytes()]
    assert MARK not in said.replace(str(folder), "")
    names = {path.name.split(".")[0] for path in files}
    assert {"train", "test", "history", "results", "events"} <= names  # logs and TensorBoard were among them


def test_everything_is_the_owners_alone_even_where_the_umask_is_0(job):
    folder, _, _ = job
    for path in produced(folder):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif "tensorboard" not in path.parts:  # numbers only, in a folder of the owner's alone
            assert mode == 0o600, path
    assert stat.S_IMODE((folder / "results").stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "old").stat().st_mode) == 0o755  # a folder that is there is left as it is
