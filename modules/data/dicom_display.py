"""How stored DICOM values look on a screen, by PS3.3 C.7.6.3 and C.11: modality, then window or lookup table.

Headers are often wrong in these elements. What cannot be meant (an empty or zero window, an unknown function) counts
as absent, and a lookup table's own highest value says what white is.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from modules.data.bit_depths import by_rows, eight_bits, full_scale

if TYPE_CHECKING:
    from pydicom import Dataset

_MAX_TABLE = 2**17  # stored values for which a table is made
_FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


def show_grey(values: np.ndarray, data: "Dataset") -> np.ndarray:
    """Stored values (H, W), integers, as uint8 (H, W), bright where film is.

    Without a window or lookup table the values are stretched from minimum to maximum, padding left out. MONOCHROME1 is
    inverted, padding is black.
    """
    low, span = int(values.min()), int(values.max()) - int(values.min()) + 1
    if span > _MAX_TABLE:  # of 32 bits
        ends = _ends_by_rows(values, data)
        return by_rows(lambda rows: _grey_of(rows.astype(np.int64), data, ends), values)
    # The chain is followed for every value that occurs, once, and not for every pixel.
    present = np.zeros(span, bool)
    for row in values:
        present[row.astype(np.intp) - low] = True
    table = np.zeros(span, np.uint8)
    levels = np.flatnonzero(present) + low
    table[present] = _grey_of(levels, data, _ends(levels, data))
    return by_rows(lambda rows: table[rows.astype(np.intp) - low], values)


def show_colour(values: np.ndarray, colour_space: str) -> np.ndarray:
    """Stored values (H, W, 3), unsigned, as RGB uint8 (H, W, 3); NotImplementedError for an unknown colour space."""
    from pydicom.pixels import convert_color_space

    values = eight_bits(values)
    if colour_space in ("YBR_FULL", "YBR_FULL_422"):
        return by_rows(lambda rows: convert_color_space(rows, colour_space, "RGB"), values)
    if not colour_space.startswith("RGB"):
        raise NotImplementedError("a colour space that pydicom does not convert")
    return values


def show_palette(values: np.ndarray, data: "Dataset") -> np.ndarray:
    """Stored values (H, W), places in the palette of ``data``, as RGB uint8 (H, W, 3)."""
    kind, read = ("", _entries) if "RedPaletteColorLookupTableData" in data else ("Segmented", _expand)
    channels = [
        read(
            data[f"{colour}PaletteColorLookupTableDescriptor"].value,
            data[f"{kind}{colour}PaletteColorLookupTableData"].value,
            data,
        )
        for colour in ("Red", "Green", "Blue")
    ]
    first = int(_as_stored(data.RedPaletteColorLookupTableDescriptor[1], data))
    palette = np.stack(channels, axis=-1)
    palette = eight_bits(palette)
    return by_rows(lambda rows: palette[np.clip(rows.astype(np.int64) - first, 0, len(palette) - 1)], values)


def _ends(levels: np.ndarray, data: "Dataset") -> tuple[float, float]:
    """The least and the largest of ``levels`` after the modality's transform, padding left out; inf, -inf if all is."""
    inside = _modality(levels, data)[~_is_padding(levels, data)]
    return (float(inside.min()), float(inside.max())) if inside.size else (math.inf, -math.inf)


def _ends_by_rows(values: np.ndarray, data: "Dataset") -> tuple[float, float]:
    ends = by_rows(lambda rows: np.array([_ends(rows.astype(np.int64), data)]), values)
    return float(ends[:, 0].min()), float(ends[:, 1].max())


def _grey_of(levels: np.ndarray, data: "Dataset", ends: tuple[float, float]) -> np.ndarray:
    """Grey values uint8 of stored values int64, both of any shape; ``ends`` are black and white without a window."""
    from pydicom.pixels import apply_windowing

    padding = _is_padding(levels, data)
    modality = _modality(levels, data)
    if lookup := _lookup_table(data, "VOILUTSequence"):
        table, first = lookup
        if ends[1] < first >= 2**15:  # beyond all values: a negative number, written as unsigned
            first -= 2**16
        shown = _look_up(modality, table, first)
        low, high = 0, full_scale(int(table.max()))
    elif _has_window(data):
        shown = apply_windowing(modality, data)
        low, high = apply_windowing(np.array([-1e12, 1e12]), data)  # what lies below and above the window becomes
    else:
        shown = modality
        low, high = ends if ends[0] <= ends[1] else (0.0, 0.0)  # padding alone is black
    span = float(high) - float(low)
    grey = np.rint(np.clip((shown.astype(np.float64) - float(low)) * (255 / span if span else 0), 0, 255))
    if data.PhotometricInterpretation == "MONOCHROME1":
        grey = 255 - grey
    grey[padding] = 0
    return grey.astype(np.uint8)


