"""What could stop or harm a training run, looked for in everything that it reads, all of it and not only the first."""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modules.data.annotations import Annotation, Study, read_annotation
from modules.data.study_context import prior_problem
from modules.data.tokenizers import clean_report
from modules.labels.sentences import is_missing
from modules.runtime.errors import InputError, Problem

if TYPE_CHECKING:
    from modules.prepare.image_survey import ImageFacts


@dataclass
class Findings:
    """What was found so far."""

    problems: list[Problem] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)

    def attempt(self, kind: str, file: str, read: Callable[[], Any]) -> Any:
        """What ``read`` returns, or None where it ends in an InputError, which becomes a problem."""
        try:
            return read()
        except InputError as error:
            self.problems.append(Problem(kind, str(error), file))
            return None

    def add(self, kind: str, message: str, file: str, study: Study | None = None, name: str = "") -> None:
        """Note a problem of ``file``, or of the field ``name`` of a study in it."""
        if study is None:
            self.problems.append(Problem(kind, f"{file}: {message}", file))
        else:
            where = f"{file}: split '{study.split}', id {study.id!r}"
            self.problems.append(Problem(kind, f"{where}: {message}", file, study.split, study.id, name))

    def add_shared(self, kind: str, name: str, found: Mapping[str, tuple[str, ...]], file: str) -> None:
        """Note every value of the field ``name`` that is in several splits."""
        for value, splits in found.items():
            message = f"{file}: {name} {value!r} is in the splits {' and '.join(splits)}"
            self.problems.append(Problem(kind, message, file, " ".join(splits), value, name))


# ---- the annotation


def check_annotation(path: str, max_views: int, findings: Findings) -> Annotation | None:
    """The annotation without its faulty records; None where it cannot be read at all."""
    from modules.prepare.data_statistics import in_several_splits, view_statistics

    annotation = findings.attempt(
        "annotation cannot be read", path, lambda: read_annotation(path, on_problem=findings.problems.append)
    )
    if annotation is None:
        return None
    splits = annotation.splits
    findings.statistics |= {
        "synthetic": annotation.synthetic,
        "annotation_sha256": annotation.sha256,
        "views": {split: view_statistics(studies, max_views) for split, studies in splits.items()},
    }
    images = {
        split: [normal(image) for study in studies for image in study.image_paths] for split, studies in splits.items()
    }
    findings.add_shared("image is in two splits", "image_path", in_several_splits(images), path)
    held_out = {image: split for split in images if split != "train" for image in images[split]}
    for study in splits["train"]:
        for image in held_out.keys() & set(map(normal, study.negative_image_paths)):
            message = f"{image!r} is an image of split '{held_out[image]}'"
            findings.add("negative is of another split", message, path, study, "neg_image_path")
    for name in ("study_id", "subject_id"):
        keys = {
            split: [one_spelling(key) for study in studies if (key := getattr(study, name))]
            for split, studies in splits.items()
        }
        findings.add_shared(f"{name} is in two splits", name, in_several_splits(keys), path)
    for study in (study for studies in splits.values() for study in studies):
        for image, times in Counter(map(normal, study.image_paths)).items():
            if times > 1:
                findings.add(
                    "image is in a study twice", f"{image!r} is listed {times} times", path, study, "image_path"
                )
    _check_priors(annotation, findings)
    return annotation


def _check_priors(annotation: Annotation, findings: Findings) -> None:
    """Priors that no run would use, or that lead back to where they started."""
    by_id = {study.id: study for studies in annotation.splits.values() for study in studies}
    for study in (study for study in by_id.values() if study.prior):
        reason = prior_problem(study, by_id)
        before, seen = by_id.get(study.prior), set()
        while not reason and before is not None and before.id not in seen:
            seen.add(before.id)
            before = by_id.get(before.prior)
            reason = "it leads back to the record itself" if before is study else ""
        if reason:
            findings.add(
                "prior cannot be used", f"prior {study.prior[:80]!r}: {reason}", annotation.path, study, "prior"
            )


def one_spelling(identity: str) -> str:
    """An id as most tables write it: "p7 " is "p7", and 7.0, which pandas makes of a column with gaps, is 7."""
    return re.sub(r"^(\d+)\.0+$", r"\1", identity.strip())


def normal(path: str) -> str:
    """An image path in its shortest form: "./a/0.png" is "a/0.png"."""
    return posixpath.normpath(path)


