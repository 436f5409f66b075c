"""Scores of anybody's reports, with intervals, baselines and warnings, as main_test.py scores those of a run.

Shapes: N reports.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modules.data.tokenizers import CLEANERS, UNKNOWN, Tokenizer, clean_report, cut_report
from modules.evaluation.baselines import COMMONEST, commonest_report_baseline
from modules.evaluation.meteor import TOKENISER, ptb_tokenise
from modules.evaluation.metric_table import FULL, with_aliases
from modules.evaluation.scored import Scored
from modules.evaluation.settings import ScoringSettings
from modules.evaluation.system_scorer import References, SystemScorer, Texts, seen_in_training, units_of
from modules.runtime.errors import InputError

NO_CLEANER, COCO = "none", "coco"
CLEANER_NAMES = (NO_CLEANER, *CLEANERS)
MODEL = "model"
_PLACEHOLDER = "unkunkunk"  # cleaning would take the brackets off <unk>


def score(
    references: Texts,
    generated: Sequence[str] | Mapping[str, Sequence[str]],
    *,
    ids: Sequence[str] | None = None,
    study_ids: Sequence[str] | None = None,
    subject_ids: Sequence[str] | None = None,
    with_prior: Sequence[bool] | None = None,
    cleaner: str = NO_CLEANER,
    training: Sequence[str] = (),
    max_seq_length: int = 0,
    threshold: int = 0,
    settings: ScoringSettings | None = None,
    device: Any = "cpu",
) -> Scored:
    """Score N generated reports, of one system or of several by name, against N references.

    ``cleaner``: a data set's rules (a key of CLEANERS) clean references and generated reports, "coco" tokenises
    captions, of which a reference may be several; "none" leaves all as it is. ``training`` reports add the commonest
    one as a baseline, and the scores of references seen in training. With ``max_seq_length`` references are scored cut
    to it too, as the R2Gen family does, and with ``threshold`` their words that are rarer in ``training`` are <unk>.
    What is resampled are ``subject_ids``, else ``study_ids``, else the reports. ``with_prior`` says which studies have
    an earlier examination, which comparison_rate asks for. InputError for counts that differ, and
    for options that exclude one another.
    """
    settings, references = settings or ScoringSettings(), _listed("references", references)
    systems = {name: _listed(name, texts) for name, texts in _named(generated).items()}
    _check(references, systems, cleaner, training, max_seq_length, threshold)
    train = [] if cleaner == COCO else list(training)
    clean = _cleaning(cleaner)
    studies, patients = units_of(study_ids, subject_ids)
    keys = list(ids) if ids else [str(number) for number, _ in enumerate(references, start=1)]
    if cleaner == COCO:
        split_words, words = _tokenised(references, systems)
        texts = [several if isinstance(several, str) else several[0] for several in references]
        found = References(
            keys, {"": words}, texts, texts, encoded={"": references}, studies=studies, patients=patients
        )
    else:
        cut = _cutting(cleaner, train, max_seq_length, threshold)
        if settings.floors and train:
            systems[COMMONEST] = commonest_report_baseline([(cut or clean)(text) for text in train], len(keys))
        split_words, whole = _cleaned_generated(clean), [clean(text) for text in references]
        shorter = {} if cut is None else {"": [cut(text) for text in references]}
        found = References(
            keys,
            shorter | {FULL: whole} if shorter else {"": whole},
            shorter[""] if shorter else whole,
            list(references),
            labelled=shorter | {FULL: list(references)},
            studies=studies,
            patients=patients,
            with_prior=with_prior,
        )
    by_rules = settings.clinical and cleaner != COCO
    with SystemScorer(settings, device, labels_by_rules=by_rules, split_words=split_words) as scorer:
        scored = scorer.score(found, systems)
    if train:
        scored.seen = seen_in_training(whole, frozenset(map(clean, train)))
    return scored


def as_json(scored: Scored, system: str = MODEL, name: str = MODEL) -> dict[str, Any]:
    """The content of results.json about ``system``, there called ``name``, and the baselines.

    With references in one form, its scores are those against whole ones too and have both names.
    """
    chosen = {system: name} | {other: other for other in scored.scores if other == COMMONEST}
    cut = scored.cut
    return {
        "split": "test",
        "test": {new: with_aliases(_both(scored.scores[old], cut)) for old, new in chosen.items()},
        "intervals": {new: _both(scored.intervals[old], cut) for old, new in chosen.items()},
        "intervals_are": scored.intervals_are,
        "by_reference": {
            kind: part | {"scores": {chosen[old]: values for old, values in part["scores"].items() if old in chosen}}
            for kind, part in scored.by_reference.items()
        },
        "variety": {new: scored.variety[old] for old, new in (chosen | {"references": "references"}).items()},
        "clinical_classes": scored.class_tables(system),
        "missing": scored.missing,
        "warnings": scored.warnings(system),
    }


def tokenisation(cleaner: str) -> str:
    """How texts are split into the words that are scored."""
    if cleaner == COCO:
        return f"{TOKENISER}, captions and generated texts alike"
    cleaned = "after no cleaning" if cleaner == NO_CLEANER else f"after the cleaning of {cleaner}"
    return f"white space, {cleaned}; no Penn Treebank tokenisation"


def _named(generated: Sequence[str] | Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
    return generated if isinstance(generated, Mapping) else {MODEL: generated}


def _listed(name: str, texts: Any) -> list:
    """``texts`` as a list; InputError for what is no sequence of texts, such as a table's missing cells."""
    if isinstance(texts, (str, Mapping)):
        raise InputError(
            f"{name}: a list of texts is needed, in the order of the references, not a {type(texts).__name__}"
        )
    found = list(texts)
    for row, text in enumerate(found):
        if not (isinstance(text, str) or (isinstance(text, (list, tuple)) and text and set(map(type, text)) == {str})):
            raise InputError(f"{name}: number {row + 1} is {type(text).__name__}, not a text; an empty report is ''")
    return found


