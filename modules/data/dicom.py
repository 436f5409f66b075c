"""DICOM radiographs, checked against the header before anything is decoded, and read as 8-bit images.

Only the elements that describe pixels are read: the rest of the header, which names patients, is neither kept nor
quoted in an error. How stored values look on a screen is decided in modules/data/dicom_display.py.
"""

import logging
import struct
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from modules.data.bit_depths import BYTES_PER_PIXEL
from modules.data.codestreams import is_jpeg2000, read_codestream
from modules.data.dicom_display import show_colour, show_grey, show_palette
from modules.runtime.errors import ImageError

if TYPE_CHECKING:
    from pydicom import Dataset

_ELEMENTS = """
    Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation PlanarConfiguration
    BitsAllocated BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit
    RescaleSlope RescaleIntercept ModalityLUTSequence WindowCenter WindowWidth VOILUTFunction VOILUTSequence
    RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
    RedPaletteColorLookupTableData GreenPaletteColorLookupTableData BluePaletteColorLookupTableData
    SegmentedRedPaletteColorLookupTableData SegmentedGreenPaletteColorLookupTableData
    SegmentedBluePaletteColorLookupTableData
""".split()
_PIXEL_DATA, _UNDEFINED = 0x7FE00010, 0xFFFFFFFF
_MAX_HEADER = 2 * 2**20  # bytes that are read of it: three palettes of 16 bits and some lookup tables take half
_SLACK = 2**20  # bytes of encoded pixels beyond twice what they decode to
_JPEG = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}  # baseline and extended
_RLE = "1.2.840.10008.1.2.5"


class _Refused(Exception):
    """A reason that may be shown: it quotes nothing of the header."""


class _Header(NamedTuple):
    data: "Dataset"
    value_type: str | None  # of the pixels' element; None where the file does not state types
    pixels_at: int  # offset of their value in the file
    length: int  # in bytes; _UNDEFINED: encoded frames


def dicom_shape(file: BinaryIO) -> tuple[int, int, int]:
    """Columns, rows, and the most channels that ``load_dicom`` gives, by the header; raises whatever pydicom raises."""
    with _silence():
        data = _read_header(file).data
        grey = int(data.get("SamplesPerPixel") or 1) == 1 and not _photometric(data).startswith("PALETTE")
        return int(data.Columns), int(data.Rows), 1 if grey else 3


