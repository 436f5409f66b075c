"""Data sets by name: the known ones unchanged, any other by the dataset.json beside its annotation, up to the card."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from modules.config import Config
from modules.data.annotations import frontal_first, read_annotation
from modules.data.dataset_specs import CLEANER_NAMES, DATASETS, read_description, write_description
from modules.data.tokenizers import CLEANERS
from modules.evaluation.metric_table import CLINICAL_MONITORED
from modules.flags import parse_flags, resolve_config
from modules.inference.model_card import model_card
from modules.run.testing import run_testing
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from scripts.export import facts_of


def described(folder, **facts):
    (folder / "dataset.json").write_text(json.dumps(facts), encoding="utf-8")
    return {"ann_path": str(folder / "annotation.json")}


def test_the_known_ones_are_as_published():
    for name, views in (("iu_xray", 2), ("mimic_cxr", 1), ("coco", 1)):
        spec = Config(dataset_name=name).dataset
        assert spec == DATASETS[name] and spec.max_views == views and spec.cleaner == name
    assert resolve_config({}).dataset_name == "iu_xray"
    assert tuple(CLEANERS) == CLEANER_NAMES


def test_a_description_gives_defaults_that_flags_override(tmp_path):
    given = described(tmp_path, name="ward7", language="fr", views=3, captions=False, licence="CC0")
    config = resolve_config(given)
    assert (config.dataset_name, config.language, config.data_licence) == ("ward7", "fr", "CC0")
    assert (config.dataset.max_views, config.dataset.cleaner, config.dataset.captions) == (3, "any", False)
    assert not config.labels_by_rules  # French
    own = resolve_config(given | {"max_views": 1, "cleaner": "iu_xray", "language": "en"})
    assert (own.dataset.max_views, own.dataset.cleaner, own.labels_by_rules) == (1, "iu_xray", True)
    # A known name that is given is that data set, whatever lies beside the annotation.
    assert resolve_config(given | {"dataset_name": "mimic_cxr"}).dataset == DATASETS["mimic_cxr"]
    # A prepared data set of a known name keeps what is known of it.
    known = resolve_config(described(tmp_path, name="mimic_cxr", views=2) | {"backbone": "r2gen"})
    assert known.dataset == replace(DATASETS["mimic_cxr"], max_views=2) and known.max_seq_length == 100


def test_captions_have_no_clinical_scores():
    """A run on them trained to its end and failed in the labels of its test, which are those of one report."""
    assert Config().labels_by_rules and not Config(captions=True).labels_by_rules
    for flags in ({"monitor_metric": CLINICAL_MONITORED[0].name}, {"scst_reward": "clinical_f1"}):
        with pytest.raises(InputError, match="clinical"):
            Config(captions=True, **flags)
    with pytest.raises(InputError, match="--chexbert_path: .* iu_xray with --captions true has none"):
        Config(captions=True, chexbert_path="chexbert.pth")


def test_a_model_keeps_its_reading_and_the_data_their_name(tmp_path):
    given = described(tmp_path, name="ward7", cleaner="any", views=3, clinical=False, licence="CC0")
    saved = {"dataset_name": "iu_xray", "max_views": 0, "cleaner": ""}
    tested = resolve_config(given, saved)
    assert (tested.dataset_name, tested.data_licence, tested.clinical) == ("ward7", "CC0", False)
    assert (tested.dataset.max_views, tested.dataset.cleaner) == (2, "iu_xray")
    # A model of one view is given one of a study that has several, unless more are asked for.
    for name, views in (("mimic_cxr", 1), ("iu_xray", 2)):
        for other in ("mimic_cxr", "iu_xray", "coco"):
            assert resolve_config({"dataset_name": other}, saved | {"dataset_name": name}).dataset.max_views == views
    asked = {"dataset_name": "iu_xray", "max_views": 2}
    assert resolve_config(asked, saved | {"dataset_name": "mimic_cxr"}).dataset.max_views == 2
    # Elsewhere the settings of the checkpoint say all that there is to know.
    trained = {
        name: getattr(resolve_config(given), name) for name in ("dataset_name", "cleaner", "max_views", "clinical")
    }
    assert resolve_config({}, trained).dataset == resolve_config(given).dataset
    assert resolve_config({"dataset_name": "ward7"}, trained).dataset_name == "ward7"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("[]", 'at least {"name": "..."}'),
        ("{", "cannot be read as JSON"),
        ('{"name": 3}', 'at least {"name"'),
        ('{"name": "a", "view": 2}', "unknown key 'view'; did you mean views?"),
        ('{"name": "a", "views": true}', "views is 'True', expected a whole number"),
        ('{"name": "a", "clinical": "no"}', "expected a boolean"),
        ('{"name": "../a"}', "--dataset_name '../a': must be at most 60 letters"),
        ('{"name": "a", "cleaner": "french"}', "--cleaner french: must be one of"),
        ('{"name": "a", "views": -1}', "--max_views -1: must be at least 0"),
    ],
)
def test_a_wrong_description_is_one_line(tmp_path, content, reason):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError) as error:
        resolve_config({"ann_path": str(tmp_path / "annotation.json")})
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_name_is_told_how_it_would_be_known(tmp_path):
    given = {"ann_path": str(tmp_path / "annotation.json"), "dataset_name": "iu_xary"}
    with pytest.raises(InputError, match=r"did you mean iu_xray\?; .*{\"name\": \"iu_xary\"} into .*dataset.json"):
        resolve_config(given)
    with pytest.raises(InputError, match="dataset.json describes 'ward7'"):
        resolve_config(described(tmp_path, name="ward7") | {"dataset_name": "ward8"})


def test_a_users_description_is_not_written_over(tmp_path):
    write_description(tmp_path, name="iu_xray", language="en")
    assert read_description(tmp_path / "annotation.json") == {"dataset_name": "iu_xray", "language": "en"}
    write_description(tmp_path, name="other")
    assert read_description(tmp_path / "annotation.json")["dataset_name"] == "iu_xray"
    assert read_description(tmp_path / "no" / "annotation.json") == {}


@pytest.fixture
def ward(demo, tmp_path):
    """The tiny data set under a name of its own, with a third image in some studies and laterals listed first."""
    rows = json.loads((demo / "annotation.json").read_text())
    for row in (row for split in rows.values() for row in split):
        row["view"] = ["lateral", "frontal"]
        row["image_path"] = row["image_path"][::-1]
    for split in rows.values():
        split[0]["image_path"] = [*split[0]["image_path"], split[1]["image_path"][0]]
        split[0]["view"] = ["lateral", "frontal", "frontal"]
    (tmp_path / "ward").mkdir()
    (tmp_path / "ward" / "annotation.json").write_text(json.dumps(rows))
    return tmp_path / "ward"


def test_frontal_images_come_first_and_keep_their_views(ward):
    study = read_annotation(ward / "annotation.json").splits["train"][0]
    first = frontal_first(read_annotation(ward / "annotation.json")).splits["train"][0]
    assert first.views == ("frontal", "frontal", "lateral")
    assert first.image_paths == (study.image_paths[1], study.image_paths[2], study.image_paths[0])


@pytest.mark.thorough
def test_title_records_results_and_card_have_the_name(ward, train, tmp_path):
    described(ward, name="ward7", views=3, licence="CC0 of nobody")
    folder = train("--ann_path", ward / "annotation.json")
    assert "r2gencmn on ward7 (synthetic)" in (folder / "report.html").read_text()
    assert (tmp_path / "records" / "ward7.csv").is_file()
    content = load_checkpoint(folder / "model_best.pth")
    given = Namespace(dataset="", licence="other", language="")
    card = model_card(content, {}, facts_of(content, {}, given))
    assert "# r2gencmn on ward7" in card and card.lower().count("licence of the data: cc0 of nobody") == 1
    assert facts_of({"config": content["config"] | {"language": "fr"}}, {}, given).language == "fr"
    assert content["config"]["max_views"] == 3
    (ward / "dataset.json").unlink()
    argv = ["--load", folder / "model_best.pth", "--save_dir", tmp_path / "again"]
    run_testing(*parse_flags(list(map(str, argv)), "main_test.py", ""))
    assert (tmp_path / "again" / "res.csv").read_text() == (folder / "res.csv").read_text()


@pytest.mark.thorough
def test_the_third_image_counts_where_three_are_read(ward, train, capsys):
    def losses(*flags):
        folder = train("--ann_path", ward / "annotation.json", *flags)
        return json.loads((folder / "history.json").read_text())[0]

    two = losses("--max_views", 2)
    told = capsys.readouterr().out
    assert "3 of 43 images are not read: of 3 studies, which have more, the first 2 are" in told
    three = losses("--max_views", 3)
    assert "are not read" not in capsys.readouterr().out
    # A study's third image is in no way of the second's.
    rows = json.loads((ward / "annotation.json").read_text())
    for split in rows.values():
        split[0]["image_path"][0] = split[-1]["image_path"][1]  # the lateral one, which is read last
    (ward / "annotation.json").write_text(json.dumps(rows))
    assert (
        losses("--max_views", 2)["train_nll"] == two["train_nll"]
        and two["val_nll"] == losses("--max_views", 2)["val_nll"]
    )
    assert losses("--max_views", 3)["train_nll"] != three["train_nll"] and three["train_nll"] != two["train_nll"]


@pytest.mark.thorough
def test_two_views_are_read_as_before_they_could_be_counted(demo, train):
    states = [
        load_checkpoint(train("--save_dir", demo.parent / f"views{n}", *flags) / "model_best.pth")["state_dict"]
        for n, flags in enumerate(((), ("--max_views", 2)))
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
