"""Making a --feature_cache: seconds of the processor and page faults, and what an interruption costs.

"mapped" is how it was made at first: images decoded where the network runs, the file mapped into memory, and the
network's activations handed back to the system after every layer. "appended" is build_feature_cache: rows appended,
freed memory kept (modules/runtime/memory.py), images decoded by --workers processes, which are counted too. Each
is a process of its own, and they take turns. Then one is killed half-way and made again. Images are synthetic
radiographs, or those of a folder.

  python benchmarks/feature_cache.py --threads 1
  python benchmarks/feature_cache.py --threads 1 --rounds 1 --images FOLDER --out feature_cache.json
"""

import argparse
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import parser_of, prepare, save
from modules.runtime.errors import InputError, run_entry_point

MAPPED, APPENDED, DECODED = "mapped", "appended", "appended, decoded by processes"
FIGURES = ("user", "system", "faults")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=3)
    parser.set_defaults(threads=1)
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="folder of images; default: synthetic radiographs")
    add("--count", type=int, default=10_000, help="images, at most; 64 synthetic ones; default %(default)s")
    add("--visual_extractor", default="tf_efficientnet_lite0", help="with random weights; default %(default)s")
    add("--image_size", type=int, default=224, help="default %(default)s")
    add("--batch_size", type=int, default=16, help="default %(default)s")
    add("--workers", type=int, default=1, help="processes that decode; default %(default)s")
    return parser


def used() -> list[float]:
    """User and system seconds and page faults of this process and of those it has waited for."""
    own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return [getattr(own, name) + getattr(others, name) + 0.0 for name in ("ru_utime", "ru_stime", "ru_minflt")]


def make(kind: str, arguments: argparse.Namespace, names: list[str], folder: Path) -> None:
    """Make the features of the images ``names`` in ``folder`` and leave the figures beside them."""
    import numpy as np
    import torch

    from modules.data.feature_cache import build_feature_cache
    from modules.data.images import ImageFolder
    from modules.data.transforms import eval_transform
    from modules.layers.visual_extractor import VisualExtractor

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    extractor = VisualExtractor(arguments.visual_extractor, image_size=arguments.image_size, frozen=True)
    transform = eval_transform(arguments.image_size, extractor.mean, extractor.std)
    images, seen = ImageFolder(arguments.images), 0

    def count(module: torch.nn.Module, given: tuple) -> None:
        nonlocal seen
        seen += len(given[0])

    extractor.register_forward_pre_hook(count)
    before = used()
    if kind == MAPPED:
        shape = (len(names), extractor.patches_per_view, extractor.width)
        target = np.lib.format.open_memmap(folder / "mapped.npy", mode="w+", dtype=np.float32, shape=shape)
        with torch.inference_mode():
            for start in range(0, len(names), arguments.batch_size):
                part = names[start : start + arguments.batch_size]
                pixels = torch.stack([transform.pixels(images(name)) for name in part])
                patches, _, _ = extractor(transform.normalise(pixels).unsqueeze(1))
                target[start : start + len(part)] = patches.numpy()
        target.flush()
    else:
        build_feature_cache(
            folder,
            images,
            names,
            extractor=extractor,
            transform=transform,
            device=torch.device("cpu"),
            batch_size=arguments.batch_size,
            progress=lambda items, _: items,
            workers=arguments.workers if kind == DECODED else 0,
        )
    figures = dict(zip(FIGURES, (after - first for after, first in zip(used(), before, strict=True)), strict=True))
    (folder / "figures.json").write_text(json.dumps(figures | {"seen": seen}), encoding="utf-8")


def in_a_process(kind: str, arguments: argparse.Namespace, names: list[str], folder: Path, kill_at: int = 0) -> Any:
    """The figures of ``make`` in a process of its own; None where it is killed once its file has ``kill_at`` bytes."""
    folder.mkdir(mode=0o700, exist_ok=True)
    process = get_context("spawn").Process(target=make, args=(kind, arguments, names, folder))
    process.start()
    while kill_at and process.is_alive():
        if sum(path.stat().st_size for path in folder.glob(".*.partial")) >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return None
        time.sleep(0.01)
    process.join()
    if process.exitcode:
        raise InputError(f"{kind}: the process ended with status {process.exitcode}")
    return json.loads((folder / "figures.json").read_text(encoding="utf-8"))


def features_of(folder: Path) -> bytes:
    """The file that was made in ``folder``."""
    [file] = folder.glob("*.npy")
    return file.read_bytes()


def measure(arguments: argparse.Namespace, names: list[str], folder: Path) -> dict[str, Any]:
    """The figures of every kind in every round, and of a cache that was killed half-way and made again."""
    rounds: dict[str, list[dict[str, float]]] = {MAPPED: [], APPENDED: [], DECODED: []}
    for number in range(arguments.rounds):
        for kind, found in rounds.items():
            place = folder / f"{kind}{number}"
            found.append(in_a_process(kind, arguments, names, place))
            if (kind, number) != (APPENDED, 0):
                next(place.glob("*.npy")).unlink()
    whole, cut = features_of(folder / f"{APPENDED}0"), folder / "cut"
    in_a_process(DECODED, arguments, names, cut, kill_at=len(whole) // 2)
    again = in_a_process(DECODED, arguments, names, cut)
    return {"images": len(names), "kinds": rounds, "resumed": again | {"equal": features_of(cut) == whole}}


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    kinds, count = found["kinds"], found["images"]
    print(f"\n{count:,} images\n{'':<34}{'CPU s':>9}{'system':>9}{'faults an image':>17}{'CPU of mapped':>15}")
    for name, rows in kinds.items():
        total, system, faults = (
            statistics.median(pick(row) for row in rows)
            for pick in (lambda row: row["user"] + row["system"], lambda row: row["system"], lambda row: row["faults"])
        )
        ratio = statistics.median(
            (row["user"] + row["system"]) / (base["user"] + base["system"])
            for row, base in zip(rows, kinds[MAPPED], strict=True)
        )
        print(f"{name:<34}{total:>9.1f}{system:>9.1f}{faults / count:>17,.0f}{ratio:>15.2f}")
    resumed = found["resumed"]
    seconds = resumed["user"] + resumed["system"]
    print(
        f"killed half-way and made again: {resumed['seen']:,} of {count:,} images are looked at again in {seconds:.1f} "
        f"CPU s; the file is {'equal to the bit' if resumed['equal'] else 'ANOTHER'}"
    )


def main() -> None:
    """Measure, print, write the JSON file."""
    arguments = build_parser().parse_args()
    _, made_by = prepare(arguments, ("count", "image_size", "batch_size", "workers"))
    made_by["settings"]["images"] = "a folder" if arguments.images else "synthetic"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.images is None:
            from benchmarks.images import write_images

            arguments.images = folder / "images"
            arguments.images.mkdir()
            kind = {"format": "jpeg", "channels": "L", "size": 256}
            names = write_images(arguments.images, kind, min(arguments.count, 64))
        else:
            names = sorted(path.name for path in arguments.images.iterdir() if path.is_file())[: arguments.count]
        if not names:
            raise InputError(f"--images {arguments.images}: holds no image")
        found = measure(arguments, names, folder)
    report(found)
    save(arguments.out, {"benchmark": "feature_cache", **made_by, **found})


if __name__ == "__main__":
    run_entry_point(main)