def load_dicom(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    """One radiograph as "L" (or "RGB", for scans and palettes), bright where film is.

    ImageError, which calls the file ``name``, where it has several frames, too many pixels, none, or an encoding that
    no installed package reads. Memory stays within a small multiple of the decoded size, whatever the file announces.
    """
    with _silence():
        try:
            header = _read_header(file)
            _check_shape(header.data, name, max_pixels)
            return _image(file, header)
        except (ImageError, MemoryError):
            raise
        except _Refused as reason:
            raise ImageError(f"image {name!r}: {reason}") from None
        except Exception as error:  # broken headers raise almost anything, and may quote themselves
            raise ImageError(f"image {name!r}: its DICOM cannot be read ({type(error).__name__})") from None


def _silence() -> warnings.catch_warnings:
    # Both would repeat header values, such as a birth date of a wrong form.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    return warnings.catch_warnings(action="ignore")


# ---- the header


class _HeaderReader:
    """A file as pydicom's header reader sees it: long values may be skipped, but little of it is read."""

    def __init__(self, file: BinaryIO):
        self._file, self._left = file, _MAX_HEADER
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size < 0:  # only deflated files are read whole, and would be inflated to any size
            raise _Refused("deflated DICOM is not read; convert it to another encoding")
        self._left -= size
        if self._left < 0:
            raise _Refused(f"its DICOM header is longer than {_MAX_HEADER} bytes")
        return self._file.read(size)


def _read_header(file: BinaryIO) -> _Header:
    from pydicom.filereader import read_partial
    from pydicom.tag import Tag
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    pixels: list[tuple[str | None, int]] = []

    def at_pixels(tag: int, value_type: str | None, length: int) -> bool:
        if tag == _PIXEL_DATA:
            pixels.append((value_type, length))
        return tag == _PIXEL_DATA

    file.seek(0)
    tags = [Tag(name) for name in _ELEMENTS]
    data = read_partial(_HeaderReader(file), stop_when=at_pixels, force=True, specific_tags=tags)
    if not pixels:
        raise _Refused("DICOM without an image")
    [(value_type, length)] = pixels
    if not data.file_meta.get("TransferSyntaxUID"):
        implicit, little = data.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        data.file_meta.TransferSyntaxUID = syntax
    return _Header(data, value_type, file.tell() + (12 if value_type else 8), length)


def _check_shape(data: "Dataset", name: str, max_pixels: int) -> None:
    rows, columns, frames = (int(data.get(key) or 0) for key in ("Rows", "Columns", "NumberOfFrames"))
    if frames > 1:
        raise _Refused(f"DICOM of {frames} frames; one radiograph a file is read")
    if rows * columns == 0:
        raise _Refused("DICOM without an image")
    if rows * columns > max_pixels:
        raise ImageError(
            f"image {name!r} has {columns} x {rows} pixels, more than max_pixels, {max_pixels}", "image is too large"
        )
    data.NumberOfFrames = 1
    data.SamplesPerPixel = int(data.get("SamplesPerPixel") or 1)
    _fill_in(data)
    size = rows * columns * data.SamplesPerPixel * -(-int(data.BitsAllocated) // 8)
    if size > BYTES_PER_PIXEL * max_pixels:
        raise ImageError(
            f"image {name!r} has {size} bytes of pixels, more than {BYTES_PER_PIXEL} for each of max_pixels, "
            f"{max_pixels}",
            "image is too large",
        )
    if data.SamplesPerPixel not in (1, 3) or data.BitsAllocated not in (1, 8, 16, 32):
        raise _Refused(
            f"DICOM of {data.SamplesPerPixel} x {data.BitsAllocated} bits a pixel; 1 or 3 x 8, 16 or 32 are read"
        )


def _fill_in(data: "Dataset") -> None:
    """Give what decoders need and headers leave out the value that is meant, and capitals to what is not written so."""
    grey = data.SamplesPerPixel == 1
    colours = "YBR_FULL_422" if data.file_meta.TransferSyntaxUID in _JPEG else "RGB"
    data.PhotometricInterpretation = _photometric(data) or ("MONOCHROME2" if grey else colours)
    meant = {"BitsStored": data.get("BitsAllocated"), "PixelRepresentation": 0} | (
        {} if grey else {"PlanarConfiguration": 0}
    )
    for name, value in meant.items():
        if data.get(name) in (None, ""):
            setattr(data, name, value)
    if data.get("HighBit") in (None, ""):
        data.HighBit = data.BitsStored - 1


def _photometric(data: "Dataset") -> str:
    return str(data.get("PhotometricInterpretation") or "").strip().upper()


# ---- the pixels


def _image(file: BinaryIO, header: _Header) -> Image.Image:
    data = header.data
    stated, grey = _photometric(data), data.SamplesPerPixel == 1
    values, colour_space = _decode(file, header)
    if values.ndim == 3:
        image = Image.fromarray(show_colour(values, colour_space))
        if not grey:
            return image
        values = np.asarray(image.convert("L"))  # a colour JPEG in a file that says it is grey
    elif stated.startswith("PALETTE"):
        return Image.fromarray(show_palette(values, data))
    data.PhotometricInterpretation = "MONOCHROME1" if stated == "MONOCHROME1" else "MONOCHROME2"
    return Image.fromarray(show_grey(values, data))


def _decode(file: BinaryIO, header: _Header) -> tuple[np.ndarray, str]:
    """Stored values (H, W) or (H, W, 3), and the colour space of the latter."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder

    data, syntax = header.data, header.data.file_meta.TransferSyntaxUID
    decoded = -(-data.Rows * data.Columns * data.SamplesPerPixel * data.BitsAllocated // 8)
    file.seek(header.pixels_at)
    if header.length != _UNDEFINED:
        return _decode_plain(file.read(min(header.length, decoded + decoded % 2)), header)
    content = file.read(2 * decoded + _SLACK)
    frame = get_frame(content, 0, number_of_frames=1)
    if syntax == _RLE:
        return _used_bits(_unpack_rle(frame, data), data), _photometric(data)
    if not syntax.is_compressed:
        data.file_meta.TransferSyntaxUID = syntax = _guess_syntax(frame)
    if not get_decoder(syntax).is_available:
        raise _Refused(
            f"DICOM encoded as {syntax.name}, which needs one more package: pip install -r requirements/dicom.txt"
        )
    _follow_codestream(frame, data)
    data.PixelData = content
    try:
        values, found = get_decoder(syntax).as_array(data, index=0, raw=True)
    except Exception as error:
        raise _Refused(
            f"damaged, or of a kind of {syntax.name} that no installed package decodes; "
            "requirements/dicom.txt adds decoders"
        ) from error
    return values, str(found["photometric_interpretation"])


def _decode_plain(content: bytes, header: _Header) -> tuple[np.ndarray, str]:
    from pydicom.pixels import get_decoder

    data = header.data
    data.PixelData = content
    data["PixelData"].VR = header.value_type or "OW"
    decoder = get_decoder(data.file_meta.TransferSyntaxUID)
    try:
        values, _ = decoder.as_array(data, index=0, raw=True, correct_unused_bits=False)
    except ValueError as error:
        raise _Refused("DICOM whose pixels are cut off, or other than its header says") from error
    return _used_bits(values, data), _photometric(data)


def _guess_syntax(frame: bytes) -> Any:
    """The transfer syntax of encoded pixels in a file that does not name one, or names one without encoding."""
    from pydicom.uid import JPEG2000, JPEGBaseline8Bit

    if not is_jpeg2000(frame) and frame[:2] != b"\xff\xd8":
        raise _Refused("DICOM whose pixels are encoded, and that does not say how")
    return JPEG2000 if is_jpeg2000(frame) else JPEGBaseline8Bit


def _follow_codestream(frame: bytes, data: "Dataset") -> None:
    """Correct the header where the codestream has other channels or another depth; refuse one of another size."""
    try:
        width, height, components, bits = read_codestream(frame)
    except (ValueError, IndexError, struct.error) as error:
        reason = str(error) if isinstance(error, ValueError) else "its pixels are damaged"
        raise _Refused(f"damaged DICOM ({reason})") from error
    if (width, height) != (data.Columns, data.Rows):
        raise _Refused(
            f"DICOM of {data.Columns} x {data.Rows} pixels that holds an encoded image of {width} x {height}"
        )
    if components not in (1, 3):
        raise _Refused(f"DICOM with an encoded image of {components} channels; 1 or 3 are read")
    if components != data.SamplesPerPixel:
        data.SamplesPerPixel, data.PlanarConfiguration = components, 0
        colours = "YBR_RCT" if is_jpeg2000(frame) else "YBR_FULL_422"
        data.PhotometricInterpretation = "MONOCHROME2" if components == 1 else colours
    if bits == 8 and data.file_meta.TransferSyntaxUID in _JPEG:
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0


def _unpack_rle(frame: bytes, data: "Dataset") -> np.ndarray:
    """(H, W) or (H, W, 3): a segment per byte of a sample, the highest first, each in PackBits as in TIFF (PS3.5 G).

    Pillow's decoder stops at the end of the image; pydicom's own would unpack a segment to 64 times its length.
    """
    count, *starts = struct.unpack_from("<16L", frame)
    samples, width = data.SamplesPerPixel, data.BitsAllocated // 8
    if count != samples * width:
        raise _Refused("damaged DICOM (its run-length encoding has another number of segments than its header says)")
    ends = [*starts[1:count], len(frame)]
    planes = []
    for start, end in zip(starts, ends, strict=False):
        line = Image.frombytes("L", (data.Rows * data.Columns, 1), frame[start:end], "packbits", "L")
        planes.append(np.asarray(line).reshape(data.Rows, data.Columns))
    kind = "i" if data.get("PixelRepresentation") else "u"
    channels = []
    for sample in range(samples):
        stacked = np.stack(planes[sample * width : (sample + 1) * width], axis=-1)
        channels.append(stacked.view(f">{kind}{width}")[..., 0].astype(f"{kind}{width}"))
    return channels[0] if samples == 1 else np.stack(channels, axis=-1)


# ---- bits


def _used_bits(words: np.ndarray, data: "Dataset") -> np.ndarray:
    """Values of whole ``words`` as stored in a file, by the header's BitsStored and HighBit or, where these are wrong,
    by the bits that are used.

    PS3.5 8.1.1: a value ends at HighBit; bits outside it are to be ignored, as old files keep overlays there.
    """
    allocated = words.dtype.itemsize * 8
    stored = int(data.get("BitsStored") or allocated)
    high = int(data.get("HighBit") or stored - 1)
    if data.BitsAllocated == 1 or not 0 < stored <= high + 1 <= allocated:
        return words
    values = (words << (allocated - 1 - high)) >> (allocated - stored)
    low = high + 1 - stored
    used = int(np.bitwise_or.reduce(words.view(f"u{words.dtype.itemsize}"), axis=None))
    if used >> (high + 1) == 0 and used & ((1 << low) - 1) == 0:
        return values
    if used < 1 << stored:
        return words  # the header is wrong: they lie in the lowest bits
    return words if _is_smoother(words, values, low) else values


def _is_smoother(words: np.ndarray, values: np.ndarray, low: int) -> bool:
    """Whether ``words`` (H, W, ...) change less than ``values`` << ``low`` do at most places where these differ.

    Values that wrapped jump by their whole range where the words continue; where an overlay begins it is the other way
    round. Some 256 rows and columns decide.
    """
    votes = 0
    for axis in (0, 1):
        lines = slice(None, None, max(1, words.shape[1 - axis] // 256))
        chosen = (slice(None), lines) if axis == 0 else (lines,)
        jumps = [
            np.abs(np.diff(part[chosen].astype(np.int64) << shift, axis=axis))
            for part, shift in ((words, 0), (values, low))
        ]
        votes += int(np.sign(jumps[1] - jumps[0]).sum())
    return votes > 0
