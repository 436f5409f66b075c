"""DICOM radiographs as 8-bit images. Only the elements that say how pixels look are read; the rest of the header,
where names and dates stand, is neither kept nor quoted in an error.
"""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from modules.runtime.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = "1.2.840.10008.1.2.1.99"
_SHAPE = ["Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"]
_LOOK = [
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PlanarConfiguration",
    "RescaleSlope",
    "RescaleIntercept",
    "ModalityLUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "VOILUTSequence",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "PixelData",
]


def is_dicom(beginning: bytes) -> bool:
    """Whether a file that begins with these (at least 132) bytes is DICOM."""
    return beginning[128:132] == b"DICM"


def dicom_shape(path: str | Path) -> tuple[int, int, int]:
    """Columns, rows and samples per pixel by the header; ImageError where deflated, and whatever pydicom raises."""
    import pydicom

    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"):
        _require_not_deflated(path)
        header = pydicom.dcmread(path, specific_tags=_SHAPE, stop_before_pixels=True)
        return int(header.Columns), int(header.Rows), int(header.get("SamplesPerPixel") or 1)


def load_dicom(path: str | Path, max_pixels: int) -> Image.Image:
    """One radiograph as "L" (or "RGB", for scans), bright where film is: modality LUT, then VOI LUT or window.

    Without a window the values are stretched from minimum to maximum, padding left out. MONOCHROME1 is inverted.
    ImageError for files of several frames, too many pixels, no pixels, or an encoding that no installed package reads.
    """
    import pydicom

    # Both would repeat header values, such as a birth date of a wrong form.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with warnings.catch_warnings(action="ignore"):
        try:
            syntax = _require_not_deflated(path)
            header = pydicom.dcmread(path, specific_tags=_SHAPE, stop_before_pixels=True)
            _check_shape(header, path, max_pixels)
            return _decode(pydicom.dcmread(path, specific_tags=_SHAPE + _LOOK), syntax, path)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # broken headers raise almost anything, and may quote themselves
            raise ImageError(f"image {str(path)!r}: its DICOM cannot be read ({type(error).__name__})") from None


def _require_not_deflated(path: str | Path) -> str:
    """The transfer syntax."""
    import pydicom

    syntax = str(pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID", ""))
    if syntax == _DEFLATED:  # would be inflated whole, to any size, before its shape is known
        raise ImageError(f"image {str(path)!r}: deflated DICOM is not read; convert it to another encoding")
    return syntax


def _check_shape(header: "Dataset", path: str | Path, max_pixels: int) -> None:
    rows, columns, frames = (int(header.get(name) or default) for name, default in zip(_SHAPE, (0, 0, 1), strict=False))
    if frames > 1:
        raise ImageError(f"image {str(path)!r}: DICOM of {frames} frames; one radiograph a file is read")
    if rows * columns == 0:
        raise ImageError(f"image {str(path)!r}: DICOM without an image")
    if rows * columns > max_pixels:
        raise ImageError(
            f"image {str(path)!r} has {columns} x {rows} pixels, more than max_pixels, {max_pixels}",
            "image is too large",
        )


def _decode(data: "Dataset", syntax: str, path: str | Path) -> Image.Image:
    from pydicom.pixels import get_decoder

    if "PixelData" not in data:
        raise ImageError(f"image {str(path)!r}: DICOM without an image")
    if data.file_meta.TransferSyntaxUID.is_compressed and not get_decoder(syntax).is_available:
        raise ImageError(f"image {str(path)!r}: {_needs_package(data)}")
    try:
        values = data.pixel_array  # (H, W) integers, or (H, W, 3)
    except Exception as error:
        if data.file_meta.TransferSyntaxUID.is_compressed:
            raise ImageError(
                f"image {str(path)!r}: damaged, or of a kind of {data.file_meta.TransferSyntaxUID.name} "
                "that no installed package decodes; requirements/dicom.txt brings more"
            ) from error
        raise
    if values.ndim == 3:
        return Image.fromarray(values.astype(np.uint8))
    return Image.fromarray(_shown(values, data))


def _needs_package(data: "Dataset") -> str:
    return (
        f"DICOM encoded as {data.file_meta.TransferSyntaxUID.name}, which needs a package more: "
        "pip install -r requirements/dicom.txt"
    )


def _shown(values: np.ndarray, data: "Dataset") -> np.ndarray:
    """(H, W) uint8 of stored values, as PS3.3 C.7.6.3 and C.11 have them displayed."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    padding = _padding(values, data)
    modality = apply_modality_lut(values, data)
    if data.get("VOILUTSequence"):
        shown = apply_voi(modality.astype(np.int64), data)
        low, high = 0, 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
    elif "WindowCenter" in data and "WindowWidth" in data:
        shown = apply_windowing(modality, data)
        low, high = apply_windowing(np.array([-1e12, 1e12]), data)  # what lies below and above the window becomes
    else:
        shown = modality
        inside = modality[~padding] if not padding.all() else modality
        low, high = inside.min(), inside.max()
    span = float(high) - float(low)
    bytes_ = np.rint(np.clip((shown.astype(np.float64) - float(low)) * (255 / span if span else 0), 0, 255))
    if data.PhotometricInterpretation == "MONOCHROME1":
        bytes_ = 255 - bytes_
    bytes_[padding] = 0
    return bytes_.astype(np.uint8)


def _padding(values: np.ndarray, data: "Dataset") -> np.ndarray:
    """(H, W) bool: what lies outside the detector, by PS3.3 C.7.5.1.1.2."""
    if "PixelPaddingValue" not in data:
        return np.zeros(values.shape, bool)
    ends = sorted((int(data.PixelPaddingValue), int(data.get("PixelPaddingRangeLimit", data.PixelPaddingValue))))
    return (values >= ends[0]) & (values <= ends[1])