def _is_padding(levels: np.ndarray, data: "Dataset") -> np.ndarray:
    """(K,) bool: what lies outside the detector, by PS3.3 C.7.5.1.1.2."""
    value, limit = _number(data, "PixelPaddingValue"), _number(data, "PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(levels.shape, bool)
    ends = sorted(_as_stored(end, data) for end in (value, value if limit is None else limit))
    return (levels >= ends[0]) & (levels <= ends[1])


def _modality(levels: np.ndarray, data: "Dataset") -> np.ndarray:
    if lookup := _lookup_table(data, "ModalityLUTSequence"):
        table, first = lookup
        return _look_up(levels, table, int(_as_stored(first, data)))
    slope, intercept = _number(data, "RescaleSlope"), _number(data, "RescaleIntercept")
    return levels if slope is None or intercept is None else levels * slope + intercept


def _has_window(data: "Dataset") -> bool:
    """Whether ``data`` has a window that pydicom can apply; an unknown function of one is taken out of ``data``."""
    function = str(data.get("VOILUTFunction") or "").strip().upper()
    if function not in _FUNCTIONS and "VOILUTFunction" in data:
        del data.VOILUTFunction  # LINEAR is meant where there is none
        function = "LINEAR"
    center, width = _number(data, "WindowCenter"), _number(data, "WindowWidth")
    return center is not None and width is not None and (width >= 1 if function in ("LINEAR", "") else width > 0)


def _number(data: "Dataset", name: str) -> float | None:
    """The element's first value; None where it is absent, empty or not a finite number."""
    try:
        value = data.get(name)
        number = float(value if isinstance(value, str | int | float) else value[0])
    except (TypeError, ValueError, IndexError):
        return None
    return number if math.isfinite(number) else None


def _as_stored(number: float, data: "Dataset") -> float:
    """A value of 16 bits, which headers may give as unsigned where stored ones are signed, or the other way round."""
    if data.BitsAllocated > 16:
        return number
    if data.get("PixelRepresentation"):
        return number - 2**16 if number >= 2**15 else number
    return number % 2**16


def _lookup_table(data: "Dataset", sequence: str) -> tuple[np.ndarray, int] | None:
    """The first lookup table of a sequence and the value that its first entry is for; None where there is none."""
    items = data.get(sequence)
    if not items or "LUTDescriptor" not in items[0] or not items[0].get("LUTData"):
        return None
    table = _entries(items[0].LUTDescriptor, items[0].LUTData, data)
    return table, int(items[0].LUTDescriptor[1])


def _entries(descriptor: list[int], content: bytes | list[int] | int, data: "Dataset") -> np.ndarray:
    """A table's entries uint16 (K,): its data are words, or bytes where there are no more than entries."""
    entries = int(descriptor[0]) % 2**16 or 2**16
    byte_order = "<" if data.original_encoding[1] else ">"
    if not isinstance(content, bytes):
        content, byte_order = np.atleast_1d(np.asarray(content, np.int64)).astype("<u2").tobytes(), "<"
    if len(content) <= entries + entries % 2:
        return np.frombuffer(content, np.uint8)[:entries].astype(np.uint16)
    return np.frombuffer(content[: len(content) // 2 * 2], f"{byte_order}u2")[:entries].astype(np.uint16)


def _expand(descriptor: list[int], content: bytes, data: "Dataset") -> np.ndarray:
    """A table's entries uint16 (K,) from discrete and linear segments (PS3.3 C.7.9.2), no more than it declares."""
    entries = int(descriptor[0]) % 2**16 or 2**16
    size = 1 if descriptor[2] == 8 else 2
    words = np.frombuffer(content[: len(content) // size * size], f"{'<' if data.original_encoding[1] else '>'}u{size}")
    parts: list[np.ndarray] = []
    count = at = 0
    while count < entries and at + 2 < len(words):
        kind, length = int(words[at]), int(words[at + 1])
        if kind == 0:
            part, at = words[at + 2 : at + 2 + length], at + 2 + length
        elif kind == 1 and parts:
            part, at = np.linspace(parts[-1][-1], words[at + 2], length + 1)[1:], at + 3
        else:
            raise NotImplementedError("segments that repeat others")
        parts += [part] if length else []
        count += len(part)
    return np.rint(np.concatenate(parts)[:entries]).astype(np.uint16)


def _look_up(values: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """``table`` at ``values`` - ``first``; values beyond its ends have those of its ends.

    pydicom's own wraps values in the table's data type, and refuses modality tables of 10 to 15 bits.
    """
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]