def check_reports(
    annotation: Annotation, findings: Findings, *, tokenizer: Any, threshold: int, beam_size: int, max_seq_length: int
) -> None:
    """Reports without words, splits that cannot be scored; vocabulary, lengths, unknown words, equal reports."""
    from modules.prepare import data_statistics

    path, splits = annotation.path, annotation.splits
    cleaned = data_statistics.cleaned_reports(splits, tokenizer.cleaner)
    for split, studies in splits.items():
        for study, text in zip(studies, cleaned[split], strict=True):
            _check_report(study, text, path, findings)
    _check_splits(splits, cleaned, path, findings)
    _check_negatives(splits, cleaned, tokenizer.cleaner, path, findings)
    if beam_size > tokenizer.num_ids:
        message = f"--beam_size {beam_size}: at most the {tokenizer.num_ids} token ids of the vocabulary"
        findings.problems.append(Problem("vocabulary is too small", message, path))
    findings.statistics["vocabulary"] = data_statistics.vocabulary_statistics(cleaned["train"], tokenizer, threshold)
    findings.statistics["reports"] = {
        split: data_statistics.report_statistics(
            [study.report for study in splits[split]], texts, tokenizer, max_seq_length
        )
        for split, texts in cleaned.items()
    }
    findings.statistics["text_shared_with_train"] = data_statistics.shared_text(cleaned)


def _check_report(study: Study, cleaned: str, path: str, findings: Findings) -> None:
    if not any(letter.isalnum() for letter in cleaned):
        message = "no word is left of the report after cleaning"
        findings.add("report is empty after cleaning", message, path, study, "report")
    elif is_missing(study.report):
        message = f"the report is {study.report.strip()!r}, which tables write where there is none"
        findings.add("report is missing", message, path, study, "report")
    if "\0" in study.report:
        findings.add("report has a NUL", "the report has a NUL character", path, study, "report")


def _check_negatives(
    splits: Mapping[str, Sequence[Study]],
    cleaned: Mapping[str, Sequence[str]],
    cleaner: str,
    path: str,
    findings: Findings,
) -> None:
    """Texts of training negatives that a held-out report has and no training report."""
    known = set(cleaned["train"])
    held_out = {text: split for split in cleaned for text in cleaned[split] if text not in known}
    for study in splits["train"]:
        text = clean_report(study.negative_report or "", cleaner)
        if study.negative_report and text in held_out:
            message = f"the text is a report of split '{held_out[text]}'"
            findings.add("negative is of another split", message, path, study, "neg_report")


def _check_splits(
    splits: Mapping[str, Sequence[Study]], cleaned: Mapping[str, Sequence[str]], path: str, findings: Findings
) -> None:
    for split, texts in cleaned.items():
        studies = len({study.study_id for study in splits[split]})
        if studies == 1 and split != "train":
            message = (
                f"split '{split}' has one study; CIDEr, which weighs words by how few studies have them, is 0 there"
            )
            findings.problems.append(Problem("split of one study", f"{path}: {message}", path, split))
        if studies > 1 and len(set(texts)) == 1:
            message = f"all {len(texts)} reports of split '{split}' are equal after cleaning"
            findings.problems.append(Problem("all reports are equal", f"{path}: {message}", path, split))


# ---- images and detection features


def check_images(
    annotation: Annotation,
    findings: Findings,
    *,
    image_dir: str,
    follow_links: bool,
    image_size: int,
    workers: int,
    hashed: bool,
) -> None:
    """Every image of the annotation, those of its negatives too, decoded once; blank ones are problems."""
    from modules.data.images import ImageFolder
    from modules.prepare.image_survey import survey_images
    from modules.runtime.run_log import Bar

    folder = findings.attempt(
        "image_dir cannot be read", image_dir, lambda: ImageFolder(image_dir, follow_links=follow_links)
    )
    if folder is None:
        return
    users: dict[str, list[tuple[Study, str]]] = {}
    for study in (study for studies in annotation.splits.values() for study in studies):
        for name, paths in (("image_path", study.image_paths), ("neg_image_path", study.negative_image_paths)):
            for path in dict.fromkeys(paths):
                users.setdefault(path, []).append((study, name))
    found: list[ImageFacts] = []
    surveyed = survey_images(folder, list(users), workers=workers, hashed=hashed)
    for path, facts in zip(Bar(list(users), "images"), surveyed, strict=True):
        found.append(facts)
        for study, name in users[path] if facts.problem else ():
            message = f"split '{study.split}', study {study.id!r}, {name}: {facts.problem}"
            findings.problems.append(Problem(facts.kind, message, path, study.split, study.id, name))
    findings.statistics["images"] = image_statistics([facts for facts in found if facts.is_readable], image_size)
    if hashed:
        _check_equal_images(found, users, image_dir, findings)


