"""Images from disk, DICOM too, as 8-bit pictures; no path leaves the image folder."""

import errno
import os
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from modules.data.bit_depths import BYTES_PER_PIXEL, eight_bits
from modules.data.codestreams import read_jpeg2000
from modules.runtime.errors import ImageError, InputError
from modules.runtime.input_files import open_regular

PIXELS = 3  # part of the names of caches: raise it with every change of what any file's pixels are read as
MAX_PIXELS = 89_000_000  # just below where Pillow starts to warn of decompression bombs
MAX_BYTES = 2**30  # of a file, which some decoders read whole; 16-bit colour of MAX_PIXELS takes half of it
MAX_ASPECT = 50  # a thin strip resized by its shorter side would take gigabytes
BLANK, NEARLY_BLANK = "image is blank", "image is nearly blank"
NEARLY_BLANK_SHARE = 0.9
LEAST_CONTRAST = 24  # grey values between the darkest and the brightest hundredth of the pixels; 12 of 16 bits have 16
# Decoders that run inside Pillow: others (EPS) would start programs.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
# Pillow's raw modes of 16-bit colour -> those that read the other byte of each value. Greyscale with alpha is read into
# RGBA, where RGBA itself gives high and low byte of the grey value as R and G.
_OTHER_ORDER = "B" if sys.byteorder == "little" else "L"
_GREY_ALPHA = "LA;16B"
_DEEP = ("RGB", 65535)  # what Pillow's decoder of PPM files is told of 16-bit colour
_TILE_WIDTH, _TILE_HEIGHT, _FREE_TILE = 322, 323, 2**22  # TIFF's tags, and pixels of a tile that are always allowed
_BITS, _PLANES = 258, 284  # TIFF's tags
_IN_PLANES = "its 16-bit colours lie in planes, which are not read; save it with interleaved ones, or as PNG"
_BYTES = {"I": 4, "F": 4, "LA": 4, "PA": 4}  # of a pixel; others have one for each band
_LOW_BYTES = {_GREY_ALPHA: "RGBA"} | {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX", "RGBa", "CMYK")
    for order, other in (("B", "L"), ("L", "B"), ("N", _OTHER_ORDER))
}
# What the first element of a file without the usual preamble may be: its group, and the type of its value.
_FIRST_GROUPS = (0x0002, 0x0008, 0x0010, 0x0018, 0x0020, 0x0028)
_FIRST_TYPES = (b"UL", b"OB", b"UI", b"SH", b"CS", b"DA", b"TM", b"LO", b"DT", b"PN", b"IS", b"DS", b"US")
# Width and height that an image is resized to, by its own. A JPEG file may be decoded at 1/2, 1/4 or 1/8 of its size
# where that is not smaller: faster, with slightly other values.
Draft = Callable[[int, int], tuple[int, int]]
# max_pixels decides; Pillow's own warning would only repeat the error.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageFolder:
    """Opens the images below ``image_dir`` by their relative path, as 8-bit greyscale ("L") or RGB.

    ``image_dir`` may be a link; a link below it that leads out is refused unless ``follow_links``. A data
    set takes any callable path -> PIL image in its place, such as a cache of resized images. With ``draft`` JPEG files
    are decoded at the smallest scale that it allows.
    """

    def __init__(
        self,
        image_dir: str | Path,
        max_pixels: int = MAX_PIXELS,
        follow_links: bool = False,
        draft: Draft | None = None,
    ):
        if not os.path.isdir(image_dir):
            raise InputError(f"--image_dir {image_dir}: is not a folder")
        self.root = os.path.realpath(image_dir)
        self.max_pixels = max_pixels
        self.follow_links = follow_links
        self.draft = draft

    def locate(self, path: str) -> str:
        """Absolute path of a non-empty regular file in the folder; ImageError for anything else."""
        place = os.path.normpath if self.follow_links else os.path.realpath
        full = place(os.path.join(self.root, path)) if "\0" not in path else ""
        if os.path.isabs(path) or not full.startswith(os.path.join(self.root, "")):
            raise ImageError(
                f"image {path!r} leaves image_dir {self.root!r}; paths must stay inside it",
                "image path leaves image_dir",
            )
        try:
            _check_file(full, os.stat(full))
        except OSError as error:
            raise _cannot_open(full, error) from error
        return full

    def __call__(self, path: str) -> Image.Image:
        return open_image(self.locate(path), self.max_pixels, self.draft)


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at ``path`` as 8-bit RGB, upright; InputError when it cannot be decoded or has too many pixels."""
    return open_image(path, max_pixels).convert("RGB")


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS, draft: Draft | None = None) -> Image.Image:
    """As ``load_image``, but one channel stays one ("L"): resizing it costs a third and gives the same values.

    With ``draft`` a JPEG file is decoded at the smallest scale not below the size that it gives, and resized to that.
    ImageError for anything but a regular file of 1 to MAX_BYTES bytes, before it is read.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise _cannot_open(path, error) from error
    with file:
        _check_file(path, os.fstat(file.fileno()))
        return decode_image(file, str(path), max_pixels, draft)


