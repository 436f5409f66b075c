"""Images with several captions: reading, cleaning, samples, references, and mining over captions."""

import json

import pytest

from modules.data.annotations import Study, read_annotation
from modules.data.captions import captions_by_sample, first_of_each_image, references, split_captions
from modules.data.datasets import ReportDataset, collate
from modules.data.images import ImageFolder
from modules.data.tokenizers import Tokenizer, clean_report
from modules.data.transforms import eval_transform
from modules.mining.index import HardNegativeIndex
from modules.runtime.errors import InputError
from tests.coco_support import coco_records, make_coco
from tests.transform_support import LOOK


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("coco"))


def write(tmp_path, **fields):
    data = coco_records()
    data["train"][0] |= fields
    (tmp_path / "annotation.json").write_text(json.dumps(data))
    return tmp_path / "annotation.json"


def test_captions_stand_in_for_the_report(coco):
    study = read_annotation(coco / "annotation.json").splits["train"][0]
    assert study.captions == references(study) == tuple(coco_records()["train"][0]["captions"])
    assert study.report == study.captions[0]


def test_a_report_beside_captions_stays(tmp_path):
    study = read_annotation(write(tmp_path, report="The report.")).splits["train"][0]
    assert study.report == "The report." and len(study.captions) == 4


def test_a_record_without_captions_has_its_report_as_the_only_one(tmp_path):
    study = read_annotation(write(tmp_path, report="The report.", captions=None)).splits["train"][0]
    assert references(study) == ("The report.",)


@pytest.mark.parametrize(
    ("captions", "part"),
    [
        ([], "field 'captions' is empty, expected a list of texts"),
        ("A dog.", "field 'captions' is a string, expected a list of texts"),
        (7, "field 'captions' holds a number, expected strings"),
        (["A dog.", " "], "caption 1 of field 'captions' is empty, expected a text"),
        (["A dog.", None], "field 'captions' holds null, expected strings"),
        (None, "field 'report' is missing, expected a text"),
    ],
)
def test_wrong_captions_are_named_in_one_line(tmp_path, captions, part):
    with pytest.raises(InputError) as error:
        read_annotation(write(tmp_path, captions=captions))
    assert "split 'train', record 0, id '101'" in str(error.value) and part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A man's T-shirt,  is red!", "a mans t shirt is red"),
        ("Salt/pepper — “fresh” (2.5 kg).", "salt pepper fresh 25 kg"),
        ("Café\nau_lait & crème", "café au lait crème"),
        ("?!", ""),
    ],
)
def test_captions_are_lower_cased_without_punctuation(caption, cleaned):
    assert clean_report(caption, "coco") == cleaned


def test_every_caption_of_train_is_a_record(coco):
    whole = read_annotation(coco / "annotation.json")
    split = split_captions(whole)
    first = split.splits["train"][:4]
    assert [study.id for study in first] == ["101#0", "101#1", "101#2", "101#3"]
    assert {study.study_id for study in first} == {"101"} and len({study.image_paths for study in first}) == 1
    assert [study.report for study in first] == coco_records()["train"][0]["captions"]
    assert len(split.splits["train"]) == 40 and split.splits["test"] == whole.splits["test"]
    assert split.train_sha256 != whole.train_sha256
    assert [study.id for study in first_of_each_image(split.splits["train"])] == [f"{i}#0" for i in range(101, 111)]


def test_samples_of_an_image_share_it_and_their_key(coco):
    annotation = split_captions(read_annotation(coco / "annotation.json"))
    train = annotation.splits["train"]
    tokenizer = Tokenizer.from_reports([study.report for study in train], 2, "coco")
    transform = eval_transform(32, *LOOK)
    dataset = ReportDataset(train, tokenizer, ImageFolder(coco / "images"), transform, max_seq_length=20)
    batch = collate([dataset[index] for index in (0, 3, 4)])
    assert batch.ids == ["101#0", "101#3", "102#0"] and batch.report_key[0] == batch.report_key[1]
    assert batch.report_key[0] != batch.report_key[2]
    assert (batch.positive.images[0] == batch.positive.images[1]).all()
    assert tokenizer.decode(batch.positive.tokens[1, 1:].tolist()) == "a red coloured square grey wall"


def test_references_of_a_split_go_by_sample(coco):
    annotation = read_annotation(coco / "annotation.json")
    tokenizer = Tokenizer.from_reports(["a"], 1, "coco")
    for views, key in (("paired", "114"), ("separate", "114#0")):
        dataset = ReportDataset(
            annotation.splits["test"],
            tokenizer,
            ImageFolder(coco / "images"),
            eval_transform(32, *LOOK),
            max_seq_length=20,
            views=views,
        )
        found = captions_by_sample([dataset])
        assert len(found) == 4 and len(found[key]) == 5 and found[key][4] == "nothing else to see"


def test_mining_over_captions_leaves_out_the_same_image(coco, tmp_path):
    from scripts.mine_hard_negatives import build_parser, mine

    arguments = build_parser().parse_args(
        [
            "--ann_path",
            str(coco / "annotation.json"),
            "--out",
            str(tmp_path / "index.safetensors"),
            "--text_encoder",
            "tfidf",
            "--dataset_name",
            "coco",
            "--top_k",
            "3",
            "--device",
            "cpu",
        ]
    )
    whole = read_annotation(coco / "annotation.json")
    annotation = split_captions(whole)
    mine(arguments, annotation).save(arguments.out)
    index, train = HardNegativeIndex.load(arguments.out), annotation.splits["train"]
    assert index.neighbours.shape == (40, 3) and (index.neighbours >= 0).all()
    for row, neighbours in enumerate(index.neighbours):
        for other in neighbours:
            assert train[other].study_id != train[row].study_id
            assert clean_report(train[other].report, "coco") != clean_report(train[row].report, "coco")
    nearest = train[index.neighbours[0, 0]].report  # the same wording with one other word
    assert nearest.startswith("A ") and nearest.endswith("on a grey wall.")
    index.check(annotation)
    with pytest.raises(InputError, match="mined from other training reports .*--dataset_name coco"):
        index.check(whole)


def test_records_are_small():
    """Half a million captions are held at once: a record must not carry a dictionary."""
    with pytest.raises(AttributeError):
        Study("a", "b", ("c",), "train", "a", ("",)).__dict__  # noqa: B018
