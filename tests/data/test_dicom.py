"""DICOM files made here with pydicom: windows, lookup tables, MONOCHROME1, depths, encodings, and what is refused."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image
from pydicom import DataElement, Dataset, Sequence, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
    generate_uid,
)

from modules.data.images import ImageFolder, load_image, open_image, stored_shape
from modules.runtime.errors import InputError

RAMP = np.linspace(0, 4095, 24 * 32).astype(np.uint16).reshape(24, 32)


def dicom(path, values=RAMP, bits=12, photometric="MONOCHROME2", signed=False, **elements):
    """Write a DICOM file that also names a patient; ``elements`` are further ones by keyword. Returns its path."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.PatientName, data.PatientID, data.InstitutionName = "Doe^Jane", "PHI-4711", "St. Elsewhere"
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, photometric
    data.BitsAllocated, data.BitsStored, data.HighBit = values.dtype.itemsize * 8, bits, bits - 1
    data.PixelRepresentation = int(signed)
    data.PixelData = elements.pop("PixelData", values.tobytes())
    for name, value in elements.items():
        data.add(value) if isinstance(value, DataElement) else setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.dcm"


def shown(path):
    image = open_image(path)
    assert image.mode == "L" and not image.info
    return np.asarray(image).astype(int)


def linear(values, center, width):
    """PS3.3 C.11.2.1.2.1 on 0..255."""
    return np.rint(np.clip(((values.astype(float) - (center - 0.5)) / (width - 1) + 0.5) * 255, 0, 255))


def test_a_window_is_applied(path):
    expected = linear(RAMP, 2000, 1000)
    assert np.array_equal(shown(dicom(path, WindowCenter=2000, WindowWidth=1000)), expected)
    assert {0, 255} <= set(np.unique(expected))
    # The first of several.
    assert np.array_equal(shown(dicom(path, WindowCenter=[2000, 9], WindowWidth=[1000, 9])), expected)


def test_monochrome1_is_inverted(path):
    assert np.array_equal(
        shown(dicom(path, photometric="MONOCHROME1", WindowCenter=2000, WindowWidth=1000)),
        255 - linear(RAMP, 2000, 1000),
    )


@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_without_a_window_the_values_are_stretched(path, bits):
    values = np.linspace(100, 2**bits - 1, 24 * 32).astype(np.uint8 if bits == 8 else np.uint16).reshape(24, 32)
    expected = np.rint((values.astype(float) - 100) * 255 / (2**bits - 101))
    assert np.array_equal(shown(dicom(path, values, bits)), expected)


def test_padding_is_black_and_does_not_count(path):
    values = RAMP // 2 + 1000
    values[:, :4] = 4000
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        found = shown(dicom(path, values, photometric=photometric, PixelPaddingValue=4000))
        assert not found[:, :4].any() and found[:, 4:].max() == 255
    everything = np.full((4, 4), 9, np.uint16)
    assert not shown(dicom(path, everything, PixelPaddingValue=9)).any()


def test_signed_numbers_that_the_header_writes_as_unsigned(path):
    values = RAMP.astype(np.int16) - 1024
    entries = np.rint(SQUARE * 4095)
    expected = np.rint(entries[RAMP] * (255 / 4095))
    written = table(entries, 16, first=2**16 - 1024)  # of type US, as ``table`` writes it
    assert np.array_equal(shown(dicom(path, values, 16, signed=True, VOILUTSequence=written)), expected)
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    assert np.array_equal(shown(dicom(path, RAMP, VOILUTSequence=written, **rescale)), expected)
    assert np.array_equal(shown(dicom(path, values, 16, signed=True, ModalityLUTSequence=written)), expected)
    values[:, :4] = -2000
    padding = DataElement(0x00280120, "US", 2**16 - 2000)
    found = shown(dicom(path, values, 16, signed=True, PixelPaddingValue=padding))
    assert not found[:, :4].any() and found[0, 4] < 3


def test_signed_values_and_rescaling_come_before_the_window(path):
    values = RAMP.astype(np.int16) - 2048
    window = {"WindowCenter": 500, "WindowWidth": 2000, "RescaleIntercept": 10}
    assert np.array_equal(
        shown(dicom(path, values, 12, signed=True, RescaleSlope=2, **window)), linear(values * 2.0 + 10, 500, 2000)
    )
    # A slope below 0 turns the values round, the window does not turn them back.
    assert np.array_equal(
        shown(dicom(path, values, 12, signed=True, RescaleSlope=-2, **window)), linear(values * -2.0 + 10, 500, 2000)
    )


def table(entries, bits, first=0, as_bytes=None):
    """An item of a lookup table sequence: ``entries`` declared as of ``bits``, as words or, where given, as bytes."""
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item.LUTData = np.asarray(entries, "<u2").tobytes() if as_bytes is None else as_bytes
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return Sequence([item])


