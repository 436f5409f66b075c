"""The data sets, one literal table: everything that differs between them derives from it.

A further data set is one more entry of DATASETS. Torch-free, as --help reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataSpec:
    """What is particular to a data set; its key in DATASETS names it in flags, records and pages."""

    cleaner: str  # of its texts: a key of modules/data/tokenizers.py's CLEANERS
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


def data_title(dataset_name: str, ann_path: str, synthetic: bool) -> str:
    """What a run's data may be called in public; "" for data of one's own, which --dataset_name only says how to read.

    A data set of the table is taken for itself where the annotation lies in the folder of its name.
    """
    if synthetic:
        return "synthetic radiographs"
    spec = DATASETS.get(dataset_name)
    own_folder = Path(ann_path).parent.name.lower().replace("-", "_") == dataset_name
    return (spec.title or dataset_name) if spec is not None and own_folder else ""
