"""The data sets: one literal table of those that are known, and the file by which any other describes itself.

A data set that everybody should have is one more entry of DATASETS; a user's own has a dataset.json beside its
annotation. Torch-free, as --help reads it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.runtime.errors import InputError, did_you_mean
from modules.runtime.input_files import read_json

DESCRIPTION = "dataset.json"
ENGLISH = "en"
CLEANER_NAMES = ("iu_xray", "mimic_cxr", "coco", "any")  # the keys of modules/data/tokenizers.py's CLEANERS
TEXTS = {"indication": 1, "prior_report": 2}  # kinds of text beside the images -> rows of the type embedding
PRIOR_IMAGE = "prior_image"
CONTEXTS = (*TEXTS, PRIOR_IMAGE)
SECTIONS = ("findings", "impression")  # of a report, in the order in which "both" has them
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")
# What a dataset.json may say: its key -> the flag that it is a default of, and the type of its value.
DESCRIBED: dict[str, tuple[str, type]] = {
    "name": ("dataset_name", str),
    "language": ("language", str),
    "cleaner": ("cleaner", str),
    "views": ("max_views", int),
    "captions": ("captions", bool),
    "clinical": ("clinical", bool),
    "licence": ("data_licence", str),
}
# Flags that are facts of the data, whichever model reads them.
FACTS = ("dataset_name", "language", "captions", "clinical", "data_licence")


@dataclass(frozen=True)
class DataSpec:
    """What is particular to a data set; its key in DATASETS names it in flags, records and pages."""

    cleaner: str  # of its texts: one of CLEANER_NAMES
    max_views: int  # images of a study that are read with --views paired
    clinical: bool = True  # chest X-ray reports in English, which the clinical labels are made for
    captions: bool = False  # several texts of an image: each a training sample, all of them references
    preset: Mapping[str, Any] = field(default_factory=dict)  # published flag values, set by --backbone
    title: str = ""  # its published name


# Views and presets of the first two as R2Gen and R2GenCMN publish them, COCO's as VisualGPT does.
DATASETS: dict[str, DataSpec] = {
    "iu_xray": DataSpec("iu_xray", max_views=2, preset={"max_seq_length": 60, "threshold": 3}, title="IU X-Ray"),
    "mimic_cxr": DataSpec("mimic_cxr", max_views=1, preset={"max_seq_length": 100, "threshold": 10}, title="MIMIC-CXR"),
    "coco": DataSpec(
        "coco",
        max_views=1,
        clinical=False,
        captions=True,
        preset={"max_seq_length": 20, "threshold": 5, "beam_size": 5},
        title="COCO",
    ),
}
# A data set that is not in the table, as far as its dataset.json leaves it open.
OTHER = DataSpec("iu_xray", max_views=2)


def data_title(dataset_name: str, ann_path: str, synthetic: bool) -> str:
    """What a run's data may be called in public; "" for data of one's own, which --dataset_name only says how to read.

    A data set of the table is taken for itself where the annotation lies in the folder of its name.
    """
    spec = DATASETS.get(dataset_name, OTHER)
    if not spec.title:  # of one's own
        return f"{dataset_name} (synthetic)" if synthetic else dataset_name
    if synthetic:
        return "synthetic radiographs"
    own_folder = Path(ann_path).parent.name.lower().replace("-", "_") == dataset_name
    return spec.title if own_folder else ""


def check_name(name: str, flag: str = "dataset_name") -> None:
    """InputError for a ``name`` that cannot be that of a records file."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"--{flag} {name[:60]!r}: must be at most 60 letters, digits, hyphens, dots and underscores, and "
            "begin with a letter or digit"
        )


def read_description(ann_path: str | Path) -> dict[str, Any]:
    """The defaults of flags, by name, that the dataset.json beside an annotation gives; {} where there is none.

    Without a cleaner, a language other than English has the cleaner for any language. InputError for other content.
    """
    path = Path(ann_path).parent / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise InputError(
            f'{path}: expected an object with at least {{"name": "..."}}; its keys: {", ".join(DESCRIBED)}'
        )
    found = {}
    for key, value in content.items():
        if key not in DESCRIBED:
            raise InputError(
                f"{path}: unknown key {key[:40]!r}{did_you_mean(key, DESCRIBED)}; known: {', '.join(DESCRIBED)}"
            )
        flag, kind = DESCRIBED[key]
        if type(value) is not kind:
            raise InputError(f"{path}: {key} is {str(value)[:40]!r}, expected a {_KINDS[kind]}")
        found[flag] = value
    if not is_english(found.get("language", ENGLISH)) and found["dataset_name"] not in DATASETS:
        found.setdefault("cleaner", "any")
    return found


def is_english(language: str) -> bool:
    """Whether a code, a tag such as "en-US", or a name means English."""
    return re.split(r"[-_]", language.strip().lower())[0] in (ENGLISH, "eng", "english")


_KINDS = {str: "string", int: "whole number", bool: "boolean (true or false)"}


def require_known(name: str, described: Mapping[str, Any], ann_path: str) -> None:
    """InputError for a ``name`` that is neither in the table nor ``described`` beside the annotation."""
    if name in DATASETS or described.get("dataset_name") == name:
        return
    path, other = Path(ann_path).parent / DESCRIPTION, described.get("dataset_name")
    own = f"{path} describes {other!r}" if other else f'a data set of your own: write {{"name": "{name}"}} into {path}'
    raise InputError(
        f"--dataset_name {name}: must be one of {', '.join(DATASETS)}{did_you_mean(name, DATASETS)}; {own}"
    )


def write_description(folder: Path, **facts: Any) -> None:
    """Write the dataset.json of a prepared data set; one that is there already may be the user's own and stays."""
    from modules.runtime.records import write_private

    path = folder / DESCRIPTION
    if not path.exists():
        write_private(path, json.dumps(facts, ensure_ascii=False, indent=2) + "\n")


def parse_contexts(text: str) -> tuple[str, ...]:
    """The kinds of context in a comma-separated list; InputError for another name."""
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    for name in names:
        if name not in CONTEXTS:
            raise InputError(f"--context {text[:60]}: {name[:40]!r} is none of {', '.join(CONTEXTS)}")
    return names
