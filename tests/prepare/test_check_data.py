"""scripts/check_data.py: over thirty kinds of damage, each found and named, all of them at once, and nothing else."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from modules.data.images import ImageFolder
from modules.flags import settle_flags
from modules.prepare.image_survey import survey_images
from modules.runtime.errors import InputError
from scripts import check_data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(demo, demo_index, demo_labels, tmp_path):
    """A copy of the tiny data set with index, labels and prototypes, to be damaged."""
    folder = tmp_path / "data"
    shutil.copytree(demo, folder)
    torch.save(torch.zeros(14 * 2, 8 + 8), folder / "prototypes.pt")
    return folder


def found(data, *flags, hashed=False, negatives=True):
    """What check_data finds in ``data``, and the kinds of it."""
    sizes = "--num_cluster 14 --num_protype 2 --d_img_ebd 8 --d_txt_ebd 8 --topk 4 --max_seq_length 24 --image_size 32"
    argv = ["--ann_path", data / "annotation.json", "--image_dir", data / "images", "--num_workers", "0"]
    argv += ["--model_name", "xpronet", "--label_path", data / "report_labels.csv", *sizes.split()]
    argv += ["--init_protypes_path", data / "prototypes.pt"]
    argv += ["--negative_index", data / "negatives.safetensors"] if negatives else []
    given = vars(check_data.build_arguments().parse_args([str(part) for part in (*argv, *flags)]))
    for name in check_data.OWN:
        given.pop(name)
    findings = check_data.check(check_data.resolve_config(settle_flags(given)[0]), hashed)
    return findings, {problem.kind for problem in findings.problems}


def annotation(change):
    """Damage to annotation.json: ``change`` gets its content and returns what to write, if it makes something new."""

    def damage(data):
        content = json.loads((data / "annotation.json").read_text())
        new = change(content)
        text = new if isinstance(new, (str, bytes)) else json.dumps(new or content)
        (data / "annotation.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return damage


def record(**fields):
    """Damage to the third training record; a field that is ... is removed."""

    def change(content):
        for name, value in fields.items():
            content["train"][2][name] = value
            if value is ...:
                del content["train"][2][name]

    return annotation(change)


def image(change):
    """Damage to the first image of the first validation study; ``change`` gets its path."""

    def damage(data):
        [first, *_] = json.loads((data / "annotation.json").read_text())["val"]
        change(data / "images" / first["image_path"][0])

    return damage


def replaced(make):
    def change(path):
        path.unlink()
        make(path)

    return image(change)


def labels(change):
    def damage(data):
        lines = (data / "report_labels.csv").read_text().splitlines()
        (data / "report_labels.csv").write_text("\n".join(change(lines)) + "\n")

    return damage


def every_report(text):
    def change(content):
        for records in content.values():
            for entry in records:
                entry["report"] = text

    return annotation(change)


def same_view_twice(spell):
    def change(content):
        content["train"][2]["image_path"] = [(path := content["train"][2]["image_path"][0]), spell(path)]

    return annotation(change)


def one_study(content):
    del content["test"][1:]


def one_study_of_two_records(content):
    first = content["test"][0] | {"study_id": "s1"}
    second = {**first, "id": "another", "image_path": content["test"][1]["image_path"]}
    content["test"] = [first, second]


def same_path(content):
    content["test"][0]["image_path"] = content["train"][0]["image_path"]


def same_study(field):
    def change(content):
        content["test"][0][field] = content["train"][0][field] = "p10"

    return annotation(change)


def two_spellings(content):
    content["test"][0]["subject_id"], content["train"][0]["subject_id"] = "7 ", "7.0"


def priors_in_a_circle(content):
    first, second, *_ = content["train"]
    first["prior"], second["prior"] = second["id"], first["id"]


def study_named_by_an_id(content):
    """As prepare_table.py writes it, whose first record of a study has the study's name and no study_id."""
    content["test"][0]["study_id"] = content["train"][0]["id"]


