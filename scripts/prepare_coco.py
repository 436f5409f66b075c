"""Make data/coco/annotation.json of COCO's caption files and Karpathy's split.

  --captions  captions_train2014.json captions_val2014.json, from annotations_trainval2014.zip; those of 2017 work too
  --karpathy  dataset_coco.json, from Karpathy's caption_datasets.zip; its "restval" images go into train

The images stay where they are: their paths start with train2014/ and val2014/ (train2017/, val2017/), the folders of
COCO's own archives, below main_train.py's --image_dir. Each record has all captions of its image.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.dataset_specs import write_description
from modules.flags import Parser
from modules.prepare.coco import read_captions, read_karpathy
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import write_annotation
from modules.runtime.run_log import Bar

PUBLISHED = {"train": 113287, "val": 5000, "test": 5000}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--captions", type=Path, nargs="+", required=True, metavar="JSON", help="COCO's caption files, train and val"
    )
    parser.add_argument("--karpathy", type=Path, required=True, metavar="JSON", help="dataset_coco.json")
    parser.add_argument(
        "--out", type=Path, default=Path("data/coco"), metavar="DIR", help="output folder (default %(default)s)"
    )
    return parser


def gather(paths: list[Path]) -> dict[int, tuple[str, list[str]]]:
    """Image id -> (image path, captions) from all caption files; InputError for an image in two of them."""
    images: dict[int, tuple[str, list[str]]] = {}
    for path in Bar(paths, "caption files"):
        found = read_captions(path)
        twice = next(iter(images.keys() & found.keys()), None)
        if twice is not None:
            raise InputError(
                f"--captions {path}: image {twice} is in another file too, as {images[twice][0]}; "
                "give the two files of one year"
            )
        images |= found
    return images


def build_annotation(splits: dict[str, list[int]], images: dict[int, tuple[str, list[str]]]) -> dict[str, list[dict]]:
    """Records by split; InputError for an image of the split without captions."""
    annotation: dict[str, list[dict]] = {}
    for split, ids in splits.items():
        annotation[split] = []
        for image in ids:
            path, captions = images.get(image, ("", []))
            if not captions:
                raise InputError(
                    f"--captions: no caption of image {image}, which --karpathy has in {split}; give both "
                    "files, captions_train2014.json and captions_val2014.json"
                )
            annotation[split].append(
                {"id": image, "coco_id": image, "split": split, "image_path": [path], "captions": captions}
            )
    return annotation


def main() -> None:
    """Read, write annotation.json, and print the counts next to the published ones."""
    arguments = build_parser().parse_args()
    splits = read_karpathy(arguments.karpathy)
    annotation = build_annotation(splits, gather(arguments.captions))
    out = arguments.out / "annotation.json"
    done = write_annotation(out, annotation)
    write_description(
        arguments.out, name="coco", language="en", licence="captions CC BY 4.0, images by their owners' terms"
    )
    print(f"{'':<8}{'images':>9}{'published':>11}{'captions':>10}")
    for split, records in annotation.items():
        captions = sum(len(record["captions"]) for record in records)
        print(f"{split:<8}{len(records):>9,}{PUBLISHED[split]:>11,}{captions:>10,}")
    if {split: len(records) for split, records in annotation.items()} != PUBLISHED:
        print("note: these are not the published numbers: scores cannot be compared with the literature's")
    print(f"{done}: {out}")


if __name__ == "__main__":
    run_entry_point(main)
