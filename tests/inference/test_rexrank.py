"""predict.py --rexrank: studies in ReXrank's form come back whole and in order, with the reports predict.py writes."""

import json

import pytest

from modules.inference.rexrank import read_rexrank, rexrank_files
from modules.runtime.errors import InputError
from scripts import predict
from tests.inference.test_hub_format import run, trained, written_by  # noqa: F401 (a fixture)


def study(*images, **more):
    return {"image_path": list(images), "key_image_path": images[0], "section_findings": "clear", "context": "x"} | more


def write(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.thorough
def test_all_fields_stay_in_order_and_reports_are_those_of_predict(trained, demo, tmp_path, monkeypatch):  # noqa: F811
    folders = sorted(folder.name for folder in (demo / "images").iterdir())[:2]
    content = {
        "z9": study(
            f"{folders[1]}/0.png", f"{folders[1]}/1.png", age=float("nan"), frontal_lateral=["Frontal", "Lateral"]
        ),
        "a1": study(f"/{folders[0]}/0.png", key_image_path=f"/{folders[0]}/0.png"),
    }
    source, target = write(tmp_path / "in.json", content), tmp_path / "out.json"
    best = trained / "model_best.pth"
    arguments = ("--load", best, "--rexrank", source, target, demo / "images", "--quiet", "--device", "cpu")
    run(predict, monkeypatch, *arguments)
    found = json.loads(target.read_text())
    assert list(found) == ["z9", "a1"] and list(found["z9"]) == [*content["z9"], "model_prediction"]
    assert found["a1"] == content["a1"] | {"model_prediction": found["a1"]["model_prediction"]}
    run(predict, monkeypatch, "--load", best, "--group", "all", demo / "images" / folders[1], "--quiet", "--json",
        tmp_path / "own.json", "--device", "cpu")  # fmt: skip
    [own] = json.loads((tmp_path / "own.json").read_text())["reports"]
    assert found["z9"]["model_prediction"] == own["report"] != ""
    # Once more over its own file, and never over another.
    run(predict, monkeypatch, *arguments)
    assert json.loads(target.read_text()) == found
    with pytest.raises(InputError, match="is also the first file of --rexrank"):
        run(predict, monkeypatch, "--load", best, "--rexrank", source, source, demo / "images")
    with pytest.raises(InputError, match="names the images and their studies itself"):
        run(predict, monkeypatch, *arguments, demo / "images")
    with pytest.raises(InputError, match="no images: name files"):
        run(predict, monkeypatch, "--load", best)


def test_a_study_that_cannot_be_read_has_no_prediction(trained, demo, tmp_path, monkeypatch, capsys):  # noqa: F811
    name = next((demo / "images").iterdir()).name
    source = write(tmp_path / "in.json", {"there": study(f"{name}/0.png"), "gone": study("gone.png")})
    monkeypatch.setattr("sys.argv", ["predict.py", "--load", str(trained / "model_best.pth"), "--rexrank", str(source),
                                     str(tmp_path / "out.json"), str(demo / "images"), "--quiet"])  # fmt: skip
    assert predict.main() == 2
    found = json.loads((tmp_path / "out.json").read_text())
    assert "model_prediction" in found["there"] and "model_prediction" not in found["gone"]
    assert "no report for gone" in capsys.readouterr().err


def names(tmp_path, **entry):
    found = {"s": {"image_path": ["a.png", "b.png", "c.png"]} | entry}
    [files] = rexrank_files("in.json", read_rexrank(str(write(tmp_path / "in.json", found))), str(tmp_path))
    return "".join(path.stem for path in files.paths)


def test_the_key_image_comes_first_then_the_other_projection(tmp_path):
    sides = ["Lateral", "Frontal", "Frontal"]
    assert names(tmp_path, key_image_path="b.png", frontal_lateral=sides) == "bac"
    assert names(tmp_path, key_image_path="c.png", frontal_lateral=sides) == "cab"
    assert names(tmp_path, frontal_lateral=sides) == "bac"
    assert names(tmp_path) == "abc"
    assert names(tmp_path, key_image_path="c.png", frontal_lateral=["Frontal"]) == "cab"  # of another length


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[]", "a JSON object of studies"),
        ("{}", "at least one"),
        ("{", "not JSON"),
        ('{"a": 1}', "study 'a' is not an object"),
        ('{"a": {}}', "study 'a': image_path must be a list"),
        ('{"a": {"image_path": [3]}}', "image_path must be a list"),
        ('{"a": {"image_path": ["x"], "key_image_path": 3}}', "key_image_path must be a path"),
        ('{"a": {"image_path": ["x"]}, "a": {"image_path": ["y"]}}', "'a' is there twice"),
        ('{"a": {"image_path": ["../x"]}}', "is not in the folder of images"),
    ],
)
def test_mistakes_are_named(tmp_path, text, error):
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(InputError, match=error):
        rexrank_files("in.json", read_rexrank(str(tmp_path / "in.json")), str(tmp_path))


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_rexrank(str(tmp_path / "none.json"))
    with pytest.raises(InputError, match="is not there"):
        rexrank_files("in.json", {"a": study("x")}, str(tmp_path / "none"))
