"""Sizes of JPEG and JPEG 2000 codestreams by their own headers, before a decoder allocates what these announce."""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

# JPEG: markers of a frame header (SOF0 to SOF15, JPEG-LS), and those without a length.
_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_BARE = {0x01, *range(0xD0, 0xD9)}
# JPEG 2000: start, size, coding style, that of a component, start of a tile-part and of its data, end.
_SOC, _SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFF4F, 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
_MAX_MARKERS = 2**18
# Bytes that OpenJPEG was measured to allocate per part of a codestream, whatever its samples take.
_TILE_BYTES, _PRECINCT_BYTES, _BLOCK_BYTES = 8_000, 1_700, 320
_FREE_BYTES, _BYTES_PER_SAMPLE = 2**26, 8


class Codestream(NamedTuple):
    """What a codestream announces."""

    width: int
    height: int
    components: int
    bits: int  # of a sample


def is_jpeg2000(content: bytes) -> bool:
    """Whether ``content`` begins as a JPEG 2000 codestream or as a JP2 file."""
    return content.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "))


def read_codestream(content: bytes) -> Codestream:
    """The announced size of a JPEG, JPEG-LS or JPEG 2000 codestream; ValueError or struct.error where it is none."""
    return read_jpeg2000(io.BytesIO(content)) if is_jpeg2000(content) else _read_jpeg(content)


def _read_jpeg(content: bytes) -> Codestream:
    if content[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG codestream")
    at = 2
    while True:
        start, marker, length = struct.unpack_from(">BBH", content, at)
        if start != 0xFF or marker == 0xDA:
            raise ValueError("a JPEG codestream without a frame header")
        if marker in _FRAME:
            bits, height, width, components = struct.unpack_from(">BHHB", content, at + 4)
            return Codestream(width, height, components, bits)
        at += 1 if marker == 0xFF else 2 if marker in _BARE else 2 + length


def read_jpeg2000(file: BinaryIO) -> Codestream:
    """The announced size of a JPEG 2000 codestream, or of a JP2 file; ``file`` is positioned at its beginning.

    ValueError where it is cut into so many tiles, precincts or code blocks that decoding it would take more than 8
    bytes per sample for these alone; a codestream of 300 bytes can ask for gigabytes. struct.error where it is damaged.
    """
    _seek_codestream(file)
    if _unpack(file, ">HH") != (_SOC, _SIZ):
        raise ValueError("a JPEG 2000 codestream without a size")
    length, _, *grid, components = _unpack(file, ">HH8LH")
    bits = (file.read(1)[0] & 0x7F) + 1
    file.seek(length - 39, io.SEEK_CUR)
    right, bottom, left, top, tile_width, tile_height, tiles_left, tiles_top = grid
    width, height = right - left, bottom - top
    if min(width, height, tile_width, tile_height, components) < 1:
        raise ValueError("a JPEG 2000 codestream of no size")
    tiles = -(-(right - tiles_left) // tile_width) * -(-(bottom - tiles_top) // tile_height)
    tile = (min(width, tile_width), min(height, tile_height))
    allowed = _FREE_BYTES + _BYTES_PER_SAMPLE * width * height * components
    for marker, style in _coding_styles(file, components):
        layers, coding = (struct.unpack_from(">H", style, 2)[0], style[5:]) if marker == _COD else (1, style[1:])
        if tiles * _TILE_BYTES + _tile_bytes(tile, components, layers, bool(style[0] & 1), coding) > allowed:
            raise ValueError("a JPEG 2000 codestream in far too small pieces")
    return Codestream(width, height, components, bits)


def _seek_codestream(file: BinaryIO) -> None:
    """From the beginning of a JP2 file to its codestream; a bare codestream is left where it is."""
    start = file.tell()
    if file.read(4) == b"\xff\x4f\xff\x51":
        file.seek(start)
        return
    file.seek(start)
    while True:
        length, kind = _unpack(file, ">L4s")
        header = 8
        if length == 1:
            (length,), header = _unpack(file, ">Q"), 16
        if kind == b"jp2c":
            return
        if length < header:
            raise ValueError("a JP2 file without a codestream")
        file.seek(length - header, io.SEEK_CUR)


def _coding_styles(file: BinaryIO, components: int) -> Iterator[tuple[int, bytes]]:
    """(marker, content from the style byte on) of every coding style, in the main header and in those of tile-parts."""
    end_of_part = 0
    for _ in range(_MAX_MARKERS):
        head = file.read(2)
        marker = int.from_bytes(head, "big")
        if len(head) < 2 or marker == _EOC or (marker == _SOD and not end_of_part):
            return  # a tile-part of no stated length is the last one
        if marker == _SOD:
            if end_of_part < file.tell():
                raise ValueError("a JPEG 2000 tile-part that ends before it begins")
            file.seek(end_of_part)
            continue
        (length,) = _unpack(file, ">H")
        content = file.read(max(0, length - 2))
        if marker == _SOT:
            size = struct.unpack_from(">L", content, 2)[0]
            end_of_part = size and file.tell() - 12 + size
        elif marker == _COD:
            yield marker, content
        elif marker == _COC:
            yield marker, content[1 if components < 257 else 2 :]
    raise ValueError("a JPEG 2000 codestream in far too many parts")


def _tile_bytes(size: tuple[int, int], components: int, layers: int, own_precincts: bool, coding: bytes) -> int:
    """What the parts of a tile of ``size`` take. ``coding``: levels, code block exponents - 2, style, transform, then
    a byte of exponents per resolution where ``own_precincts``."""
    levels, block_x, block_y = coding[0], coding[1] + 2, coding[2] + 2
    precincts = blocks = 0
    for resolution in range(levels + 1):
        exponents = coding[5 + resolution] if own_precincts else 0xFF
        across, down = exponents & 15, exponents >> 4
        width, height = (-(-side >> (levels - resolution)) for side in size)
        here = -(-width // 2**across) * -(-height // 2**down)
        inner = 1 if resolution else 0  # the three bands of a resolution are half as wide
        block = max(0, min(block_x, across - inner)) + max(0, min(block_y, down - inner))
        precincts += here
        blocks += here + (width * height >> block)
    return components * (precincts * (_PRECINCT_BYTES + 2 * layers) + blocks * _BLOCK_BYTES)


def _unpack(file: BinaryIO, form: str) -> tuple:
    return struct.unpack(form, file.read(struct.calcsize(form)))