def decode_image(file: BinaryIO, name: str, max_pixels: int = MAX_PIXELS, draft: Draft | None = None) -> Image.Image:
    """As ``open_image``, from an open file that errors call ``name``; ImageError where it cannot be decoded."""
    try:
        beginning = file.read(132)
        file.seek(0)
        if is_dicom(beginning):
            from modules.data.dicom import load_dicom

            image = load_dicom(file, name, max_pixels)
        else:
            image = _decode_picture(file, name, max_pixels, draft)
        _check_shape(name, image.size, max_pixels)
        return image
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # broken files make the decoders raise almost anything
        raise ImageError(f"image {name!r} cannot be decoded: {_reason(error, beginning)}") from error


def _reason(error: Exception, beginning: bytes) -> str:
    if not isinstance(error, Image.UnidentifiedImageError):
        return str(error)
    if beginning.startswith(b"version https://git-lfs"):
        return "not an image but a pointer of Git LFS; git lfs pull fetches the image itself"
    return "not an image"


def _check_file(path: str | Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"image {str(path)!r} is not a regular file", "image is not a regular file")
    if status.st_size == 0:
        raise ImageError(f"image {str(path)!r} is empty (0 bytes)", "image is empty")
    if status.st_size > MAX_BYTES:
        raise ImageError(f"image {str(path)!r} has {status.st_size} bytes, more than {MAX_BYTES}", "image is too large")


def _cannot_open(path: str | Path, error: OSError) -> ImageError:
    kind = "image is missing" if isinstance(error, FileNotFoundError) else "image cannot be opened"
    if error.errno in (errno.EINVAL, errno.EISDIR, errno.ENXIO):  # of open_regular: a folder, a pipe, a device
        return ImageError(f"image {str(path)!r} is not a regular file", "image is not a regular file")
    hint = "; its path has backslashes: write / in annotations" if "\\" in str(path) else ""
    return ImageError(f"image {str(path)!r}: {error.strerror}{hint}", kind)


def _decode_picture(file: BinaryIO, name: str, max_pixels: int, draft: Draft | None) -> Image.Image:
    """An image of FORMATS, upright, as "L" or "RGB"."""
    with Image.open(file, formats=FORMATS) as image:
        _check_shape(name, image.size, max_pixels)
        # Pillow's own decoder of 16-bit PPM files scales by 65535, whatever they hold, and keeps 8 bits.
        image.tile = [
            tile._replace(codec_name="raw", args="RGB;16B") if tile.codec_name == "ppm" and tile.args == _DEEP else tile
            for tile in image.tile
        ]
        as_grey = _widen_deep_ppm(image)
        _check_depth(name, image, max_pixels)
        _check_tiles(name, image)
        if image.format == "JPEG2000":
            file.seek(0)
            read_jpeg2000(file)
        whole, wanted = image.size, draft and draft(*image.size)
        if wanted is not None:
            image.draft(None, wanted)
        tiles = list(image.tile)
        image.load()
        image = _full_contrast(image, tiles, file)
        if wanted is not None and image.size != whole:
            exif, scale = image.getexif(), round(whole[0] / image.width)
            # The last row and column may stand for fewer than ``scale`` of the file's.
            image = image.resize(wanted, Image.Resampling.BILINEAR, box=(0, 0, whole[0] / scale, whole[1] / scale))
            image.info["exif"] = exif.tobytes()
        ImageOps.exif_transpose(image, in_place=True)
        image = _eight_bits(image)
        return Image.fromarray(np.asarray(image).reshape(image.height, -1, 3)) if as_grey else image


