"""Groups the image files named on the command line into studies."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.runtime.errors import InputError
from modules.runtime.hub import HUB
from modules.runtime.input_files import open_regular

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".tif", ".tiff", ".bmp", ".gif", ".webp")
SETTINGS = "config.json"  # of a folder of scripts/export.py


@dataclass(frozen=True)
class StudyFiles:
    """A study: its name (the file or folder as given, or an id) and its images in order; of its context the images of
    the study before, and the ids of its texts with the kind of each.
    """

    name: str
    paths: tuple[Path, ...]
    prior: tuple[Path, ...] = ()
    texts: tuple[Sequence[int], Sequence[int]] = ((), ())


def find_studies(paths: Sequence[str], group: str) -> list[StudyFiles]:
    """The studies in files and folders, sub-folders included: in the order given, within folders by name.

    ``group``: "none", every image is a study; "folder", the images of a folder are the views of one study; "all",
    all images together are one. InputError for a path that does not exist or has no image.
    """
    files = [file for path in paths for file in _images(Path(path))]
    files = list(dict.fromkeys(files))
    if group == "none":
        return [StudyFiles(str(file), (file,)) for file in files]
    if group == "all":
        return [StudyFiles(str(files[0].parent), tuple(files))]
    folders: dict[Path, list[Path]] = {}
    for file in files:
        folders.setdefault(file.parent, []).append(file)
    return [StudyFiles(str(folder), tuple(found)) for folder, found in folders.items()]


def images_in(root: str, images: Sequence[str], where: str, follow_links: bool = False) -> tuple[Path, ...]:
    """The paths of ``images`` in the folder ``root``; InputError, which begins with ``where``, for one that leaves it,
    also by a link unless ``follow_links``.
    """
    inside, place = os.path.join(os.path.realpath(root), ""), os.path.normpath if follow_links else os.path.realpath
    for image in images:
        if not place(os.path.join(inside, image)).startswith(inside):
            raise InputError(f"{where}: {Path(root, image)} is not in the folder of images {root}")
    return tuple(Path(root, image) for image in images)


def _images(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{str(path)!r}: no such file or folder; give images (PNG, JPEG, DICOM) or folders of them")
    if not path.is_dir():
        raise InputError(f"{str(path)!r}: neither a regular file nor a folder; pipes and devices are not read")
    found = []
    for folder, below, names in os.walk(path):
        below.sort(key=_by_number)
        found += [Path(folder, name) for name in sorted(names, key=_by_number) if _is_image(Path(folder, name))]
    if not found:
        raise InputError(f"{str(path)!r}: no image in this folder (looked for {' '.join(SUFFIXES)} and DICOM)")
    return found


def _by_number(name: str) -> tuple:
    """Sort key that puts 2.png before 10.png."""
    stem = Path(name).stem
    return (0, int(stem), name) if stem.isascii() and stem.isdigit() else (1, 0, name)


def _is_image(path: Path) -> bool:
    if path.name.startswith(".") or path.name == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    # DICOM files often have no suffix, or the end of their UID as one.
    from modules.data.images import is_dicom

    try:
        with open_regular(path) as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def checkpoint_name(path: str) -> str:
    """How results name a checkpoint: by its file and folder, without the path to them."""
    return str(Path(*Path(path).absolute().parts[-2:]))


def instead_of_folder(folder: str | Path) -> str:
    """What to give where a folder without an exported model, such as a run's, was named as one."""
    return f"{folder} is a folder; give {Path(folder) / 'model_best.pth'}, or a folder that scripts/export.py wrote"


def require_checkpoint(path: str) -> None:
    """InputError where ``--load`` names no file: checked before torch is imported, which takes seconds."""
    if not Path(path).is_file():
        raise InputError(f"--load {path}: no such file; it takes a checkpoint of main_train.py, such as model_best.pth")


def require_model(path: str) -> None:
    """As ``require_checkpoint``, where a folder of scripts/export.py or hf://owner/name on the hub will do as well.

    InputError for anything else.
    """
    if path.startswith(HUB) or (Path(path) / SETTINGS).is_file():
        return
    if Path(path).is_dir():
        raise InputError(f"--load: {instead_of_folder(path)}")
    require_checkpoint(path)
