"""Cleaning, vocabulary and ids against the facts recorded from the public codes.

GOLDEN_DIR names the folder of golden values, DATA_DIR the folder with the licensed data; what is absent is skipped.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from modules.data.annotations import read_annotation
from modules.data.tokenizers import Tokenizer, clean_report
from modules.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
DATA_DIR = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))
IU_XRAY = DATA_DIR / "iu_xray_text" / "annotation.json"


def read_facts() -> dict:
    """The golden folder's facts; the published set keeps them in spec/ beside it, our own in tests/golden."""
    name = "tokenizer_facts.json"
    places = (GOLDEN_DIR / name, GOLDEN_DIR.parent / "spec" / name, ROOT / "tests" / "golden" / name)
    return json.loads(next(place for place in places if place.is_file()).read_text())


FACTS = read_facts()


@pytest.fixture(scope="module")
def iu_xray():
    if not IU_XRAY.is_file():
        pytest.skip(f"IU X-Ray's annotation is not in {DATA_DIR}")
    return read_annotation(IU_XRAY)


@pytest.mark.parametrize("cleaner", ["iu_xray", "mimic_cxr"])
def test_tricky_and_real_reports(cleaner):
    facts = FACTS[cleaner]
    tokenizer = Tokenizer(facts["all_tokens"], cleaner)
    assert tokenizer.sha256 == facts["tokens_sha256"]
    for case in facts["tricky"] + facts["reports"]:
        assert clean_report(case["report"], cleaner) == case["cleaned"]
        assert tokenizer.encode(case["report"]) == case["ids"]
    for case in facts["reports"]:
        assert tokenizer.decode(case["ids"][1:]) == case["decoded"]


@pytest.mark.parametrize("cleaner", ["iu_xray", "mimic_cxr"])
def test_vocabulary_facts(cleaner):
    facts = FACTS[cleaner]
    tokenizer = Tokenizer(facts["all_tokens"], cleaner)
    assert (tokenizer.vocab_size, tokenizer.num_ids) == (facts["vocab_size"], facts["logit_rows"])
    assert [tokenizer.token2idx[token] for token in facts["first5"]] == facts["id_first5"]
    assert (tokenizer.token2idx["<unk>"], tokenizer.token2idx["."]) == (facts["unk_id"], facts["dot_id"])


@pytest.mark.parametrize("cleaner", ["iu_xray", "mimic_cxr"])
def test_every_id_of_iu_xray(iu_xray, cleaner):
    facts = FACTS[cleaner]
    train = [study.report for study in iu_xray.splits["train"]]
    tokenizer = Tokenizer.from_reports(train, facts["threshold"], cleaner)
    assert list(tokenizer.token2idx) == facts["all_tokens"]
    for split, expected in facts["all_ids_sha256"].items():
        ids = [tokenizer.encode(study.report) for study in iu_xray.splits[split]]
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == expected
        lengths = np.array([len(row) for row in ids])
        stats = facts["length_stats"][split]
        assert lengths.mean() == pytest.approx(stats["mean"]) and lengths.max() == stats["max"]
        assert (lengths > 60).sum() == stats["n_over_60"]


GOLDEN_FOLDERS = sorted(path.parent for path in GOLDEN_DIR.glob("*/*/annotation.json"))


@pytest.mark.skipif(not GOLDEN_FOLDERS, reason="GOLDEN_DIR holds no annotation")
@pytest.mark.parametrize("folder", GOLDEN_FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_models_vocabulary_and_report_ids(folder):
    config = json.loads((folder / "config.json").read_text())
    train = [study.report for study in read_annotation(folder / "annotation.json").splits["train"]]
    tokenizer = Tokenizer.from_reports(train, config["args"]["threshold"], config["mode"])
    assert {str(index): token for index, token in tokenizer.idx2token.items()} == config["idx2token"]
    with np.load(folder / "data.npz") as data:
        rows = data["report_ids"]
    for row, report in zip(rows, config["report_rows"], strict=True):
        ids = tokenizer.encode(train[report])[: config["args"]["max_seq_length"]]
        assert ids + [0] * (len(row) - len(ids)) == row.tolist()


def test_rules_that_the_recorded_strings_do_not_separate():
    # The sentence is stripped before the deletions, so the blank that "- (" leaves stays.
    assert clean_report("Clear ( . Normal", "iu_xray") == "clear  . normal ."
    # MIMIC folds newlines into blanks, IU keeps them.
    assert clean_report("One\ntwo", "mimic_cxr") == "one two ." and clean_report("One\ntwo", "iu_xray") == "one\ntwo ."


def test_threshold_and_sorting_with_unknown():
    tokenizer = Tokenizer.from_reports(["b a. b", "a c"], threshold=2, cleaner="iu_xray")
    assert list(tokenizer.token2idx) == [".", "<unk>", "a", "b"]
    assert tokenizer.encode("c b.") == [0, 2, 4, 1, 0]


def test_decoding_stops_at_the_first_zero():
    tokenizer = Tokenizer([".", "<unk>", "clear"], "iu_xray")
    assert tokenizer.decode([3, 1, 0, 3]) == "clear ."
    assert tokenizer.decode_batch(np.array([[3, 1, 0], [0, 3, 3]])) == ["clear .", ""]


def test_state_round_trips_through_json():
    tokenizer = Tokenizer(["<unk>", "b", "a"], "mimic_cxr")
    other = Tokenizer.from_state(json.loads(json.dumps(tokenizer.state())))
    assert (other.idx2token, other.cleaner, other.sha256) == (tokenizer.idx2token, "mimic_cxr", tokenizer.sha256)
    assert Tokenizer(["<unk>", "a", "b"], "mimic_cxr").sha256 != tokenizer.sha256


def test_bad_vocabularies_are_named():
    with pytest.raises(InputError, match="token twice"):
        Tokenizer(["<unk>", "a", "a"], "iu_xray")
    with pytest.raises(InputError, match="lacks <unk>"):
        Tokenizer(["a"], "iu_xray")
    with pytest.raises(InputError, match="'chest' is unknown; choose one of iu_xray, mimic_cxr"):
        clean_report("a", "chest")
    with pytest.raises(InputError, match="'chest' is unknown; choose one of iu_xray, mimic_cxr"):
        Tokenizer(["<unk>"], "chest")
    for state in (None, {}, {"tokens": "abc"}, {"tokens": [1], "cleaner": "iu_xray"}):
        with pytest.raises(InputError, match="tokenizer state"):
            Tokenizer.from_state(state)