def _check_equal_images(
    found: "Sequence[ImageFacts]", users: Mapping[str, list[tuple[Study, str]]], image_dir: str, findings: Findings
) -> None:
    from modules.prepare.data_statistics import in_several_splits

    splits: dict[str, list[str]] = {}
    names = {facts.sha256: facts.path for facts in reversed(found)}
    for facts in (facts for facts in found if facts.sha256):
        own = [study for study, name in users[facts.path] if name == "image_path" or study.split == "train"]
        for study in own:
            splits.setdefault(study.split, []).append(facts.sha256)
    shared = {names[digest]: where for digest, where in in_several_splits(splits).items()}
    findings.add_shared("equal images in two splits", "the content of image", shared, image_dir)
    digests = {facts.path: facts.sha256 for facts in found}
    for study in {study.id: study for studies in users.values() for study, _ in studies}.values():
        same: dict[str, list[str]] = {}
        for path in dict.fromkeys(study.image_paths):
            same.setdefault(digests[path] or path, []).append(path)
        for paths in (paths for paths in same.values() if len(paths) > 1):
            message = f"{' and '.join(map(repr, paths))} are the same image"
            findings.add("image is in a study twice", message, image_dir, study, "image_path")


def image_statistics(found: "Sequence[ImageFacts]", image_size: int) -> dict[str, Any]:
    """Sizes and modes of the images that can be read."""
    from modules.prepare.data_statistics import quantiles

    sizes = Counter("{} x {}".format(*facts.size) for facts in found)
    return {
        "readable": len(found),
        "modes": dict(Counter(facts.mode for facts in found)),
        "width_quantiles": quantiles([facts.size[0] for facts in found]),
        "height_quantiles": quantiles([facts.size[1] for facts in found]),
        "commonest_sizes": dict(sizes.most_common(3)),
        "different_sizes": len(sizes),
        "smaller_than_image_size": sum(min(facts.size) < image_size for facts in found),
    }


def check_detections(annotation: Annotation, findings: Findings, *, file: str, max_detections: int) -> None:
    """Whether every image has detection features, and all are of one width."""
    from modules.data.detection_features import detections_of
    from modules.runtime.run_log import Bar

    reader = findings.attempt(
        "detection features cannot be read", file, lambda: detections_of(file, annotation.splits, max_detections)
    )
    if reader is None:
        return
    detections = []
    for path in Bar(list(reader.ids), "detection features"):
        found = findings.attempt("image has no detection features", path, lambda path=path: reader(path))
        if found is not None:
            detections.append(int((found != 0).any(dim=1).sum()))
    findings.statistics["detections"] = {
        "images": len(detections),
        "width": reader.shape[1],
        "per_image": sum(detections) / max(len(detections), 1),
    }


# ---- index, labels, prototypes


def check_index(
    annotation: Annotation,
    findings: Findings,
    *,
    path: str,
    load: Callable[[str], Any],
    neighbours_drawn: int,
    reading: Callable[[], Mapping[str, str]],
) -> None:
    """The hard-negative index that ``load`` reads: whole, of these training reports, with enough neighbours.

    ``reading()``: the flags with which mining reads the annotation likewise, for the line on how to mine again.
    """
    index = findings.attempt("index cannot be used", path, lambda: load(path))
    if index is None:
        return
    if not any(problem.split == "train" for problem in findings.problems):  # otherwise records are left out here
        findings.attempt("index is of other reports", path, lambda: index.check(annotation, reading))
    rows, width = index.neighbours.shape
    if width < neighbours_drawn:
        message = f"{width} neighbours per study, but --num_neighbours {neighbours_drawn}"
        findings.add("index has too few neighbours", message, path)
    findings.statistics["index"] = {
        "studies": rows,
        "neighbours": width,
        "studies_without_neighbour": int((index.neighbours[:, :1] < 0).sum()),
    }


def check_labels(
    annotation: Annotation,
    findings: Findings,
    *,
    path: str,
    classes: tuple[str, ...],
    columns: str,
    needed: Collection[str],
) -> None:
    """The label file, and whether it has a row for every study of the splits ``needed``."""
    from modules.labels.study_labels import read_labels

    table = findings.attempt(
        "labels cannot be read", path, lambda: read_labels(path, classes, columns, on_problem=findings.problems.append)
    )
    if table is None:
        return
    unlabelled = {
        split: [study for study in studies if table.find(study) is None] for split, studies in annotation.splits.items()
    }
    for study in (study for split in needed for study in unlabelled.get(split, ())):
        message = f"{path}: no labels for study {study.id!r} of split '{study.split}'"
        findings.problems.append(Problem("study has no labels", message, path, study.split, study.id))
    positives = sum(table.labels.values())
    findings.statistics["labels"] = {
        "rows": len(table.labels),
        "without_labels": {split: len(studies) for split, studies in unlabelled.items()},
        "positives": {name: int(count) for name, count in zip(classes, positives, strict=True)} if table.labels else {},
    }
