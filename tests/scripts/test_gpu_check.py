"""scripts/gpu_check.py: refuses a machine without a GPU, lets no check stop the others, runs on the null device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_checks, tables
from benchmarks.gpu_cases import STEPS, largest_difference
from benchmarks.gpu_checks import SECTIONS, Row
from benchmarks.null_device import Unavailable, build, environment
from modules.runtime.errors import InputError
from scripts import gpu_check

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("flags", "message"), [([], "no GPU to check: "), (["--device", "cpu"], "looks at a GPU")])
def test_without_a_gpu_it_says_so(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *flags])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        gpu_check.main()


def test_a_check_that_fails_leaves_the_others(monkeypatch):
    def broken(run):
        yield "first", "1 ms", None, {"ms": 1.0}
        raise RuntimeError("CUDA error:\n no kernel image")

    def whole(run):
        yield "second", "equal", True, {}

    monkeypatch.setattr(gpu_checks, "SECTIONS", {"a": broken, "b": whole})
    assert list(gpu_checks.rows(None)) == [
        Row("a", "first", "1 ms", None, {"ms": 1.0}),
        Row("a", "the check failed", "RuntimeError: CUDA error: no kernel image", False),
        Row("b", "second", "equal", True),
    ]


def test_differences_of_gradients():
    reference = {"w": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    assert largest_difference(reference, reference) == 0
    assert largest_difference({**reference, "w": torch.tensor([3.0, 4.5])}, reference) == pytest.approx(0.1)
    assert largest_difference({"w": reference["w"]}, reference) == float("inf")


def test_every_step_has_a_name_of_its_own():
    assert len(set(map(str, STEPS))) == len(STEPS)


def test_the_table_goes_into_the_page(tmp_path, monkeypatch, capsys):
    rows = gpu_checks.as_json([Row("waits", "r2gen", "none", True), Row("waits", "xpronet", "loss.py:3 (1)", False)])
    made = {"device_name": "NVIDIA V100", "threads": 4, "packages": {"torch": "2.10.0"}, "clock": "wall"}
    made |= {"created": "2026-01-01T00:00:00", "settings": {"quick": False}, "rows": rows}
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- GPU -->\nan older table\n<!-- end of GPU -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["tables.py", str(tmp_path), "--readme", str(page)])
    with pytest.raises(InputError, match="holds none of the JSON files"):
        tables.main()
    (tmp_path / "gpu_check.json").write_text(json.dumps(made))
    tables.main()
    for text in (page.read_text(), (tmp_path / "tables.md").read_text()):
        assert "## On NVIDIA V100\n" in text and "| waits | xpronet | **BAD** loss.py:3 (1) |" in text
    assert page.read_text().startswith("before\n<!-- GPU -->\n## On") and "older" not in page.read_text()
    assert page.read_text().endswith("|\n<!-- end of GPU -->\nafter\n")
    page.write_text("no place")
    with pytest.raises(InputError, match="the page has no <!-- GPU -->"):
        tables.main()


def test_the_project_has_a_place_for_the_table():
    assert "x\ny" in tables.into_page((ROOT / "benchmarks" / "README.md").read_text(), ["x", "y"])


@pytest.mark.slow
def test_every_check_runs_on_the_null_device(tmp_path):
    """Its values and seconds mean nothing; waits, memory and the order of the table do."""
    try:
        library = build()
    except Unavailable as reason:
        pytest.skip(f"no null device: {reason}")
    out = tmp_path / "gpu_check.json"
    program = [sys.executable, "benchmarks/null_device.py", "scripts/gpu_check.py", "--quick", "--out", str(out)]
    done = subprocess.run(program, cwd=ROOT, env=environment(library), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-2000:]  # the null device computes nothing, and that is noticed
    result = json.loads(out.read_text())
    assert result["settings"] == {"quick": True} and result["device_name"] == "null device"
    assert list(dict.fromkeys(row["section"] for row in result["rows"])) == list(SECTIONS)
    assert [row for row in result["rows"] if row["what"] == "the check failed"] == []
    waits = [row["figures"]["waits"] for row in result["rows"] if "waits" in row["figures"]]
    assert len(waits) == 2 and set(waits) == {0}
    steps = [row["figures"] for row in result["rows"] if "images_per_second" in row["figures"]]
    assert len(steps) == sum(not step.compiled for step in STEPS) and all(step["ms"] > 0 for step in steps)
    wrong = [row["what"] for row in result["rows"] if row["ok"] is False]
    assert wrong and all(row.endswith("against the CPU's") or "reports" in row for row in wrong)
