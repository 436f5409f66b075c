"""Images with several captions (COCO): each caption is a training sample; in evaluation all are references."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from modules.data.annotations import Annotation, Study, train_sha256


def split_captions(annotation: Annotation) -> Annotation:
    """The annotation with a record for every caption of the train split: "<id>#<number>", the caption as its report.

    They keep their image's ``study_id``, so that they are never each other's hard negatives, and ``train_sha256`` is
    that of the captions. A record without captions has its report as the only one; val and test stay as they are.
    """
    train = tuple(
        replace(study, id=f"{study.id}#{number}", report=caption, captions=(), record_id=study.id)
        for study in annotation.splits["train"]
        for number, caption in enumerate(references(study))
    )
    return replace(annotation, splits=annotation.splits | {"train": train}, train_sha256=train_sha256(train))


def references(study: Study) -> tuple[str, ...]:
    """All captions of a record's image, as in the annotation."""
    return study.captions or (study.report,)


def first_of_each_image(studies: Sequence[Study]) -> tuple[Study, ...]:
    """The first record of every image in the result of ``split_captions``."""
    return tuple({study.image_paths: study for study in reversed(studies)}.values())[::-1]


def collapse_repeats(text: str) -> str:
    """``text`` with immediately repeated words written once, as VisualGPT's evaluation does before scoring."""
    words = text.split()
    return " ".join(word for word, before in zip(words, [None, *words], strict=False) if word != before)


def captions_by_sample(datasets: Iterable) -> dict[str, tuple[str, ...]]:
    """The captions of every sample's image, by the sample's id, of ReportDatasets."""
    return {
        dataset.sample_id(index): references(dataset.studies[row])
        for dataset in datasets
        for index, (row, _) in enumerate(dataset.samples)
    }
