"""Images per second from file to normalised tensor: decoding in three ways, and --image_cache from the second epoch on.

"torchvision" is the usual pipeline for the published transform (Image.open, RGB, Resize, RandomCrop,
RandomHorizontalFlip, ToTensor, Normalize), "ours" what ReportDataset does without a cache. Both end with the same
tensors. "as bytes" stops before normalisation, which then takes place on the device, as in training. "JPEG draft" is
--jpeg_draft, whose tensors differ slightly. The images are synthetic radiographs; one process does everything, so that
the rates are those of one core. Those of W x H pixels have noise that makes JPEG files as large as MIMIC-CXR-JPG's, 1.5
MB for 2,500 x 3,000 pixels.

  python benchmarks/images.py --threads 1
  python benchmarks/images.py --size 512 1024 --format png jpeg --channels L RGB --out images.json
  python benchmarks/images.py --size 2500x3000 --format jpeg --images 4 --threads 1 --clock cpu
"""

import argparse
import collections
import itertools
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import in_rounds, parser_of, prepare, print_header, print_row, save
from modules.runtime.errors import run_entry_point

VARIED = ("format", "channels", "size")
CROP, RESIZE = 224, 256
DRAWN = 512  # side at which images of W x H are drawn, before they are enlarged: drawing takes seconds
NOISE = 1.7  # standard deviation in grey levels of these
QUALITY = 95  # of JPEG files, as MIMIC-CXR-JPG's


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=5)
    add = parser.add_argument
    add("--size", type=_size, nargs="+", default=[256, 512, 1024], help="sides, or WxH; default 256 512 1024")
    add("--format", nargs="+", default=["png"], choices=("png", "jpeg"), help="default png")
    add("--channels", nargs="+", default=["L"], choices=("L", "RGB"), help="grey or colour files; default L")
    add("--images", type=int, default=16, help="different images of each kind; default %(default)s")
    return parser


def _size(text: str) -> int | str:
    """A side as a number, or the text WxH; ArgumentTypeError for anything else."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of pixels, or two as in 2500x3000")
    return text if "x" in text else int(text)


def write_images(folder: Path, kind: dict[str, Any], count: int) -> list[str]:
    """Files of ``count`` synthetic radiographs; RGB ones hold three equal channels, as converted radiographs do."""
    import numpy as np
    from PIL import Image

    from scripts.synthetic.dataset import plan_studies
    from scripts.synthetic.render import render_study

    names, noise = [], np.random.default_rng(0)
    side = kind["size"] if isinstance(kind["size"], int) else DRAWN
    for study in plan_studies(0, -(-count // 2)):
        for view, values in enumerate(render_study(study.findings, (0, study.index), side).values()):
            image = Image.fromarray(values)
            if side != kind["size"]:
                image = image.resize(tuple(map(int, kind["size"].split("x"))), Image.Resampling.BICUBIC)
                grain = noise.normal(0, NOISE, image.size[::-1])
                image = Image.fromarray(np.clip(image + grain, 0, 255).astype(np.uint8))
            names.append(f"{study.index}-{view}.{kind['format']}")
            image.convert(kind["channels"]).save(folder / names[-1], quality=QUALITY)
    return names[:count]


def pipelines(folder: Path, names: list[str]) -> dict[str, Callable[[], Iterable]]:
    """What is timed, by name: each makes the training tensors of all images, one after the other."""
    from PIL import Image
    from torchvision import transforms

    from modules.data.image_cache import build_image_cache
    from modules.data.images import ImageFolder
    from modules.data.sample_order import keyed_generator
    from modules.data.transforms import train_transform
    from modules.layers.visual_extractor import IMAGENET_MEAN, IMAGENET_STD

    usual = transforms.Compose(
        [
            transforms.Resize(RESIZE),
            transforms.RandomCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    images, ours = ImageFolder(folder), train_transform(CROP, IMAGENET_MEAN, IMAGENET_STD, resize=RESIZE)
    (folder / "cache").mkdir(mode=0o700)

    def build():
        for old in (folder / "cache").glob("*.bin"):
            old.unlink()
        return build_image_cache(
            folder / "cache", images, names, transform=ours, workers=0, progress=lambda items, _: items
        )

    cache = build()

    def all_of(read: Callable[[str], Any], finish: Callable) -> Callable[[], Iterable]:
        return lambda: (finish(read(name), keyed_generator(0, number)) for number, name in enumerate(names))

    works = {
        "torchvision": lambda: (usual(Image.open(folder / name).convert("RGB")) for name in names),
        "ours, decoding": all_of(images, ours),
        "ours, decoding, as bytes": all_of(images, ours.pixels),
        "image cache": all_of(cache, ours),
        "image cache, as bytes": all_of(cache, ours.pixels),
        "making the image cache": lambda: build().rows,
    }
    if names[0].endswith("jpeg"):
        drafts = ImageFolder(folder, draft=ours.resized_size)
        works |= {"JPEG draft": all_of(drafts, ours), "JPEG draft, as bytes": all_of(drafts, ours.pixels)}
    return works


def measure(kind: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each pipeline, and whether cache and decoding gave the same tensors to the bit."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        names = write_images(Path(folder), kind, arguments.images)
        works = pipelines(Path(folder), names)
        same = all(torch.equal(a, b) for a, b in zip(works["ours, decoding"](), works["image cache"](), strict=True))
        # Each tensor is dropped at once, as a batch takes it in.
        consumed = {name: lambda work=work: collections.deque(work(), maxlen=0) for name, work in works.items()}
        seconds = in_rounds(consumed, arguments.rounds, arguments.clock, "cpu")
        result = {"images": arguments.images, "seconds": seconds, "bit_equal": same}
        result["bytes"] = sum((Path(folder) / name).stat().st_size for name in names) / len(names)
        if "JPEG draft, as bytes" in works:
            pairs = zip(works["ours, decoding, as bytes"](), works["JPEG draft, as bytes"](), strict=True)
            levels = [(whole.int() - draft.int()).abs().float().mean().item() for whole, draft in pairs]
            result["draft_grey_levels"] = statistics.mean(levels)
    return kind | result


def main() -> None:
    """Measure every kind of file, print the tables, write the JSON file."""
    arguments = build_parser().parse_args()
    _, made_by = prepare(arguments, ("images",))
    results = []
    for values in itertools.product(*(getattr(arguments, name) for name in VARIED)):
        result = measure(dict(zip(VARIED, values, strict=True)), arguments)
        results.append(result)
        print_header(
            f"{values[0]}, {values[1]}, {values[2]} px; cache and decoding "
            + ("give the same bits" if result["bit_equal"] else "DIFFER"),
            "images/s",
            "x torchv.",
            "x ours",
        )
        base, own = (statistics.median(result["seconds"][name]) for name in ("torchvision", "ours, decoding"))
        for name, seconds in result["seconds"].items():
            median = statistics.median(seconds)
            print_row(name, seconds, f"{arguments.images / median:,.0f}", f"{base / median:.1f}", f"{own / median:.1f}")
        save(arguments.out, {"benchmark": "images", **made_by, "results": results})


if __name__ == "__main__":
    run_entry_point(main)
