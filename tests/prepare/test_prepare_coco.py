"""scripts/prepare_coco.py on files in the form of the official ones, and on files that are not."""

import json
import subprocess
import sys

import pytest

from modules.data.annotations import read_annotation
from modules.runtime.errors import InputError
from scripts.prepare_coco import main


def caption_file(year, kind, images):
    """``images``: id -> captions. Ids of annotations fall, so that their order is not the file's."""
    annotations = [
        {"image_id": image, "id": 1000 - image * 10 - number, "caption": text}
        for image, texts in images.items()
        for number, text in enumerate(reversed(texts))
    ]
    name = "COCO_{}{}_{:012d}.jpg" if year == 2014 else "{2:012d}.jpg"
    return {
        "info": {"year": year},
        "licenses": [{"id": 1, "name": "a"}],
        "annotations": annotations,
        "images": [
            {"license": 1, "file_name": name.format(kind, year, image), "id": image, "coco_url": "x", "height": 4}
            for image in images
        ],
    }


def karpathy(**splits):
    return {
        "dataset": "coco",
        "images": [
            {
                "filepath": "val2014",
                "sentids": [1],
                "filename": "x.jpg",
                "imgid": 0,
                "split": split,
                "cocoid": image,
                "sentences": [{"tokens": ["a"], "raw": "a", "imgid": 0, "sentid": 1}],
            }
            for split, images in splits.items()
            for image in images
        ],
    }


TRAIN = {9: ["A dog.", "Two dogs ", "dogs"], 25: ["Giraffes", "a giraffe\nwalks"]}
VAL = {42: ["Shoes", "a dog with shoes"], 73: ["A motorbike", " "], 74: ["Bed", "cats"]}
SPLIT = karpathy(test=[42], restval=[73], train=[25, 9], val=[74])


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """``prepare(captions={name: content}, split=content, out=...)`` writes the files, runs, returns the annotation."""

    def run(captions=None, split=SPLIT, files=None):
        captions = captions or {
            "captions_train2014.json": caption_file(2014, "train", TRAIN),
            "captions_val2014.json": caption_file(2014, "val", VAL),
        }
        for name, content in [*captions.items(), ("dataset_coco.json", split)]:
            if content is not None:
                text = content if isinstance(content, bytes) else json.dumps(content).encode()
                (tmp_path / name).write_bytes(text)
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "prepare_coco.py",
                "--captions",
                *(str(tmp_path / name) for name in captions),
                "--karpathy",
                str(tmp_path / "dataset_coco.json"),
                "--out",
                str(tmp_path / "coco"),
            ],
        )
        main()
        return json.loads((tmp_path / "coco" / "annotation.json").read_text())

    return run


def test_karpathys_split_with_all_captions(prepare, tmp_path, capsys):
    annotation = prepare()
    assert [record["id"] for record in annotation["train"]] == [73, 25, 9]  # restval goes into train
    assert [record["id"] for record in annotation["val"] + annotation["test"]] == [74, 42]
    assert annotation["train"][2] == {
        "id": 9,
        "coco_id": 9,
        "split": "train",
        "image_path": ["train2014/COCO_train2014_000000000009.jpg"],
        "captions": ["A dog.", "Two dogs", "dogs"],
    }
    assert annotation["train"][0]["captions"] == ["A motorbike"]  # the empty one is left out
    assert annotation["test"][0]["image_path"] == ["val2014/COCO_val2014_000000000042.jpg"]
    said = capsys.readouterr().out
    assert "train           3    113,287         6" in said and "not the published numbers" in said
    study = read_annotation(tmp_path / "coco" / "annotation.json").splits["test"][0]
    assert study.captions == ("Shoes", "a dog with shoes")


def test_an_annotation_of_another_split_stays(prepare, tmp_path, capsys):
    path = tmp_path / "coco" / "annotation.json"
    first = prepare()
    assert prepare() == first and f"unchanged: {path}" in capsys.readouterr().out
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"annotation\.json: already exists with other content, .*name another --out"):
        prepare(split=karpathy(test=[73], train=[25, 9], val=[74]))
    assert path.read_bytes() == before


def test_files_of_2017_share_out_the_same_images_otherwise(prepare):
    train = {image: texts for image, texts in (TRAIN | VAL).items() if image != 9}
    annotation = prepare(
        {
            "captions_train2017.json": caption_file(2017, "train", train),
            "captions_val2017.json": caption_file(2017, "val", {9: TRAIN[9]}),
        }
    )
    assert annotation["train"][2]["image_path"] == ["val2017/000000000009.jpg"]
    assert annotation["test"][0]["image_path"] == ["train2017/000000000042.jpg"]


GOOD = caption_file(2014, "train", TRAIN)


@pytest.mark.parametrize(
    ("captions", "part"),
    [
        ({"captions_train2014.json": None}, "captions_train2014.json: cannot be read: No such file"),
        ({"captions_train2014.json": b"{"}, "not valid JSON"),
        ({"captions_train2014.json": b"\xff\xfe"}, "not valid JSON"),
        ({"captions_train2014.json": []}, "it needs the lists 'images' and 'annotations'"),
        ({"captions.json": GOOD}, "keep its published name"),
        ({"captions_train2014.json": GOOD | {"annotations": [{"image_id": 9, "bbox": []}]}}, "annotation 0 lacks"),
        ({"captions_train2014.json": GOOD | {"images": [{"id": 9}]}}, "image 0 lacks id or file_name"),
        ({"captions_train2014.json": GOOD}, "no caption of image 73, which --karpathy has in train"),
        (
            {"captions_train2014.json": GOOD, "captions_train2017.json": caption_file(2017, "train", TRAIN)},
            "is in another file too",
        ),
    ],
)
def test_wrong_caption_files_get_one_line(prepare, captions, part):
    with pytest.raises(InputError) as error:
        prepare(captions)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("split", "part"),
    [
        (None, "dataset_coco.json: cannot be read"),
        (b"[", "not valid JSON"),
        ({"image": []}, "it needs a list 'images'"),
        ([], "it needs a list 'images'"),
        (karpathy(train=[9], dev=[25]), "image 1 needs a cocoid, and a split of"),
        (karpathy(train=[9], val=[9]), "image 9 is listed twice"),
        ({"images": [{"split": "train", "filename": "1.jpg"}]}, "image 0 needs a cocoid"),
    ],
)
def test_wrong_splits_get_one_line(prepare, split, part):
    with pytest.raises(InputError) as error:
        prepare(split=split)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_the_command_line_ends_with_2_on_a_mistake(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "scripts/prepare_coco.py",
            "--captions",
            "none.json",
            "--karpathy",
            str(tmp_path / "none.json"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "none.json: cannot be read" in done.stderr