def nearly_white():
    image = Image.new("L", (64, 64), 255)
    image.paste(90, (0, 0, 64, 5))
    return image


def truncate(name, keep):
    return lambda data: (data / name).write_bytes((data / name).read_bytes()[:keep])


DAMAGE = {
    "no annotation": (lambda data: (data / "annotation.json").unlink(), "annotation cannot be read"),
    "cut annotation": (truncate("annotation.json", 1000), "annotation cannot be read"),
    "annotation not UTF-8": (annotation(lambda content: b'{"train": "\xff"}'), "annotation cannot be read"),
    "annotation is a list": (annotation(lambda content: "[]"), "annotation cannot be read"),
    "a split twice": (annotation(lambda content: '{"val": [], "val": []}'), "annotation cannot be read"),
    "no test split": (annotation(lambda content: content.pop("test") and content), "split is not a list"),
    "empty validation": (annotation(lambda content: content["val"].clear()), "split is empty"),
    "no record": (annotation(lambda content: content["train"].append(7)), "record is not an object"),
    "no id": (record(id=...), "id is missing"),
    "id twice": (annotation(lambda content: content["train"].append(content["train"][0])), "id appears twice"),
    "id in two splits": (
        annotation(lambda content: content["val"].append(content["train"][0] | {"split": "val"})),
        "id is in two splits",
    ),
    "nan report": (record(report=" NaN "), "report is missing"),
    "None report": (record(report="None"), "report is missing"),
    "dots": (record(report="..."), "report is empty after cleaning"),
    "punctuation": (record(report="--- !! ??"), "report is empty after cleaning"),
    "NUL in a report": (record(report="Clear.\0"), "report has a NUL"),
    "all reports equal": (every_report("The lungs are clear."), "all reports are equal"),
    "a view twice": (same_view_twice(str), "image is in a study twice"),
    "a view twice, in two spellings": (same_view_twice(lambda path: f"./{path}"), "image is in a study twice"),
    "one test study": (annotation(one_study), "split of one study"),
    "one test study of two records": (annotation(one_study_of_two_records), "split of one study"),
    "null report": (record(report=None), "report is null"),
    "blank report": (record(report=" \n"), "report is empty"),
    "report a list": (record(report=["x"]), "report is a list"),
    "lone surrogate": (record(report="a\ud800"), "report has a lone surrogate"),
    "other split": (record(split="test"), "split contradicts its list"),
    "no images": (record(image_path=[]), "image_path is empty"),
    "image number": (record(image_path=[3]), "image_path holds a number"),
    "path that leaves": (record(image_path=["0.png", "../../etc/passwd"]), "image path leaves image_dir"),
    "absolute path": (record(image_path=["0.png", "/dev/zero"]), "image path leaves image_dir"),
    "half a negative": (record(neg_report="Clear."), "half a negative"),
    "same image path": (annotation(same_path), "image is in two splits"),
    "same study": (same_study("study_id"), "study_id is in two splits"),
    "study named by an id": (annotation(study_named_by_an_id), "study_id is in two splits"),
    "same patient": (same_study("subject_id"), "subject_id is in two splits"),
    "same patient, in two spellings": (annotation(two_spellings), "subject_id is in two splits"),
    "prior that is not there": (record(prior="nowhere"), "prior cannot be used"),
    "priors in a circle": (annotation(priors_in_a_circle), "prior cannot be used"),
    "no image folder": (lambda data: (data / "images").rename(data / "gone"), "image_dir cannot be read"),
    "missing image": (image(os.unlink), "image is missing"),
    "empty image": (image(lambda path: path.write_bytes(b"")), "image is empty"),
    "truncated image": (image(lambda path: path.write_bytes(path.read_bytes()[:200])), "image cannot be decoded"),
    "text for an image": (image(lambda path: path.write_text("no image")), "image cannot be decoded"),
    "black image": (replaced(lambda path: Image.new("L", (64, 64)).save(path)), "image is blank"),
    "nearly white image": (replaced(lambda path: nearly_white().save(path)), "image is nearly blank"),
    "strip": (replaced(lambda path: Image.new("L", (600, 2)).save(path)), "image is a thin strip"),
    "pipe": (replaced(os.mkfifo), "image is not a regular file"),
    "folder": (replaced(os.mkdir), "image is not a regular file"),
    "link out": (replaced(lambda path: path.symlink_to("/etc/passwd")), "image path leaves image_dir"),
    "link to itself": (replaced(lambda path: path.symlink_to(path.name)), "image cannot be opened"),
    "huge file": (image(lambda path: os.truncate(path, 2**31)), "image is too large"),
    "no index": (lambda data: (data / "negatives.safetensors").unlink(), "index cannot be used"),
    "cut index": (truncate("negatives.safetensors", 500), "index cannot be used"),
    "index of other reports": (record(report="Another text."), "index is of other reports"),
    "no labels": (lambda data: (data / "report_labels.csv").unlink(), "labels cannot be read"),
    "label 2": (labels(lambda lines: [lines[0], lines[1].rsplit(",", 1)[0] + ",2", *lines[2:]]), "cell is not a label"),
    "row too short": (labels(lambda lines: [*lines[:-1], lines[-1] + ",1"]), "row of another length"),
    "label row twice": (labels(lambda lines: [*lines, lines[1]]), "id appears twice"),
    "study without labels": (
        labels(lambda lines: [line for line in lines if ",train," not in line or "1" not in line]),
        "study has no labels",
    ),
    "no prototypes": (lambda data: (data / "prototypes.pt").unlink(), "prototypes cannot be used"),
    "other prototypes": (
        lambda data: torch.save(torch.zeros(3, 16), data / "prototypes.pt"),
        "prototypes cannot be used",
    ),
}


