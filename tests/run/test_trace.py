"""What a reader of one training has to read: the project's files that run, and those that are not even imported."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES = 66  # entered by a training of R2GenCMN with ITHN; lower it with every file that is merged, never raise it
# What this training does not use.
NOT_IMPORTED = (
    "models.r2gen",
    "models.visualgpt",
    "models.xpronet",
    "modules.data.captions",
    "modules.data.shards",
    "modules.run.self_critical",
    "modules.training.rewards",
    "modules.training.self_critical",
    "modules.training.sync_norm",
)
# Third-party packages are imported first, so that the profiler does not slow them down. A file is entered when one of
# its functions runs, but for what runs while a file of the project is imported.
TRACE = """
import inspect, json, os, sys, threading
import jinja2, matplotlib.pyplot, sklearn, timm, torch, torchvision
sys.path.insert(0, os.getcwd())
entered, seen = set(), set()

def ours(file):
    return file.startswith(os.getcwd() + os.sep) and ".venv" not in file

def note(frame, event, _):
    code = frame.f_code
    if event != "call" or code in seen:
        return
    if ours(code.co_filename) and code.co_flags & inspect.CO_OPTIMIZED:
        caller = frame.f_back
        while caller is not None:
            if caller.f_code.co_name == "<module>" and ours(caller.f_code.co_filename):
                return
            caller = caller.f_back
        entered.add(os.path.relpath(code.co_filename))
    seen.add(code)

import main_train
from modules.run import training

def end(*_, **__):
    sys.setprofile(None)
    print(json.dumps({"entered": sorted(entered), "imported": sorted(sys.modules)}))

training.test_and_write = end  # training ends where the test begins
threading.setprofile(note)
sys.setprofile(note)
main_train.main()
"""


def test_a_training_enters_few_files_and_imports_nothing_that_it_does_not_use(demo, demo_index, tmp_path):
    flags = ["--ann_path", demo / "annotation.json", "--image_dir", demo / "images", "--negative_index", demo_index]
    flags += ["--epochs", 1, "--save_dir", tmp_path / "run", "--record_dir", tmp_path / "records", *TINY]
    command = [sys.executable, "-c", TRACE, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "modules/ithn/synthesis.py" in found["entered"] and "models/r2gencmn.py" in found["entered"]
    assert not set(NOT_IMPORTED) & set(found["imported"])
    assert len(found["entered"]) <= MOST_FILES, "\n".join(found["entered"])