SQUARE = (np.arange(4096) / 4095) ** 2
GREY = np.rint(RAMP / 4095 * 255)


@pytest.mark.parametrize(
    ("holds", "declared"), [(10, 10), (12, 12), (16, 16), (12, 16), (10, 14), (8, 8), (8, 16), (16, 8)]
)
def test_a_lookup_table_is_applied_whatever_depth_it_declares(path, holds, declared):
    entries = np.rint(SQUARE * (2**holds - 1)).astype(int)
    expected = np.rint(entries[RAMP] * 255 / (2**holds - 1))
    window = {"WindowCenter": 1, "WindowWidth": 2}  # the table goes before it
    assert np.array_equal(shown(dicom(path, VOILUTSequence=table(entries, declared), **window)), expected)
    dicom(path, photometric="MONOCHROME1", VOILUTSequence=table(entries, declared))
    assert np.array_equal(shown(path), 255 - expected)


def test_lookup_tables_of_bytes_of_some_values_and_without_entries(path):
    entries = np.rint(SQUARE * 255).astype(np.uint8)
    dicom(path, VOILUTSequence=table(entries, 8, as_bytes=entries.tobytes()))
    assert np.array_equal(shown(path), entries[RAMP])
    # 1,000 entries from 500 on, for values up to 40,950: those beyond have the end's, and nothing wraps.
    part = np.arange(1000) * 65
    dicom(path, VOILUTSequence=table(part, 16, first=500), RescaleSlope=10, RescaleIntercept=0)
    assert np.array_equal(shown(path), np.rint(part[np.clip(RAMP.astype(int) * 10 - 500, 0, 999)] * 255 / 65535))
    empty = Sequence([Dataset()])
    for voi in (Sequence([]), empty):
        assert np.array_equal(shown(dicom(path, VOILUTSequence=voi, ModalityLUTSequence=voi)), GREY)


def test_modality_tables_of_any_depth(path):
    for bits in (8, 12, 16):
        entries = np.rint(SQUARE * (2**bits - 1)).astype(int)
        dicom(path, ModalityLUTSequence=table(entries, bits), WindowCenter=2 ** (bits - 1), WindowWidth=2**bits)
        assert np.abs(shown(path) - np.rint(entries[RAMP] * 255 / (2**bits - 1))).max() <= 1


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": None, "WindowWidth": None},
        {"WindowCenter": "", "WindowWidth": 4096},
        {"WindowCenter": 2048, "WindowWidth": 0},
        {"WindowCenter": 2048, "WindowWidth": -5},
        {"WindowCenter": 2048},
        {"RescaleSlope": None, "RescaleIntercept": None},
        {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": "FOO"},
        {"PixelPaddingValue": None},
    ],
)
def test_elements_that_cannot_be_meant_count_as_absent(path, elements):
    assert np.array_equal(shown(dicom(path, **elements)), GREY)


# ---- bits


def test_values_may_end_at_any_bit(path):
    assert np.array_equal(shown(dicom(path, RAMP << 4, 12, HighBit=15)), GREY)
    assert np.array_equal(shown(dicom(path, RAMP << 2, 12, HighBit=13, WindowCenter=2048, WindowWidth=4096)), GREY)
    signed = RAMP.astype(np.int16) - 2048
    assert np.array_equal(shown(dicom(path, signed << 4, 12, signed=True, HighBit=15)), GREY)
    assert np.array_equal(shown(dicom(path, signed & 0xFFF, 12, signed=True)), GREY)  # without the sign's extension


def test_bits_that_the_header_denies(path):
    smooth = np.repeat(np.linspace(0, 32760, 64).astype(np.uint16)[None], 24, axis=0)
    assert np.array_equal(shown(dicom(path, smooth, 12)), np.rint(smooth * (255 / 32760)))
    assert np.array_equal(shown(dicom(path, RAMP, 12, HighBit=15)), GREY)  # they end at bit 11
    overlay = RAMP | np.where(np.indices(RAMP.shape).sum(0) % 7 < 3, 0x1000, 0).astype(np.uint16)
    assert np.array_equal(shown(dicom(path, overlay, 12)), GREY)


# ---- colour


def palette(entries, first=0, bits=16):
    """Elements of a palette; ``entries`` (K, 3) of uint8 or uint16."""
    elements = {}
    for colour, channel in zip(("Red", "Green", "Blue"), entries.T, strict=True):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [len(channel), first, bits]
        elements[f"{colour}PaletteColorLookupTableData"] = channel.tobytes()
    return elements