def _widen_deep_ppm(image: Image.Image) -> bool:
    """Have the other 16-bit colours of a PPM file decoded as a greyscale image of three times the width; returns
    whether ``image`` is one.

    Of greyscale Pillow's decoder keeps 16 bits, which the file's own highest value then scales.
    """
    [tile, *_] = image.tile or [None]
    if image.mode != "RGB" or tile is None or tile.codec_name not in ("ppm", "ppm_plain") or tile.args[-1] <= 255:
        return False
    width, height = 3 * image.width, image.height
    image._mode, image._size = "I", (width, height)
    image.tile = [tile._replace(extents=(0, 0, width, height), args=("I", tile.args[-1]))]
    return True


def _full_contrast(image: Image.Image, tiles: list, file: BinaryIO) -> Image.Image:
    """``image``, or where its file has 16-bit colours of 14 bits or less, these scaled as greyscale is.

    Pillow keeps the high byte of such colours, which is all but black for 12 bits. ``tiles`` are as before loading.
    """
    raw_mode = next(iter(_arguments(tile) for tile in tiles), ("",))[0]
    colours = [band for band in image.getbands() if band != "A"]
    if raw_mode not in _LOW_BYTES or max(image.getchannel(band).getextrema()[1] for band in colours) >= 2**6:
        return image
    if getattr(image, "tag_v2", {}).get(_PLANES) == 2:  # decoded by libtiff, which would give the high bytes again
        raise ValueError(_IN_PLANES)
    file.seek(0)
    with Image.open(file, formats=FORMATS) as other:
        other.tile = [tile._replace(args=(_LOW_BYTES[raw_mode], *_arguments(tile)[1:])) for tile in tiles]
        other.load()
        low_bands = ["G"] * 3 if raw_mode == _GREY_ALPHA else colours
        low = np.stack([np.asarray(other.getchannel(band)) for band in low_bands], axis=-1)
    high = np.stack([np.asarray(image.getchannel(band)) for band in colours], axis=-1)
    scaled = eight_bits(high.astype(np.uint16) << 8 | low)
    bands = [Image.fromarray(scaled[..., place]) for place in range(len(colours))]
    alpha = [image.getchannel("A")] if "A" in image.getbands() else []
    deep = Image.merge(image.mode, bands + alpha)
    deep.info["exif"] = image.getexif().tobytes()
    return deep


def _arguments(tile: tuple) -> tuple:
    """What a Pillow decoder gets for a tile; the first is the raw mode."""
    arguments = tile[3]
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _check_shape(path: str | Path, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    shape = f"image {str(path)!r} has {width} x {height} pixels"
    if width * height > max_pixels:
        raise ImageError(f"{shape}, more than max_pixels, {max_pixels}", "image is too large")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"{shape}: its sides may differ {MAX_ASPECT}-fold at most", "image is a thin strip")


def _check_depth(name: str, image: Image.Image, max_pixels: int) -> None:
    """ImageError where the decoded pixels would take more than BYTES_PER_PIXEL for each of ``max_pixels``."""
    raw_mode = next(iter(_arguments(tile) for tile in image.tile), ("",))[0]
    depth = 2 if raw_mode in _LOW_BYTES else 1
    size = (
        image.width
        * image.height
        * depth
        * _BYTES.get(image.mode, 2 if image.mode.startswith("I;16") else len(image.getbands()))
    )
    if size > BYTES_PER_PIXEL * max_pixels:
        raise ImageError(
            f"image {name!r} decodes to {size} bytes, more than {BYTES_PER_PIXEL} for each of max_pixels, {max_pixels}",
            "image is too large",
        )


def _check_tiles(name: str, image: Image.Image) -> None:
    """ImageError where a TIFF has tiles far larger than itself: its decoder allocates and fills a whole one.

    ValueError for planes of 16 bits, which Pillow reads as twice as many values of 8.
    """
    tags = getattr(image, "tag_v2", {})
    if tags.get(_PLANES) == 2 and max(tags.get(_BITS, (8,))) > 8 and image.tile[0].codec_name == "raw":
        raise ValueError(_IN_PLANES)
    width, height = (tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT))
    if not all(isinstance(side, int) for side in (width, height)) or width * height > max(
        _FREE_TILE, image.width * image.height
    ):
        raise ImageError(f"image {name!r} of {image.width} x {image.height} pixels has tiles of {width} x {height}")


