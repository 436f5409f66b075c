"""A model that is exported or served writes the reports of its own test, with a pooled grid and with context."""

import json
import re
from unittest import mock

import pytest

from modules.inference.prediction import ABSENT_CONTEXT
from modules.pages.local_page import LocalPage
from modules.run.serving import report_writer
from modules.runtime.errors import InputError
from scripts import export
from tests.run.test_study_context import predicted, reports_of_the_test, toy


def exported(source, flag, target):
    """``target``, written by scripts/export.py."""
    with mock.patch("sys.argv", ["export.py", str(source), flag, str(target)]):
        export.main()
    return target


def served(model, images):
    """The report that scripts/serve.py's process writes for ``images`` of one study, and what the page is told."""
    write, facts = report_writer(str(model), {"device": "cpu"}, None)
    request = {"names": [path.name for path in images], "together": True, "beam_size": facts["beam_size"]}
    html = write(request, [path.read_bytes() for path in images])["html"]
    words = re.findall(r'<span class="word[^>]*>(.*?)</span>', html, re.DOTALL)
    return " ".join(re.sub("<.*?>", "", word).strip() for word in words), facts


POOLED = ("--image_size", 96, "--feature_grid", 2, "--lr_ed", 1e-2)


@pytest.mark.thorough
def test_a_pooled_grid_is_exported_and_served(demo, train, tmp_path):
    folder = train(*POOLED)
    best, data = folder / "model_best.pth", ("--ann_path", demo / "annotation.json", "--image_dir", demo / "images")
    reports = predicted(best, *data)
    assert list(reports.values()) == reports_of_the_test(folder) and any(reports.values())
    shared = exported(best, "--out", tmp_path / "shared")
    assert predicted(shared, *data) == reports
    again = exported(shared, "--out", tmp_path / "again.pth")
    assert predicted(again, *data) == reports
    study = json.loads((demo / "annotation.json").read_text())["test"][0]
    for model in (best, shared):
        report, facts = served(model, [demo / "images" / path for path in study["image_path"]])
        assert report == reports[study["id"]] and not facts["note"]


@pytest.mark.slow
def test_a_pooled_grid_becomes_programs(train, tmp_path, capsys):
    exported(train(*POOLED) / "model_best.pth", "--program", tmp_path / "program")
    assert "largest difference" in capsys.readouterr().out
    assert json.loads((tmp_path / "program" / "program.json").read_text())["image_size"] == 96


@pytest.mark.thorough
def test_context_is_exported_and_said_to_be_absent_where_images_are_served_alone(train, tmp_path, capsys):
    flags = toy(tmp_path / "data", "indication", 24)
    folder = train(*flags, *POOLED, "--context", "indication,prior_image", "--threshold", 1)
    best, images = folder / "model_best.pth", tmp_path / "data" / "images"
    reports = predicted(best, "--ann_path", flags[1], "--image_dir", images)
    assert list(reports.values()) == reports_of_the_test(folder)
    shared = exported(best, "--out", tmp_path / "shared")
    assert predicted(shared, "--ann_path", flags[1], "--image_dir", images) == reports
    with pytest.raises(InputError, match="reads --context, for which programs have no input; use --out"):
        exported(best, "--program", tmp_path / "program")
    image = images / "23.png"
    alone = predicted(best, image)
    capsys.readouterr()
    report, facts = served(shared, [image])
    assert [report] == list(alone.values()) and facts["note"] == ABSENT_CONTEXT
    assert ABSENT_CONTEXT in capsys.readouterr().err
    page = LocalPage(None, token="t", port=1, checkpoint="c", **facts)
    assert ABSENT_CONTEXT in page._page