def test_palettes(path):
    colours = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
    places = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)
    dicom(path, places, 8, "PALETTE COLOR", **palette(colours, bits=8))
    assert open_image(path).mode == "RGB" and np.array_equal(np.asarray(open_image(path)), colours[places])
    assert stored_shape(path) == (32, 24, 3)
    wide = colours.astype(np.uint16) * 257
    dicom(path, places.astype(np.uint16) + 1000, 16, "PALETTE COLOR", **palette(wide, first=1000))
    assert np.array_equal(np.asarray(open_image(path)), colours[places])
    # 600 entries of 8 bits: their places do not fit into 8.
    long = np.concatenate([colours] * 3)[:600]
    dicom(path, RAMP % 600, 12, "PALETTE COLOR", **palette(long, bits=8))
    assert np.array_equal(np.asarray(open_image(path)), long[RAMP % 600])


def test_palettes_in_segments(path):
    line = np.array([0, 1, 0, 1, 255, 255], np.uint8)  # one entry of 0, then 255 on a line to 255
    elements = {}
    for colour in ("Red", "Green", "Blue"):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"Segmented{colour}PaletteColorLookupTableData"] = line.tobytes()
    places = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)
    dicom(path, places, 8, "PALETTE COLOR", **elements)
    assert np.array_equal(np.asarray(open_image(path))[..., 1], places)
    # Segments beyond the declared entries are not expanded: these would have 10^8 of them.
    many = np.array([0, 1, 0, 1, 255, 65535] + [1, 65535, 40000] * 2000, "<u2")
    for colour in ("Red", "Green", "Blue"):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"Segmented{colour}PaletteColorLookupTableData"] = many.tobytes()
    dicom(path, places, 8, "PALETTE COLOR", **elements)
    assert np.array_equal(np.asarray(open_image(path))[..., 1], places)