def blank_problem(image: Image.Image) -> tuple[str, str] | None:
    """(kind of problem, what is wrong) of an 8-bit image that shows nothing, or hardly anything; None for others.

    Constant files, windows that leave the data out, and slopes of 0 give such images; files of 16 bits with values of
    12 and one far above them give nearly black ones. No chest radiograph of 274 that were looked at has two fifths of
    its pixels at one grey value and the two on either side of it.
    """
    counts = np.array(image.convert("L").histogram())
    near = np.convolve(counts, np.ones(5, int), "same")
    grey, share = int(near.argmax()), near.max() / counts.sum()
    if counts.max() == counts.sum():
        return BLANK, f"is blank: every pixel has the grey value {counts.argmax()}"
    if share >= NEARLY_BLANK_SHARE:
        return NEARLY_BLANK, f"is nearly blank: {share:.0%} of its pixels have grey values around {grey}"
    low, high = np.searchsorted(counts.cumsum(), counts.sum() * np.array([0.01, 0.99]))
    if high - low < LEAST_CONTRAST:
        return NEARLY_BLANK, f"is nearly blank: 98% of its pixels have grey values from {low} to {high}, of 0 to 255"
    return None


def refuse_blank(image: Image.Image, name: str) -> str:
    """ImageError where the image called ``name`` is blank; a warning to print where it nearly is, "" for others."""
    kind, reason = blank_problem(image) or ("", "")
    message = f"image {name!r} {reason}" if kind else ""
    if kind == BLANK:
        raise ImageError(message, kind)
    return message


def is_dicom(beginning: bytes) -> bool:
    """Whether a file that begins with these (at least 132) bytes is DICOM, with its usual preamble or without."""
    if beginning[128:132] == b"DICM":
        return True
    groups = {int.from_bytes(beginning[:2], order) for order in ("little", "big")}
    has_type = beginning[4:6] in _FIRST_TYPES or 0 < int.from_bytes(beginning[4:8], "little") <= 64
    return has_type and not groups.isdisjoint(_FIRST_GROUPS)


def stored_shape(path: str | Path) -> tuple[int, int, int]:
    """Width, height and the most channels that ``open_image`` can give, from the file's header alone; 0 if unreadable.

    Width and height may come out exchanged where the file says so.
    """
    try:
        with open_regular(path) as file:
            if is_dicom(file.read(132)):
                from modules.data.dicom import dicom_shape

                return dicom_shape(file)
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:
                grey = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
                return *image.size, 1 if grey and not image.has_transparency_data else 3
    except Exception:  # as in open_image, which says what is wrong
        return 0, 0, 0


def _eight_bits(image: Image.Image) -> Image.Image:
    """``image`` as "L" or "RGB"; transparent parts become black, as unexposed film is."""
    if image.mode in ("L", "RGB"):
        return image if "transparency" not in image.info else _on_black(image)
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scale_to_bytes(image))
    if image.has_transparency_data:
        return _on_black(image)
    return image.convert("RGB")


def _on_black(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.composite(rgba.convert("RGB"), Image.new("RGB", image.size), rgba.getchannel("A"))


def _scale_to_bytes(image: Image.Image) -> np.ndarray:
    """Deep greyscale (H, W) as uint8: Pillow's own conversion would clip everything above 255 to white.

    Integers are divided by the range of the smallest detector depth that holds their maximum, so that 12-bit data
    in 16-bit files keeps its contrast and full-range data is divided by 257. Floats, and integers outside 16 bits,
    have no range to go by: they are stretched from their minimum to their maximum.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it holds values that are not finite")
    if values.dtype.kind == "f" or low < 0 or high > 65535:
        spread = float(high) - float(low)
        scaled = np.rint((values - float(low)) * (255 / spread if spread else 0)).astype(np.uint8)
    else:
        scaled = eight_bits(values.astype(np.uint16))
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF's WhiteIsZero, which Pillow inverts up to 8 bits only
        scaled = 255 - scaled
    return scaled
