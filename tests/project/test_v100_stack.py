"""scripts/test_v100_stack.sh: tests the V100's versions once for each change of the requirements, with stand-ins."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, NOTE = "scripts/test_v100_stack.sh", ".ci/v100_tested"


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path):
    """A repository of the script and the requirements whose set-up and tests write down what they are called with."""
    root, calls = tmp_path / "project", tmp_path / "calls"
    (root / "scripts").mkdir(parents=True)
    (root / ".ci").mkdir()
    shutil.copytree(ROOT / "requirements", root / "requirements")
    for name in ("requirements.txt", SCRIPT):
        shutil.copy(ROOT / name, root / name)
    executable(root / "setup.sh", f'echo "setup $*" >>{calls}\n')
    executable(root / "run_tests.sh", f'echo "tests $*" >>{calls}\nexit "${{TESTS_END:-0}}"\n')

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)

    def run(*arguments, **environment):
        calls.write_text("")
        command = ["bash", root / SCRIPT, *arguments]
        folder = tmp_path / "temporary"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(
            command, cwd="/", env=os.environ | {"TMPDIR": str(folder)} | environment, capture_output=True, text=True
        )
        assert list(folder.iterdir()) == []  # the clone and its environment are gone
        return done.returncode, calls.read_text().splitlines()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "all")
    run.root, run.git = root, git
    return run


def test_it_runs_once_for_each_change_of_the_requirements(project):
    tested = (0, ["setup --v100 --dev", "tests --ignore tests/project"])
    assert project("--check") == (1, [])
    assert project() == tested
    assert project() == project("--check") == (0, [])
    # A comment installs nothing else.
    more = project.root / "requirements" / "dev.txt"
    more.write_text(more.read_text() + "# a remark\n\n")
    assert project() == (0, [])
    more.write_text(more.read_text() + "another>=1\n")
    assert project("--check") == (1, []) and project() == (2, [])  # not committed, so a clone would lack it
    project.git("commit", "--quiet", "-am", "more")
    assert project() == tested and project() == (0, [])
    extra = project.root / "requirements" / "serve.txt"  # which dev.txt includes
    extra.write_text(extra.read_text() + "another>=1\n")
    assert project("--check") == (1, [])


def test_what_failed_is_tested_again(project):
    code, called = project(TESTS_END="1")
    assert code == 1 and len(called) == 2 and not (project.root / NOTE).exists()
    assert project()[1] == called


def test_an_unknown_argument_explains(project):
    assert project("--now") == (2, [])


def test_continuous_integration_runs_it():
    assert f"bash {SCRIPT}" in (ROOT / ".ci" / "run").read_text()