def _check(references, systems, cleaner, training, max_seq_length, threshold) -> None:
    if cleaner not in CLEANER_NAMES:
        raise InputError(f"cleaner {cleaner!r} is unknown; choose one of {', '.join(CLEANER_NAMES)}")
    if not references or not systems:
        raise InputError("no reports to score: references and generated reports are needed")
    several = cleaner != COCO and not all(isinstance(text, str) for text in references)
    if several or not all(isinstance(text, str) for texts in systems.values() for text in texts):
        raise InputError("a report is one text; only references may be several, with cleaner 'coco'")
    for name, texts in systems.items():
        if len(texts) != len(references):
            raise InputError(f"{name} has {len(texts)} reports where there are {len(references)} references")
        if name in (COMMONEST, "references"):
            raise InputError(f"a system cannot be called {name!r}; give it another name")
    if (max_seq_length or threshold) and cleaner == COCO:
        raise InputError("captions are not cut: max_seq_length and threshold are for reports")
    if threshold and not (training and max_seq_length and cleaner != NO_CLEANER):
        raise InputError(
            f"threshold {threshold}: which words are rare is counted in the training reports, cleaned as in training: "
            "give these, a cleaner and max_seq_length too"
        )
    if max_seq_length < 0 or max_seq_length == 1 or threshold < 0:
        raise InputError(f"max_seq_length {max_seq_length}, threshold {threshold}: must be 0, or at least 2 and 1")


def _cleaning(cleaner: str) -> Callable[[str], str]:
    return (lambda text: text) if cleaner in (NO_CLEANER, COCO) else lambda text: clean_report(text, cleaner)


def _cleaned_generated(clean: Callable[[str], str]) -> Callable[[Sequence[str]], list[str]]:
    """Cleans generated texts, and leaves those that were cleaned before and cut: no full stop is added to these."""

    def cleaned(text: str) -> str:
        found = clean(text.replace(UNKNOWN, _PLACEHOLDER)).replace(_PLACEHOLDER, UNKNOWN)
        return text if found.split() == [*text.split(), "."] else found

    return lambda texts: list(map(cleaned, texts))


def _cutting(cleaner: str, training: Sequence[str], max_seq_length: int, threshold: int) -> Callable[[str], str] | None:
    """Cuts a reference as in training, where max_seq_length counts the mark of the beginning; None where it is 0."""
    if not max_seq_length:
        return None
    if threshold:
        tokenizer = Tokenizer.from_reports(training, threshold, cleaner)
        return lambda text: cut_report(text, tokenizer, max_seq_length)
    clean = _cleaning(cleaner)
    return lambda text: " ".join(clean(text).split()[: max_seq_length - 1])


def _tokenised(
    references: Texts, systems: Mapping[str, Sequence[str]]
) -> tuple[Callable[[Sequence[str]], list[str]], list[list[str]]]:
    """What splits generated captions, and the tokenised references; one Java process reads all texts."""
    listed = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
    different = list(dict.fromkeys(text for texts in (*listed, *systems.values()) for text in texts))
    tokens = dict(zip(different, ptb_tokenise(different), strict=True))
    return lambda texts: [tokens[text] for text in texts], [[tokens[text] for text in texts] for texts in listed]


def _both(values: Mapping[str, Any], cut: bool) -> dict[str, Any]:
    """Where references have one form, its scores under the names of both, but for those that have no references."""
    if cut:
        return dict(values)
    plain = {name.removesuffix(FULL): value for name, value in values.items()}
    return plain | {f"{name}{FULL}": value for name, value in plain.items() if name != "diversity"}
