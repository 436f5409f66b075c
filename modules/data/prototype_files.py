"""Files of initial prototypes: safetensors with their provenance, and the published form (a torch tensor)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.runtime.errors import InputError
from modules.runtime.input_files import load_tensors, open_regular, open_safetensors
from modules.runtime.records import write_private

FORMAT = "ithn-prototypes-1"


def save_prototypes(path: str | Path, prototypes: Tensor, classes: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Write ``prototypes`` (C * n, width), class c in rows c * n onwards, with mode 0600: they derive from reports."""
    from safetensors.torch import save

    header = {"format": FORMAT, "classes": json.dumps(list(classes)), "metadata": json.dumps(metadata)}
    prototypes = prototypes.contiguous()
    write_private(path, save({"prototypes": prototypes}, header | {"sha256": _checksum(prototypes, header)}))


def load_prototypes(
    path: str | Path, classes: Sequence[str], *, num_protype: int, d_img_ebd: int, d_txt_ebd: int
) -> Tensor:
    """(C * num_protype, d_img_ebd + d_txt_ebd) float32, clusters in the order of ``classes``.

    A published file does not name its order, which is assumed to be that of ``classes``. InputError where the file is
    missing, damaged, holds anything but tensors, or has another size.
    """
    if not Path(path).is_file():
        raise InputError(
            f"--init_protypes_path {path}: no such file; scripts/build_prototypes.py makes one, and an "
            "empty name draws the prototypes at random"
        )
    try:
        with open_regular(path) as file:
            ours = file.read(9)[8:] == b"{"  # safetensors: eight bytes of length, then JSON
        tensor, own_classes = _read_ours(path) if ours else (load_tensors(path, "--init_protypes_path"), None)
    except InputError:
        raise
    except Exception as error:  # the readers raise whatever the damaged bytes lead them to
        raise InputError(
            f"--init_protypes_path {path}: damaged, or holds more than a tensor ({type(error).__name__}); "
            "it was not loaded"
        ) from error
    rows, width = len(classes) * num_protype, d_img_ebd + d_txt_ebd
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.shape != (rows, width):
        shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
        raise InputError(
            f"--init_protypes_path {path}: holds a {type(tensor).__name__}{shape}, but --num_cluster "
            f"{len(classes)} times --num_protype {num_protype} rows of --d_img_ebd {d_img_ebd} + "
            f"--d_txt_ebd {d_txt_ebd} make ({rows}, {width})"
        )
    tensor = tensor.detach().to(torch.float32)
    if not torch.isfinite(tensor).all():
        raise InputError(f"--init_protypes_path {path}: holds numbers that are not finite")
    if own_classes is None:
        return tensor
    if sorted(own_classes) != sorted(classes):
        raise InputError(
            f"--init_protypes_path {path}: its classes are {', '.join(map(str, own_classes))[:300]}; "
            f"expected {', '.join(classes)}"
        )
    order = [own_classes.index(name) for name in classes]
    return tensor.unflatten(0, (len(classes), num_protype))[order].flatten(0, 1)


def _read_ours(path: str | Path) -> tuple[Tensor, list[str]]:
    with open_safetensors(path, framework="pt") as file:
        tensor, header = file.get_tensor("prototypes"), file.metadata()
    checksum = header.pop("sha256", None)  # absent in files of earlier versions
    if checksum is not None and checksum != _checksum(tensor, header):
        raise ValueError("the content differs from its checksum")
    classes = json.loads(header["classes"])
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise TypeError("classes are not a list of names")
    return tensor, classes


def _checksum(tensor: Tensor, header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(header.items()))).encode())
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
