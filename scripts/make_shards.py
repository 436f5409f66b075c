"""Pack a data set's images into tar shards (WebDataset), for storage on which many small files are slow.

  python scripts/make_shards.py --ann_path data/mimic_cxr/annotation.json --image_dir data/mimic_cxr/images/ \\
      --negative_index data/mimic_cxr/negatives.safetensors --out data/mimic_cxr/shards --resize 256
  python main_train.py --ann_path data/mimic_cxr/annotation.json --dataset_name mimic_cxr \\
      --shards data/mimic_cxr/shards --negative_index data/mimic_cxr/negatives.safetensors

Each record's shard also holds the images of its hard negatives. Shards can then lie in a folder, or at an address that
fsspec reads (https://, s3://, gs://). They are patients' data.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.data.annotations import Annotation, read_annotation
from modules.flags import Parser
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point

if TYPE_CHECKING:
    import numpy as np


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("--ann_path", required=True, metavar="JSON", help="the annotation")
    parser.add_argument("--image_dir", required=True, metavar="FOLDER", help="where its image paths start")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new or empty folder for the shards")
    parser.add_argument("--negative_index", metavar="FILE", help="put the images of these hard negatives in as well")
    parser.add_argument(
        "--num_neighbours",
        type=int,
        default=1,
        metavar="K",
        help="hard negatives of each record; --strategy mochi draws from several (default: %(default)s)",
    )
    parser.add_argument(
        "--resize",
        type=int,
        default=0,
        metavar="PX",
        help="make the shorter side of training images this long; 256 suits training at 224; 0: leave images as they "
        "are (default: %(default)s)",
    )
    parser.add_argument(
        "--shard_mb",
        type=float,
        default=32,
        metavar="MB",
        help="size of a shard; each process that reads images holds up to sixteen in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=9233,
        metavar="INT",
        help="deals the training records to shards (default: %(default)s)",
    )
    return parser


def main() -> None:
    """Write the shards, and last the manifest: without it there are none."""
    check_python()
    arguments = build_parser().parse_args()
    if arguments.num_neighbours < 1:
        raise InputError(f"--num_neighbours {arguments.num_neighbours}: must be at least 1")
    if not 0 < arguments.shard_mb < 2**20:
        raise InputError(f"--shard_mb {arguments.shard_mb:g}: must be a size in MiB")
    if arguments.resize < 0:
        raise InputError(f"--resize {arguments.resize}: must be a number of pixels, or 0")
    annotation = read_annotation(arguments.ann_path)
    out = Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: is there already; name a new or empty folder")

    from modules.data.images import ImageFolder
    from modules.data.shards import MANIFEST, Manifest, Packing, neighbours_sha256, require_library, write_split
    from modules.runtime.records import private_folder, write_private
    from modules.runtime.run_log import Bar

    require_library()
    neighbours = read_neighbours(annotation, arguments.negative_index, arguments.num_neighbours)
    packing = Packing(
        private_folder(out),
        ImageFolder(arguments.image_dir),
        int(arguments.shard_mb * 2**20),
        arguments.resize,
        arguments.seed,
    )
    splits = {}
    for split, studies in annotation.splits.items():
        negatives = [study.negative_image_paths for study in studies]
        if neighbours is not None:
            negatives = (
                [[path for row in rows if row >= 0 for path in studies[row].image_paths] for rows in neighbours]
                if split == "train"
                else [[] for _ in studies]
            )
        splits[split] = write_split(packing, split, studies, negatives, Bar)
    name = "annotation" if neighbours is None else neighbours_sha256(neighbours, arguments.num_neighbours)
    manifest = Manifest(annotation.sha256, name, arguments.num_neighbours, splits, arguments.resize)
    write_private(out / MANIFEST, manifest.text())
    size = sum(shard.size for shards in splits.values() for shard in shards)
    print(f"{sum(map(len, splits.values()))} shards, {size / 2**20:.1f} MiB, in {out}")


def read_neighbours(annotation: Annotation, path: str | None, count: int) -> "np.ndarray | None":
    """The first ``count`` neighbours (N, count) of each training record, or None without an index.

    InputError where the index has fewer.
    """
    if path is None:
        return None
    from modules.mining.index import HardNegativeIndex

    index = HardNegativeIndex.load(path)
    index.check(annotation)
    if index.neighbours.shape[1] < count:
        raise InputError(f"--num_neighbours {count}: {path} holds {index.neighbours.shape[1]} for each record")
    return index.neighbours[:, :count]


if __name__ == "__main__":
    run_entry_point(main)
