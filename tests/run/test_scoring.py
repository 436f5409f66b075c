"""Which scores a run's flags lead to, under which names, with which intervals."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modules.config import Config
from modules.evaluation.meteor import MeteorError
from modules.evaluation.metric_table import tagged, untagged, with_aliases
from modules.evaluation.tester import Predictions
from modules.labels.labeler import CLASSES, label_reports
from modules.run.scoring import Scoring
from modules.runtime.errors import InputError

FULL_REFERENCES = ["the heart is normal . no effusion .", "mild edema . small left effusion .", "no acute disease ."]
TEXTS = ("ids", "generated", "references", "full_references", "reports")
GENERATED = ["the heart is normal .", "mild edema .", "small effusion ."]
FOUND = Predictions(
    ids=["a", "b", "c"],
    generated=GENERATED,
    references=[text[:20] for text in FULL_REFERENCES],
    full_references=FULL_REFERENCES,
    reports=FULL_REFERENCES,
    nll=torch.tensor([[3.0, 4], [1.0, 5], [2.0, 1]]),
)


def run(tags=None, **flags):
    with Scoring(Config(meteor=False, **flags), torch.device("cpu")) as scoring:
        return scoring.test(FOUND, {"model": GENERATED, "floor": ["no effusion ."] * 3}, tags or {})


def test_every_score_has_an_interval_and_statistics_that_repeat_it():
    scored = run()
    assert len(scored.scores["model"]) == 2 * 7 + 1 + 2 * 72 + 4 and scored.scores["model"]["nll"] == pytest.approx(0.6)
    assert "nll" not in scored.scores["floor"]
    for system, scores in scored.scores.items():
        measured = {name: value for name, value in scores.items() if value is not None}
        assert {name for name in scores if not name.startswith("METEOR")} == set(measured)
        again = scored.statistics[system].scores()
        spread = {"diversity": again["diversity"]} if system == "model" else {}  # the floor's reports have three words
        assert again == pytest.approx(measured | spread, abs=1e-12)
        macro = {name for name in again if "_macro_" in name}  # no class has five positives here
        # One report of the model has four words: a resample may have none.
        assert set(scored.intervals[system]) == set(again) - macro - set(spread)


def test_likelihoods_are_of_the_tokens_of_a_vocabulary():
    found = dataclasses.replace(FOUND, references=["the <unk> ."] * 3)
    with Scoring(Config(meteor=False, clinical=False), torch.device("cpu")) as scoring:
        targets = [
            scoring.test(own, {"model": GENERATED}, {}, vocabulary=name).statistics["model"].targets
            for own, name in ((FOUND, "words"), (FOUND, "words"), (FOUND, "pieces"), (found, "words"))
        ]
    assert targets[0] == targets[1] and len(set(targets)) == 3


def test_the_reason_for_a_missing_meteor_outlives_the_next_system(monkeypatch):
    """Java may fail for the model and work again for the floor: the reason must not be lost in between."""
    with Scoring(Config(), torch.device("cpu")) as scoring:
        answers = iter([None, 0.5, 0.5])

        def per_report(references, _):
            if next(answers) is None:
                raise MeteorError("no answer")
            return np.ones((len(references), 6))

        monkeypatch.setattr(scoring.metrics.meteor, "per_report", per_report)
        scored = scoring.test(FOUND, {"model": GENERATED, "floor": ["no effusion ."] * 3}, {})
    assert (scored.scores["model"]["METEOR"], scored.scores["floor"]["METEOR"]) == (None, pytest.approx(0.4))
    assert scored.missing == {"METEOR": "no answer"}


def test_clinical_scores_are_against_both_forms_of_the_references():
    scored = run()
    # The cut reference of the second study has lost its effusion, which the model has not said.
    [effusion] = [row for row in scored.class_tables("model")["rule"] if row["class"] == "Pleural Effusion"]
    assert (effusion["reference_positives"], effusion["generated_positives"], effusion["f1"]) == (1, 1, 0)
    key = "ce_rule_recall_micro_14_uncertain_negative"
    assert scored.scores["model"][key] > scored.scores["model"][f"{key}_full"]


def test_whole_references_are_labelled_before_cleaning_takes_their_punctuation():
    cleaned = "the lung bases pneumonia atelectasis or edema ."
    report = "The lung bases: pneumonia/atelectasis or edema."
    found = dataclasses.replace(FOUND, full_references=[cleaned] * 3, reports=[report] * 3)
    with Scoring(Config(meteor=False), torch.device("cpu")) as scoring:
        labels = scoring.test(found, {"model": GENERATED}, {}).labels["rule"]["references_full"]
    assert np.array_equal(labels, label_reports([report] * 3), equal_nan=True)
    assert not np.array_equal(labels, label_reports([cleaned] * 3), equal_nan=True)


SPANISH = ["el corazon es normal . sin derrame .", "edema leve . derrame pequeno .", "sin enfermedad aguda ."]


def test_clinical_scores_of_another_language_are_null_with_the_reason():
    found = dataclasses.replace(FOUND, references=SPANISH, full_references=SPANISH, reports=SPANISH)
    with Scoring(Config(meteor=False), torch.device("cpu")) as scoring:
        scored = scoring.test(found, {"model": SPANISH}, {})
    clinical = {name: value for name, value in scored.scores["model"].items() if name.startswith("ce_")}
    assert len(clinical) == 2 * 72 and set(clinical.values()) == {None}
    assert "the labelers read English" in scored.missing["ce_rule"]
    assert not any(name.startswith("ce_") for name in scored.intervals["model"])
    assert scored.class_tables("model") == {} and scored.scores["model"]["BLEU_4"] == pytest.approx(1, abs=1e-6)


def test_no_best_epoch_is_sought_by_labels_that_mean_nothing():
    studies = [SimpleNamespace(id=text, report=text) for text in SPANISH]
    dataset = SimpleNamespace(studies=studies, samples=[(0, None), (1, None)], sample_id=str)
    with pytest.raises(InputError, match="--monitor_metric ce_rule_f1_macro.*read English.*BLEU_4"):
        Scoring(Config(monitor_metric="ce_rule_f1_macro_14_uncertain_negative"), torch.device("cpu"), [dataset])


def test_references_that_were_trained_on_are_scored_apart_from_the_others():
    with Scoring(Config(meteor=False, clinical=False), torch.device("cpu")) as scoring:
        scored = scoring.test(FOUND, {"model": GENERATED}, {}, frozenset(FULL_REFERENCES[2:]))
        assert scored.seen.tolist() == [False, False, True]
        alone = scoring.test(
            dataclasses.replace(FOUND, **{name: getattr(FOUND, name)[:2] for name in TEXTS}, nll=FOUND.nll[:2]),
            {"model": GENERATED[:2]},
            {},
        )
        unseen = scored.statistics["model"].scores(~scored.seen)
    for name, value in alone.scores["model"].items():
        if value is not None and not name.startswith(("CIDEr", "nll")):
            assert unseen[name] == pytest.approx(value, abs=1e-12), name


def test_comparisons_are_judged_by_the_priors_of_the_annotation():
    def rate(priors, generated):
        studies = [
            SimpleNamespace(id=text, report=text, study_id=text, subject_id="", split="test", prior=p)
            for text, p in zip("abc", priors, strict=True)
        ]
        dataset = SimpleNamespace(studies=studies, samples=[(n, None) for n in range(3)], sample_id="abc".__getitem__)
        with Scoring(Config(meteor=False), torch.device("cpu"), [dataset]) as scoring:
            scored = scoring.test(FOUND, {"model": generated}, {})
        if (found := scored.statistics["model"].scores().get("comparison_rate_full")) is not None:
            assert found == scored.scores["model"]["comparison_rate_full"]
        return scored.scores["model"]["comparison_rate_full"], scored.missing.get("comparison_rate_full")

    stable, plain = "stable heart .", "heart ."
    assert rate(("", "a", ""), [stable, stable, plain]) == (1 / 2, None)  # one of the two without a prior
    assert rate(("c", "x", ""), [stable, stable, plain]) == (1 / 2, None)  # a prior that is not there is none
    assert rate(("", "a", ""), [plain, stable, plain]) == (0.0, None)
    assert rate("bca", [stable] * 3) == (None, "every study has an earlier examination")


def test_a_tag_is_in_the_names_of_what_is_kept_and_of_the_intervals():
    scored = run({"model": "reflabels"})
    assert scored.statistics["model"].tag == "reflabels" and scored.statistics["floor"].tag == ""
    assert "BLEU_4_reflabels_full" in scored.intervals["model"] and "BLEU_4_full" in scored.intervals["floor"]


def test_other_data_sets_and_users_without_interest_get_no_clinical_scores():
    assert not any(name.startswith("ce_") for name in run(clinical=False).scores["model"])
    with pytest.raises(InputError, match="--clinical true"):
        Config(clinical=False, monitor_metric="ce_rule_f1_macro_14_uncertain_negative")


def test_validation_labels_reports_only_where_the_best_model_is_chosen_by_it():
    key = "ce_rule_f1_example_14_uncertain_negative"
    for metric, wanted in ((key, True), ("BLEU_4", False)):
        with Scoring(Config(meteor=False, monitor_metric=metric), torch.device("cpu")) as scoring:
            scores = scoring.validation(Predictions(generated=GENERATED, references=FULL_REFERENCES))
        assert (key in scores) == wanted and "BLEU_4" in scores
        # Report 1: No Finding on both sides, 1. Report 2: edema, of edema and effusion, 2/3. Report 3: 0.
        assert scores.get(key, 5 / 9) == pytest.approx(5 / 9)


@pytest.mark.parametrize(("meteor", "expected"), [(0.2, 0.1 + 0.33 * 0.4 + 0.67 * 0.2), (None, None)])
def test_the_sum_that_xpronet_chooses_by(monkeypatch, meteor, expected):
    found = {"BLEU_1": 0.4, "BLEU_4": 0.1, "METEOR": meteor}
    with Scoring(Config(monitor_metric="xpronet_selection"), torch.device("cpu")) as scoring:
        monkeypatch.setattr(scoring.metrics, "compute", lambda *_, **__: dict(found))
        scores = scoring.validation(Predictions(generated=GENERATED, references=FULL_REFERENCES))
    assert scores.get("xpronet_selection") == pytest.approx(expected)


def test_optional_models_score_under_their_own_names(monkeypatch):
    class Labeler:
        def __init__(self, path, encoder):
            assert (path, encoder) == ("chexbert.pth", "folder")

        def to(self, device):
            return self

        def label(self, reports):
            return np.tile(np.where(np.array(CLASSES) == "Edema", 1.0, np.nan), (len(reports), 1))

    class Encoder(Labeler):
        def __init__(self, *_):
            pass

        def score(self, references, hypotheses):
            return {"BERTScore_f1": np.array([[len(text)] for text in references], dtype=float)}

    monkeypatch.setattr("modules.labels.chexbert.Chexbert", Labeler)
    monkeypatch.setattr("modules.evaluation.bertscore.BertScore", Encoder)
    scored = run(chexbert_path="chexbert.pth", chexbert_encoder="folder", bertscore_path="bert")
    scores = scored.scores["model"]
    assert scores["ce_chexbert_f1_micro_14_uncertain_negative"] == 1 > scores["ce_rule_f1_micro_14_uncertain_negative"]
    assert scores["ce_chexbert_f1_macro_14_uncertain_positive_full"] == pytest.approx(1 / 14)
    assert scores["BERTScore_f1_full"] == pytest.approx(np.mean([len(text) for text in FULL_REFERENCES]))
    assert set(scored.class_tables("model")) == {"rule", "chexbert"}
    assert scored.intervals["model"]["BERTScore_f1"][0] <= scores["BERTScore_f1"]


@pytest.mark.parametrize("flag", ["chexbert_path", "bertscore_path", "radgraph_path"])
def test_a_wrong_path_ends_a_run_at_its_start(flag):
    with pytest.raises(InputError, match=f"--{flag} nowhere"):
        Scoring(Config(**{flag: "nowhere"}), torch.device("cpu"))


def test_names():
    assert tagged("BLEU_4_full", "reflabels") == "BLEU_4_reflabels_full" and tagged("BLEU_4", "") == "BLEU_4"
    assert untagged("BLEU_4_reflabels_full", "reflabels") == "BLEU_4_full"
    assert with_aliases({"BLEU_4": 0.1, "BLEU_4_full": 0.2, "nll": 3}) == {
        "BLEU_4": 0.1,
        "BLEU_4_full": 0.2,
        "nll": 3,
        "BLEU_4_truncated": 0.1,
    }


def test_captions_hold_no_unk_of_the_vocabulary(monkeypatch):
    """Their scores read every word of them: a warning to read those against whole references had no object."""
    monkeypatch.setattr("modules.run.scoring.ptb_tokenise", list)
    found = dataclasses.replace(FOUND, references=["the <unk> ."] * 3)
    with Scoring(Config(meteor=False, captions=True), torch.device("cpu")) as scoring:
        scoring._captions = {name: [text] for name, text in zip(FOUND.ids, FULL_REFERENCES, strict=True)}
        scoring._tokenised = scoring._captions
        scored = scoring.test(found, {"model": GENERATED}, {})
    assert scored.variety["references"]["unk_share"] == 0
    assert not any("<unk>" in line for line in scored.warnings("model"))