@pytest.mark.parametrize("holds", [8, 12, 16])
def test_colours_of_16_bits(path, holds):
    deep = np.stack([RAMP * 2.0**holds // 4096, RAMP // 2 * 2.0**holds // 4096, RAMP * 0], -1).astype(np.uint16)
    dicom(path, deep, 16, "RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    assert np.array_equal(np.asarray(open_image(path)), np.rint(deep * (255 / (2 ** deep_bits(deep) - 1))))


def deep_bits(values):
    return next(bits for bits in (8, 10, 12, 14, 16) if values.max() < 2**bits)


def test_colour_and_grey_are_the_codestreams(path):
    grey = np.rint(RAMP / 4095 * 255).astype(np.uint8)
    for colour, photometric, samples in ((True, "MONOCHROME2", 1), (False, "RGB", 3), (True, "MONOCHROME1", 1)):
        content = io.BytesIO()
        Image.fromarray(grey).convert("RGB" if colour else "L").save(content, "JPEG", quality=95)
        elements = {"SamplesPerPixel": samples, "PixelData": encapsulate([content.getvalue()])}
        found = shown(dicom(path, grey, 8, photometric, syntax=JPEGBaseline8Bit, **elements))
        assert np.abs(found - (255 - grey if photometric == "MONOCHROME1" else grey)).max() <= 9


def test_encodings(path):
    expected = shown(dicom(path))
    data = dcmread(path)
    data.compress(RLELossless)
    data.save_as(path)
    assert np.array_equal(shown(path), expected)
    grey = np.rint(RAMP / 4095 * 255).astype(np.uint8)
    for kind, options, syntax, error in (
        ("JPEG", {"quality": 95}, JPEGBaseline8Bit, 8),
        ("JPEG2000", {"irreversible": False}, JPEG2000Lossless, 0),
    ):
        content = io.BytesIO()
        Image.fromarray(grey).save(content, kind, **options)
        encoded = encapsulate([content.getvalue()])
        dicom(path, grey, 8, syntax=syntax, PixelData=encoded, WindowCenter=128, WindowWidth=256)
        assert np.abs(shown(path) - grey).max() <= error


@pytest.mark.parametrize("implicit", [False, True])
def test_files_without_preamble(path, implicit):
    dicom(path)
    data = dcmread(path)
    if implicit:
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    data.save_as(path, implicit_vr=implicit, little_endian=True)
    content = path.read_bytes()
    for start in (132, content.index(b"\x08\x00\x16\x00")):  # at the file's own header, and after that too
        path.write_bytes(content[start:])
        assert np.array_equal(shown(path), GREY) and stored_shape(path) == (32, 24, 1)


def test_encoded_pixels_whose_encoding_is_not_named(path):
    content = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint16)).save(content, "JPEG2000", no_jp2=True)
    dicom(path, RAMP, 12, syntax=JPEG2000Lossless, PixelData=encapsulate([content.getvalue()]))
    file = path.read_bytes()
    path.write_bytes(file[file.index(b"\x08\x00\x16\x00") :])
    assert np.array_equal(shown(path), GREY)


@pytest.mark.parametrize("words", [RAMP, RAMP.astype(np.int16) - 2048, np.arange(768, dtype=np.uint8).reshape(24, 32)])
def test_run_lengths(path, words):
    """Against pydicom's encoder; colour, too."""
    bits = words.dtype.itemsize * 8
    plain = shown(dicom(path, words, bits, signed=words.dtype.kind == "i"))
    data = dcmread(path)
    data.compress(RLELossless)
    data.save_as(path)
    assert np.array_equal(shown(path), plain)
    colours = np.stack([words, words // 2, words * 0], -1).view(f"u{words.dtype.itemsize}")
    dicom(path, colours, bits, "RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    plain = np.asarray(open_image(path))
    data = dcmread(path)
    data.compress(RLELossless)
    data.save_as(path)
    assert np.array_equal(np.asarray(open_image(path)), plain)


def test_colour_scans(path):
    colours = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    dicom(path, colours, 8, "RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    assert np.array_equal(np.asarray(open_image(path)), colours)


def test_elements_that_headers_leave_out(path):
    expected = shown(dicom(path))
    for missing in (["BitsStored", "HighBit"], ["PhotometricInterpretation"], ["PixelRepresentation"]):
        data = dcmread(dicom(path))
        for name in missing:
            del data[name]
        data.save_as(path)
        assert np.array_equal(shown(path), expected), missing
    assert np.array_equal(shown(dicom(path, photometric="monochrome1")), 255 - expected)
    colours = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    dicom(path, colours, 8, "rgb", SamplesPerPixel=3)  # without PlanarConfiguration
    assert np.array_equal(np.asarray(open_image(path)), colours)


def test_content_decides_not_the_name(tmp_path):
    dicom(tmp_path / "0.png")
    content = bytearray((tmp_path / "0.png").read_bytes())
    content[:4] = b"II*\0"  # a preamble that claims to be TIFF, as the standard allows
    (tmp_path / "0.png").write_bytes(content)
    assert ImageFolder(tmp_path)("0.png").size == load_image(tmp_path / "0.png").size == (32, 24)


# ---- refused, in one line without anything of the header


def refused(path, capfd, caplog, match):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=match) as caught:
            open_image(path)
    said = str(caught.value) + "".join(capfd.readouterr()) + caplog.text
    assert "\n" not in str(caught.value)
    assert not any(word in said for word in ("Doe", "Jane", "4711", "Elsewhere", "19531313"))


@pytest.mark.parametrize(
    ("elements", "match"),
    [
        ({"NumberOfFrames": 3}, "DICOM of 3 frames"),
        ({"Rows": 60000, "Columns": 60000}, "60000 x 60000 pixels, more than max_pixels, 89000000"),
        ({"Rows": 0}, "without an image"),
        ({"PixelData": RAMP.tobytes()[:100]}, "whose pixels are cut off"),
        ({"syntax": DeflatedExplicitVRLittleEndian}, "deflated DICOM is not read"),
        ({"syntax": JPEGLosslessSV1, "PixelData": encapsulate([b"\xff\xd8\xff\xd9"])}, "requirements/dicom.txt"),
        ({"syntax": JPEGBaseline8Bit, "PixelData": encapsulate([b"\xff\xd8\xff\xd9"])}, "damaged DICOM"),
        ({"SamplesPerPixel": 4}, "DICOM of 4 x 16 bits a pixel"),
        ({"BitsAllocated": 64}, "DICOM of 1 x 64 bits a pixel"),
        ({"Rows": 1, "Columns": 768}, "may differ 50-fold"),
    ],
)
def test_what_is_refused(path, capfd, caplog, elements, match):
    refused(dicom(path, **elements), capfd, caplog, match)


def test_damaged_headers_are_not_quoted(path, capfd, caplog):
    dicom(path)
    data = dcmread(path)
    data.add_new("PatientBirthDate", "DA", "19530101")
    data.save_as(path)
    # No date, and quoted by pydicom's warnings.
    path.write_bytes(path.read_bytes().replace(b"19530101", b"19531313"))
    assert open_image(path).size == (32, 24)
    path.write_bytes(path.read_bytes()[:400])
    refused(path, capfd, caplog, "without an image|cannot be read")
    path.write_bytes(b"\0" * 128 + b"DICM")
    refused(path, capfd, caplog, "without an image|cannot be read")
    assert not capfd.readouterr().err and not caplog.text


def test_the_header_alone_tells_the_shape(path):
    dicom(path)
    assert stored_shape(path) == (RAMP.shape[1], RAMP.shape[0], 1)
    path.write_bytes(path.read_bytes()[:140])
    assert stored_shape(path) == (0, 0, 0)
