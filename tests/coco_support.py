"""A tiny data set in COCO's form: drawn images of coloured shapes, captions that name them, detections in HDF5."""

import json
from pathlib import Path

import numpy as np

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 40)}
SHAPES = ("square", "bar", "dot")
WORDINGS = (
    "A {c} {s} on a grey wall.",
    "The {s} is {c}, isn't it?",
    "there's a {c} {s}",
    "a {c}-coloured {s}; grey wall",
)
SIZES = {"train": 10, "val": 3, "test": 4}


def coco_records() -> dict[str, list[dict]]:
    """annotation.json's content: image ids count from 101, an image of the test split has a fifth caption."""
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    splits, number = {}, 101
    for split, size in SIZES.items():
        splits[split] = []
        for row in range(size):
            colour, shape = kinds[(number - 101) % len(kinds)]
            captions = [wording.format(c=colour, s=shape) for wording in WORDINGS]
            if split == "test" and row == 0:
                captions.append("nothing else to see")
            splits[split].append({"id": number, "image_path": [f"val2014/{number:012d}.jpg"], "captions": captions})
            number += 1
    return splits


def make_coco(folder: Path) -> Path:
    """Write annotation.json and images/ into ``folder``; returns it."""
    from PIL import Image

    splits = coco_records()
    (folder / "images" / "val2014").mkdir(parents=True)
    for record in (record for records in splits.values() for record in records):
        pixels = np.full((48, 64, 3), 128, np.uint8)
        colour = next(value for name, value in COLOURS.items() if name in record["captions"][0])
        pixels[12:36, 12:36] = colour
        Image.fromarray(pixels).save(folder / "images" / record["image_path"][0])
    (folder / "annotation.json").write_text(json.dumps(splits))
    return folder


def make_detections(path: Path, *, width: int = 6, boxes=lambda image: 1 + image % 4, leave_out=()) -> Path:
    """Write ``<image id>_features`` (n, width) for every image of ``coco_records``, with boxes beside them."""
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for record in (record for records in coco_records().values() for record in records):
            image = record["id"]
            if image not in leave_out:
                features = rng.random((boxes(image), width), dtype=np.float32) + 0.1
                file.create_dataset(f"{image}_features", data=features)
                file.create_dataset(f"{image}_boxes", data=np.zeros((boxes(image), 4), np.float32))
    return path


def make_labels(path: Path) -> Path:
    """Write XProNet's 14 labels for every image of ``coco_records``: the first class, or No Finding."""
    from modules.labels.rules import CLASSES

    rows = [",".join(["id", *CLASSES])]
    for record in (record for records in coco_records().values() for record in records):
        labels = ["1" if number == record["id"] % 2 else "0" for number in range(len(CLASSES))]
        rows.append(",".join([str(record["id"]), *labels]))
    path.write_text("\n".join(rows) + "\n")
    return path
