"""What is known of a study beside its images and its report: its indication, and the patient's study before."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from modules.data.annotations import Annotation, Study, train_sha256
from modules.data.dataset_specs import PRIOR_IMAGE, SECTIONS, TEXTS
from modules.runtime.errors import InputError


class ContextReader:
    """The context of ``studies``, of the kinds ``wanted``; priors are looked for among the studies themselves.

    Texts are cut to ``max_tokens`` each.
    """

    def __init__(self, studies: Sequence[Study], tokenizer, wanted: Collection[str], max_tokens: int):
        self._by_id = {study.id: study for study in studies}
        self._tokenizer, self._wanted, self._max_tokens = tokenizer, wanted, max_tokens
        self.prior_images = PRIOR_IMAGE in wanted
        self.texts = any(name in wanted for name in TEXTS)

    def prior(self, study: Study) -> Study | None:
        """The study before, None where there is none, or where it is another patient's or the same study."""
        return None if not study.prior or prior_problem(study, self._by_id) else self._by_id[study.prior]

    def tokens(self, study: Study) -> tuple[list[int], list[int]]:
        """Ids of the texts, without begin and end, and the kind of each."""
        prior = self.prior(study)
        found = {"indication": study.sections.get("indication"), "prior_report": prior and prior.report}
        ids: list[int] = []
        kinds: list[int] = []
        for name, kind in TEXTS.items():
            if name in self._wanted and (text := found[name]):
                own = self._tokenizer.encode(text)[1:-1][: self._max_tokens]
                ids += own
                kinds += [kind] * len(own)
        return ids, kinds


def prior_problem(study: Study, by_id: Mapping[str, Study]) -> str:
    """Why the record that ``study.prior`` names is not the patient's study before; "" where it may be.

    ``by_id``: the studies among which priors are looked for.
    """
    found = by_id.get(study.prior)
    if found is None:
        return "there is no such record"
    if found.split != study.split:
        return f"it is of split '{found.split}'"
    if found.subject_id != study.subject_id:
        return f"it is of another patient ({found.subject_id[:40]!r}, not {study.subject_id[:40]!r})"
    # Another image of the study has its report.
    return "it is of the same study" if found.study_id == study.study_id else ""


def sections_text(study: Study, which: str) -> str:
    """The report that ``which`` of the sections make, "" where the study has none of them."""
    found = [(name, study.sections[name]) for name in _named(which) if study.sections.get(name)]
    return " ".join(f"{name.capitalize()}. {own}" if which == "both" else own for name, own in found)


def _named(which: str) -> tuple[str, ...]:
    return SECTIONS if which == "both" else (which,)


def with_sections(annotation: Annotation, which: str) -> tuple[Annotation, int]:
    """The annotation with ``which`` of its sections ("findings", "impression", "both") as reports, and how many studies
    were left out because they have none of them.

    With "both" each is marked: its name, as a sentence, goes before it. InputError where a split has none left.
    """
    splits = {
        split: tuple(replace(study, report=found) for study in studies if (found := sections_text(study, which)))
        for split, studies in annotation.splits.items()
    }
    for split, studies in splits.items():
        if annotation.splits[split] and not studies:
            raise InputError(
                f"--report_sections {which}: {annotation.path}: no record of split '{split}' has "
                f"{' or '.join(_named(which))} in its field 'sections'"
            )
    lost = sum(map(len, annotation.splits.values())) - sum(map(len, splits.values()))
    return replace(annotation, splits=splits, train_sha256=train_sha256(splits["train"])), lost
