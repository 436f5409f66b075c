"""scripts/export.py --program: two files with the model's own log-probabilities and reports, and no pickle."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from models import MODELS
from modules.data.transforms import eval_transform
from modules.decoding.options import DecodingOptions
from modules.inference import torch_export as programs
from modules.runtime.errors import InputError
from scripts import export, predict
from tests.run.test_plugin import OWN_FLAGS, build
from tests.transform_support import LOOK

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 6


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["r2gencmn", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "r2gencmn")]
)
@torch.no_grad()
def test_programs_are_the_backbone(demo, demo_labels, demo_index, tmp_path, name):
    """Their log-probabilities are forward's, their greedy reports the search's, and a changed weight is noticed."""
    _, data, objective, _ = build(demo, demo_index, "--model_name", name, "--ithn", "off", *OWN_FLAGS[name])
    backbone, transform = objective.backbone.eval(), eval_transform(32, *LOOK)
    sizes = {"num_views": 2, "length": LENGTH, "num_ids": data.tokenizer.num_ids}
    written = programs.export_programs(backbone, transform, **sizes)
    programs.write_programs(tmp_path, written, {"any_length": backbone.any_length}, data.tokenizer.state())
    assert programs.largest_difference(tmp_path, backbone, transform, **sizes) < 1e-5

    encoder, step = (torch.export.load(tmp_path / file).module() for file in ("encoder.pt2", "step.pt2"))
    pixels = torch.randint(256, (5, 1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoded = encoder(pixels)
    tokens = torch.zeros(5, LENGTH + 1, dtype=torch.int64)
    for position in range(LENGTH):
        read = position + 1 if backbone.any_length else LENGTH
        tokens[:, position + 1] = step(tokens[:, :read], *encoded)[:, position].argmax(-1)
    ended = (tokens[:, 1:] == 0).cumsum(1) > 0
    wanted = backbone.generate(
        transform.normalise(pixels),
        decoding=DecodingOptions(sample_method="greedy", max_seq_length=LENGTH, block_trigrams=0),
    )
    assert torch.equal(tokens[:, 1:].masked_fill(ended, 0), wanted)

    backbone.get_parameter(backbone.vocabulary_entry)[1] *= -3
    assert programs.largest_difference(tmp_path, backbone, transform, **sizes) > 1e-3


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    return module.main()


@pytest.mark.thorough
def test_the_documented_loop_writes_what_predict_writes(demo, trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "programs"
    run(monkeypatch, export, trained / "model_best.pth", "--program", folder)
    assert re.search(r"largest difference .* \d\.\de[-+]\d\d\n", capsys.readouterr().out)
    assert {path.name for path in folder.iterdir()} == {"encoder.pt2", "step.pt2", "program.json", "vocabulary.json"}
    for name in ("encoder.pt2", "step.pt2"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
        with zipfile.ZipFile(folder / name) as archive:
            contents = {entry: archive.read(entry) for entry in archive.namelist()}
        assert not [entry for entry, content in contents.items() if b'"use_pickle": true' in content]
        assert not any(content for entry, content in contents.items() if "sample_inputs" in entry)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "SHARING.md").read_text(), re.DOTALL)
    (tmp_path / "loop.py").write_text("import torch\ntorch.set_num_threads(1)\n" + program)
    views = sorted(next(path for path in (demo / "images").iterdir() if path.is_dir()).glob("*.png"))
    words = subprocess.run(
        [sys.executable, tmp_path / "loop.py", folder, *views],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    ).stdout.strip()
    assert not run(
        monkeypatch,
        predict,
        "--load",
        trained / "model_best.pth",
        "--group",
        "all",
        "--sample_method",
        "greedy",
        "--block_trigrams",
        0,
        "--quiet",
        "--json",
        tmp_path / "out.json",
        *views,
    )
    assert words == json.loads((tmp_path / "out.json").read_text())["reports"][0]["report"] != ""


def test_a_difference_ends_the_command(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "export_programs", lambda *_, **__: ())
    monkeypatch.setattr(programs, "write_programs", lambda *_: None)
    monkeypatch.setattr(programs, "largest_difference", lambda *_, **__: 0.25)
    with pytest.raises(InputError, match=r"differ from the model by 2\.5e-01.*--tolerance 1\.0e-04"):
        run(monkeypatch, export, trained / "model_best.pth", "--program", tmp_path / "programs")
    run(monkeypatch, export, trained / "model_best.pth", "--program", tmp_path / "programs", "--tolerance", 0.5)
    for wrong in ("-1", "nan", "x"):
        with pytest.raises(InputError, match="must be a number from 0 on"):
            run(monkeypatch, export, "x.pth", "--program", tmp_path / "programs", "--tolerance", wrong)
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "file").touch()
    with pytest.raises(InputError, match="is there already"):
        run(monkeypatch, export, trained / "model_best.pth", "--program", tmp_path / "programs")
