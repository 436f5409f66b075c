"""Writes the tar shards of modules/data/shards.py."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from modules.data.annotations import Study
from modules.data.images import ImageFolder, open_image
from modules.data.sample_order import ORDER, keyed_generator
from modules.data.shards import Shard
from modules.data.transforms import size_by_shorter_side
from modules.runtime.errors import InputError
from modules.runtime.records import write_private


@dataclass(frozen=True)
class Packing:
    """How shards are made: of about ``shard_bytes`` each, images smaller than ``resize`` (0: as they are)."""

    folder: Path
    images: ImageFolder
    shard_bytes: int
    resize: int
    seed: int


def write_split(
    packing: Packing,
    split: str,
    studies: Sequence[Study],
    negatives: Sequence[Sequence[str]],
    progress: Callable[[Iterable, str], Iterable],
) -> tuple[Shard, ...]:
    """Write the shards of a split; ``negatives`` are the paths of each record's negative images.

    Training records are dealt to shards at random, by ``seed``, as an epoch mixes only what it holds at a time;
    others keep their order.
    """
    import torch
    import webdataset

    rows = list(range(len(studies)))
    if split == "train":
        rows = torch.randperm(len(rows), generator=keyed_generator(packing.seed, ORDER)).tolist()
    shards: list[Shard] = []
    pending: list[int] = []
    buffer, writer = None, None

    def close() -> None:
        writer.close()
        content = buffer.getvalue()
        name, digest = f"{split}-{len(shards):06d}.tar", sha256(content).hexdigest()
        shards.append(Shard(name, len(content), digest, tuple(pending)))
        write_private(packing.folder / name, content)
        pending.clear()

    for row in progress(rows, f"shards of {split}"):
        if not pending:
            buffer = io.BytesIO()
            writer = webdataset.TarWriter(buffer, encoder=False, mtime=0)
        writer.write(_sample(packing, row, studies[row], negatives[row]))
        pending.append(row)
        if buffer.tell() >= packing.shard_bytes:
            close()
    if pending:
        close()
    return tuple(shards)


def _sample(packing: Packing, row: int, study: Study, negatives: Sequence[str]) -> dict[str, str | bytes]:
    """WebDataset's form: the row, every image once, and JSON that names them."""
    files, names = {}, {}
    for path in dict.fromkeys((*study.image_paths, *negatives)):
        try:
            suffix, content = packed_image(packing.images.locate(path), packing.resize)
        except InputError as error:
            raise InputError(f"split '{study.split}', study {study.id!r}: {error}") from error
        name = f"{len(files)}.{suffix}"
        files[name], names[name] = content, path
    about = {"id": study.id, "report": study.report, "split": study.split, "images": names}
    return {"__key__": f"{row:08d}", "json": json.dumps(about, ensure_ascii=False).encode(), **files}


def packed_image(path: str, resize: int) -> tuple[str, bytes]:
    """Suffix and bytes for the file at ``path``: its own for PNG and JPEG of no more than ``resize``, else a PNG.

    With ``resize`` the shorter side becomes that many pixels, as the training transform has it first.
    """
    image = open_image(path)
    content = Path(path).read_bytes()
    if resize and min(image.size) > resize:
        image = image.resize(size_by_shorter_side(*image.size, resize), Image.Resampling.BILINEAR)
    elif content.startswith(b"\x89PNG"):
        return "png", content
    elif content.startswith(b"\xff\xd8"):
        return "jpg", content
    packed = io.BytesIO()
    image.save(packed, format="PNG")
    return "png", packed.getvalue()