def test_sound_data_has_no_problem(data):
    findings, kinds = found(data, hashed=True)
    assert not kinds
    statistics = findings.statistics
    assert statistics["synthetic"] is True and statistics["images"]["readable"] == 40
    assert statistics["views"]["train"]["images_per_study"] == {"2": statistics["views"]["train"]["studies"]}
    assert statistics["labels"]["rows"] == 20 and statistics["index"]["neighbours"] == 3


def test_thirty_kinds_of_damage_are_tried():
    assert len(DAMAGE) >= 30


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.timeout(60)
def test_damage_is_named(data, name):
    damage, kind = DAMAGE[name]
    damage(data)
    # Other reports are no longer the index's, which is another test's matter.
    findings, kinds = found(
        data, negatives="report" not in name and name not in ("dots", "punctuation") or "index" in name
    )
    assert kinds == {kind}
    for problem in findings.problems:
        assert problem.file and problem.message.count("\n") == 0


def test_every_problem_is_listed_with_its_place(data):
    for name in ("null report", "no record", "truncated image", "label row twice", "missing image"):
        if name == "missing image":
            first = json.loads((data / "annotation.json").read_text())["test"][0]["image_path"][1]
            (data / "images" / first).unlink()
        else:
            DAMAGE[name][0](data)
    findings, kinds = found(data)
    assert kinds == {
        "report is null",
        "record is not an object",
        "image cannot be decoded",
        "id appears twice",
        "image is missing",
    }
    by_kind = {problem.kind: problem for problem in findings.problems}
    assert (by_kind["report is null"].split, by_kind["report is null"].field) == ("train", "report")
    missing = by_kind["image is missing"]
    assert (missing.split, missing.field) == ("test", "image_path") and missing.id and missing.file.endswith(".png")


def test_equal_images_in_two_splits_are_found_where_asked_for(data):
    splits = json.loads((data / "annotation.json").read_text())
    source, target = splits["train"][0]["image_path"][0], splits["test"][0]["image_path"][0]
    shutil.copy(data / "images" / source, data / "images" / target)
    assert not found(data)[1]
    findings, kinds = found(data, hashed=True)
    assert kinds == {"equal images in two splits"} and findings.problems[0].split == "train test"


