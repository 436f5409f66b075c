"""DICOM files made here with pydicom: windows, lookup tables, MONOCHROME1, depths, encodings, and what is refused."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, Sequence, dcmread
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
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
        setattr(data, name, value)
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


def test_a_lookup_table_is_applied(path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 10], [int(1023 * (value / 4095) ** 2) for value in range(4096)]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    found = shown(dicom(path, VOILUTSequence=Sequence([table]), WindowCenter=1, WindowWidth=2))
    assert np.array_equal(found, np.rint(np.array(table.LUTData)[RAMP] * 255 / 1023))


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


def test_colour_scans(path):
    colours = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    dicom(path, colours, 8, "RGB", SamplesPerPixel=3, PlanarConfiguration=0)
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
        ({"PixelData": RAMP.tobytes()[:100]}, "its DICOM cannot be read"),
        ({"syntax": DeflatedExplicitVRLittleEndian}, "deflated DICOM is not read"),
        ({"syntax": JPEGLosslessSV1, "PixelData": encapsulate([b"\xff\xd8\xff\xd9"])}, "requirements/dicom.txt"),
        ({"syntax": JPEGBaseline8Bit, "PixelData": encapsulate([b"\xff\xd8\xff\xd9"])}, "damaged, or"),
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