def test_negatives_of_held_out_studies_are_a_leak(data):
    held_out = json.loads((data / "annotation.json").read_text())["test"][0]
    shutil.copy(data / "images" / held_out["image_path"][0], data / "images" / "copy.png")
    record(neg_report=held_out["report"], neg_image_path=[held_out["image_path"][0], "copy.png"])(data)
    findings, kinds = found(data, hashed=True, negatives=False)
    assert kinds == {"negative is of another split", "equal images in two splits"}
    assert {problem.field for problem in findings.problems} == {"neg_image_path", "neg_report", "the content of image"}


def test_negatives_of_the_annotation_are_read_too(data):
    record(neg_report="Effusion.", neg_image_path=["nowhere.png"])(data)
    findings, kinds = found(data, negatives=False)
    assert kinds == {"image is missing"} and findings.problems[0].field == "neg_image_path"


def test_statistics_count_what_they_say(data):
    content = json.loads((data / "annotation.json").read_text())
    words = " ".join(["word"] * 30)
    content["train"] = [
        {"id": f"t{i}", "report": text, "image_path": content["val"][0]["image_path"][:views]}
        for i, (text, views) in enumerate([(words, 2), ("word rare.", 1), ("Word, rare.", 1)])
    ]
    content["val"], content["test"] = content["val"][:1], content["test"][:1]
    content["val"][0]["report"] = "word rare"
    (data / "annotation.json").write_text(json.dumps(content))
    found_here = found(data, "--threshold", "3", negatives=False)[0].statistics
    # 30 words and ".", of which begin and 23 more fit into 24; "word", "rare", "." twice.
    train = found_here["reports"]["train"]
    assert (train["tokens"], train["tokens_cut"], train["longer_than_max_seq_length"]) == (37, 8, 1)
    assert (train["tokens_unknown"], train["different_reports"], train["sharing_their_text"]) == (2, 2, 2)
    assert train["length_quantiles"][-1] == 33
    assert found_here["vocabulary"] == {"vocabulary": 3, "different_words": 3, "rarer_than_threshold": 1}
    assert found_here["text_shared_with_train"]["val"] == 1
    assert found_here["views"]["train"]["studies_with_fewer_views"] == 2


def test_processes_see_what_one_sees_and_a_killed_one_is_named(data, tmp_path):
    DAMAGE["truncated image"][0](data)
    folder = ImageFolder(data / "images")
    paths = sorted(str(path.relative_to(data / "images")) for path in (data / "images").rglob("*.png"))
    alone = list(survey_images(folder, paths, workers=0, hashed=True))
    assert list(survey_images(folder, paths, workers=2, hashed=True)) == alone
    assert sum(bool(facts.problem) for facts in alone) == 1

    class Deadly(ImageFolder):
        def __call__(self, path):
            os.kill(os.getpid(), 9)

    Deadly.__qualname__ = "Deadly"
    globals()["Deadly"] = Deadly
    with pytest.raises(InputError, match=f"was killed, at '{paths[0]}'"):
        list(survey_images(Deadly(data / "images"), paths, workers=1, hashed=False))


def test_program(data, tmp_path):
    DAMAGE["truncated image"][0](data)
    DAMAGE["null report"][0](data)
    command = [
        sys.executable,
        ROOT / "scripts" / "check_data.py",
        "--ann_path",
        data / "annotation.json",
        "--image_dir",
        data / "images",
        "--json",
        tmp_path / "out" / "found.json",
        "--num_workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "report is null: 1" in done.stdout and "image cannot be decoded: 1" in done.stdout
    assert done.stdout.endswith("2 problem(s) of 2 kind(s)\n") and "SYNTHETIC" in done.stdout
    written = json.loads((tmp_path / "out" / "found.json").read_text())
    assert written["kinds"] == {"report is null": 1, "image cannot be decoded": 1}
    assert {"kind", "message", "file", "split", "id", "field"} == set(written["problems"][0])
    assert written["provenance"]["argv"] and written["config"]["image_dir"]
    assert stat.S_IMODE((tmp_path / "out" / "found.json").stat().st_mode) == 0o600
