"""Images that want more than to be looked at: memory, other files, or never to end."""

import contextlib
import io
import mmap
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from modules.data.bit_depths import BYTES_PER_PIXEL
from modules.data.images import MAX_BYTES, ImageFolder, open_image
from modules.runtime.errors import InputError
from tests.data.test_dicom import dicom

ROOT = Path(__file__).resolve().parents[2]
GREY = Image.new("L", (40, 30), 90)


@contextlib.contextmanager
def little_memory(kilobytes=60_000):
    """Fails where this process needed so much more than it had at the start; each bomb would take 80 MB or more."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < kilobytes


def memory(name):
    """KiB."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def test_memory_is_measured():
    with pytest.raises(AssertionError), little_memory():
        # Fresh pages, written to: zeros take no memory, and what the allocator has kept is none of this.
        mmap.mmap(-1, 80_000_000).write(b"x" * 80_000_000)


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *extra):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + body + chunk(b"IEND", b"")


def jpeg(width, height):
    """A JPEG whose frame header announces another size than its data has."""
    content = bytearray(saved(GREY, "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def tiff(width, height):
    content = bytearray(saved(Image.new("L", (1000, 1000)), "TIFF", compression="tiff_deflate"))
    for tag, value in ((256, width), (257, height)):
        [at] = [at for kind in (3, 4) if (at := content.find(struct.pack("<HHI", tag, kind, 1))) >= 0]
        content[at : at + 12] = struct.pack("<HHII", tag, 4, 1, value)
    return bytes(content)


def gif(width, height, frames=1):
    content = bytearray(
        saved(
            GREY.convert("P"),
            "GIF",
            save_all=True,
            append_images=[Image.new("P", (40, 30), i) for i in range(frames - 1)],
        )
    )
    if (width, height) != GREY.size:
        content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


BOMBS = {
    "png": png(60_000, 60_000),
    "png below Pillow's own limit": png(12_000, 12_000),
    "jpeg": jpeg(65_000, 65_000),
    "tiff": tiff(60_000, 60_000),
    "gif": gif(65_000, 65_000),
    "bmp": saved(GREY, "BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + saved(GREY, "BMP")[26:],
    "ppm": b"P5 60000 60000 255\n" + bytes(100),
    "strip": png(80_000_000, 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_announced_pixels_are_counted_before_they_are_decoded(tmp_path, name):
    (tmp_path / "bomb").write_bytes(BOMBS[name])
    with little_memory(), pytest.raises(InputError, match="more than max_pixels|decompression bomb|50-fold"):
        open_image(tmp_path / "bomb")


def codestream(side, **changes):
    """A JPEG 2000 codestream of a grey square, with other bytes at given places after its coding style marker."""
    content = bytearray(saved(Image.new("L", (side, side), 7), "JPEG2000", no_jp2=True))
    at = content.index(b"\xff\x52")
    if precinct := changes.get("precinct"):  # exponents of both sides, for every resolution
        style = bytearray(content[at + 2 : at + 14])
        style[2] |= 1
        style += bytes([precinct]) * (style[7] + 1)
        style[:2] = struct.pack(">H", len(style))
        content[at + 2 : at + 14] = style
    if block := changes.get("block"):
        content[at + 10 : at + 12] = bytes([block - 2] * 2)
    if tile := changes.get("tile"):
        content[24:32] = struct.pack(">LL", tile, tile)
    return bytes(content)


PIECES = {"precincts of 4 x 4": {"precinct": 0x22}, "blocks of 4 x 4": {"block": 2}, "tiles of 17 x 17": {"tile": 17}}


@pytest.mark.parametrize("name", PIECES)
def test_a_codestream_of_300_bytes_in_a_million_pieces(tmp_path, name):
    content = codestream(4096, **PIECES[name])
    assert len(content) < 400
    (tmp_path / "a.jp2").write_bytes(content)
    dicom(
        tmp_path / "a.dcm",
        np.zeros((4096, 4096), np.uint8),
        8,
        syntax=JPEG2000Lossless,
        PixelData=encapsulate([content]),
    )
    for file in ("a.jp2", "a.dcm"):
        with little_memory(), pytest.raises(InputError, match="far too small pieces"):
            open_image(tmp_path / file)
    (tmp_path / "a.jp2").write_bytes(codestream(512, precinct=0x77, block=5, tile=128))
    with contextlib.suppress(InputError):  # of sensible pieces, though not as it was written
        open_image(tmp_path / "a.jp2")


def test_encoded_dicom_that_unpacks_to_more_than_its_header_says(tmp_path):
    run = b"\x81\x00" * 1_000_000  # 128 MB
    lengths = struct.pack("<16L", 2, 64, 64 + len(run), *[0] * 13) + run + run
    small = saved(Image.new("L", (1024, 1024), 9), "JPEG2000", no_jp2=True)
    size = struct.pack(">LL", 9000, 9000)
    large = small[:8] + size + small[16:24] + size + small[32:]
    words = np.zeros((1024, 1024), np.uint16)
    for syntax, frames, refusal in (
        (RLELossless, [lengths], None),
        (JPEGBaseline8Bit, [jpeg(9000, 9000)], "1024 x 1024 pixels that holds an encoded image of 9000 x 9000"),
        (JPEG2000Lossless, [large], "1024 x 1024 pixels that holds an encoded image of 9000 x 9000"),
        (JPEG2000Lossless, [small] * 100, None),
    ):
        dicom(tmp_path / "a.dcm", words, 16, syntax=syntax, PixelData=encapsulate(frames))
        with little_memory(), pytest.raises(InputError, match=refusal) if refusal else contextlib.nullcontext():
            assert open_image(tmp_path / "a.dcm").size == (1024, 1024)


def test_a_dicom_header_of_four_hundred_thousand_elements(tmp_path, monkeypatch):
    monkeypatch.setattr("modules.data.dicom._MAX_HEADER", 2**18)  # refused sooner, in seconds less
    dicom(tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    pixels = content.index(struct.pack("<HH", 0x7FE0, 0x0010))
    elements = b"".join(struct.pack("<HH2sH", 0x0029, number, b"LO", 0) for number in range(65536)) * 6
    begin, end = struct.pack("<HHL", 0xFFFE, 0xE000, 0xFFFFFFFF), struct.pack("<HHL", 0xFFFE, 0xE00D, 0)
    sequence = struct.pack("<HH2sHL", 0x0028, 0x3010, b"SQ", 0, 0xFFFFFFFF) + begin + elements + end
    (tmp_path / "a.dcm").write_bytes(content[:pixels] + sequence + content[pixels:])
    with little_memory(), pytest.raises(InputError, match="its DICOM header is longer than"):
        open_image(tmp_path / "a.dcm")


def test_a_thousand_frames_are_one(tmp_path):
    (tmp_path / "a.gif").write_bytes(gif(40, 30, frames=1000))
    assert open_image(tmp_path / "a.gif").size == (40, 30)


def test_texts_and_profiles_that_unpack_to_gigabytes(tmp_path):
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(1_000_000)) for _ in range(200)) + packer.flush()
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        (tmp_path / "a.png").write_bytes(png(40, 30, chunk(kind, head + bomb)))
        with little_memory(), contextlib.suppress(InputError):
            open_image(tmp_path / "a.png")


@pytest.mark.timeout(30)
def test_devices_pipes_and_files_of_the_kernel(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "status.png").symlink_to("/proc/self/status")
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", MAX_BYTES + 1)
    for follow, reasons in ((False, ("leaves image_dir", "leaves image_dir")), (True, ("not a regular", "0 bytes"))):
        folder = ImageFolder(tmp_path, follow_links=follow)
        for name, reason in (
            ("pipe.png", "not a regular file"),
            ("zero.png", reasons[0]),
            ("status.png", reasons[1]),
            ("large.png", f"{MAX_BYTES + 1} bytes, more than {MAX_BYTES}"),
        ):
            with pytest.raises(InputError, match=reason):
                folder(name)
    for root in ("/dev", "/proc/self"):
        folder = ImageFolder(root)
        for name in ("zero", "random", "tty", "stdin", "mem", "fd/0", "environ", "cwd/README.md"):
            with pytest.raises(InputError):
                folder(name)


def sixteen_bits(side, kind, channels):
    """A PNG of 12 bits in 16, whose low bytes are read as well."""
    row = b"\0" + (np.tile(np.arange(side) % 4000, (channels, 1)).T.astype(">u2").tobytes())
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


SIDE = 2500
PLAIN = (np.arange(SIDE * SIDE) % 251).astype(np.uint8).reshape(SIDE, SIDE)
# Of 6 million pixels: (bytes of a pixel as it is decoded, how it is written).
LARGE = {
    "png": (1, lambda: saved(Image.fromarray(PLAIN), "PNG", compress_level=1)),
    "png of 16 bits": (2, lambda: saved(Image.fromarray(PLAIN.astype(np.uint16) * 257), "PNG", compress_level=1)),
    "png of 16-bit colours": (6, lambda: sixteen_bits(SIDE, 2, 3)),
    "png of 16-bit grey and alpha": (4, lambda: sixteen_bits(SIDE, 4, 2)),
    "png with alpha": (4, lambda: saved(Image.new("RGBA", (SIDE, SIDE)), "PNG", compress_level=1)),
    "jpeg": (3, lambda: saved(Image.new("RGB", (SIDE, SIDE)), "JPEG", progressive=True)),
    "webp": (3, lambda: saved(Image.new("RGB", (SIDE, SIDE)), "WEBP", lossless=True, method=0)),
    "tiff of floats": (4, lambda: saved(Image.fromarray(PLAIN.astype(np.float32)), "TIFF")),
    "jpeg 2000": (3, lambda: saved(Image.new("RGB", (SIDE, SIDE)), "JPEG2000")),
    "dicom of 16 bits": (2, lambda: written(PLAIN.astype(np.uint16), 16)),
    "dicom of 32 bits": (4, lambda: written(np.arange(SIDE**2, dtype=np.uint32).reshape(SIDE, SIDE) * 600, 32)),
    "dicom, run lengths": (2, lambda: written(PLAIN.astype(np.uint16), 16, syntax=RLELossless, PixelData=runs())),
    "dicom, jpeg 2000": (2, lambda: written(PLAIN.astype(np.uint16), 16, syntax=JPEG2000Lossless, PixelData=waves())),
}


def written(values, bits, **elements):
    buffer = io.BytesIO()
    dicom(buffer, values, bits, **elements)
    return buffer.getvalue()


def runs():
    plane = b"\x81\x05" * (SIDE * SIDE // 128 + 1)
    return encapsulate([struct.pack("<16L", 2, 64, 64 + len(plane), *[0] * 13) + plane * 2])


def waves():
    return encapsulate([saved(Image.fromarray(PLAIN.astype(np.uint16)), "JPEG2000", no_jp2=True)])


@pytest.mark.parametrize("name", LARGE)
def test_reading_takes_a_few_times_what_is_decoded(name, tmp_path):
    """At most eight times, whatever the format; and no more than MAX_PIXELS times BYTES_PER_PIXEL is decoded."""
    size, make = LARGE[name]
    (tmp_path / "a").write_bytes(make())
    with little_memory(8 * size * SIDE * SIDE // 1000 + 10_000):
        open_image(tmp_path / "a")


def test_deep_pixels_count_by_their_bytes(tmp_path):
    wide = np.zeros((100, 100), np.uint32)
    dicom(tmp_path / "a.dcm", wide, 32)
    (tmp_path / "a.tif").write_bytes(saved(Image.fromarray(wide.astype(np.float32)), "TIFF"))
    (tmp_path / "a.png").write_bytes(sixteen_bits(100, 6, 4))
    for name, bytes_of_pixel in (("a.dcm", 4), ("a.tif", 4), ("a.png", 8)):
        open_image(tmp_path / name, max_pixels=10_000 * bytes_of_pixel // BYTES_PER_PIXEL + 10)
        with pytest.raises(InputError, match="for each of max_pixels") as error:
            open_image(tmp_path / name, max_pixels=10_000 * bytes_of_pixel // BYTES_PER_PIXEL - 10)
        assert error.value.kind == "image is too large"


def test_a_tile_far_larger_than_its_image(tmp_path):
    side = 20_000
    body = zlib.compress(bytes(side * side), 1)
    tags = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 0, 325: len(body)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4)
    (tmp_path / "a.tif").write_bytes(head + body)
    with little_memory(), pytest.raises(InputError, match="of 100 x 100 pixels has tiles of 20000 x 20000"):
        open_image(tmp_path / "a.tif")


def test_any_bytes_are_an_image_or_one_line(tmp_path):
    """Two hundred mutations of each of seven formats, in a process whose decoders' own chatter is not ours."""
    program = """
import io, sys
import numpy as np
from PIL import Image
from modules.runtime.errors import InputError
from modules.data.images import open_image
rng = np.random.default_rng(5)
pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
counts = [0, 0]
for form, options in (("PNG", {}), ("JPEG", {}), ("TIFF", {"compression": "tiff_lzw"}), ("GIF", {}), ("WEBP", {}),
                      ("JPEG2000", {}), ("BMP", {})):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    for _ in range(200):
        content = bytearray(buffer.getvalue())
        for _ in range(rng.integers(1, 5)):
            content[min(int(rng.exponential(80)), len(content) - 1)] = rng.integers(256)
        if rng.random() < 0.2:
            del content[rng.integers(len(content)):]
        with open(sys.argv[1], "wb") as file:
            file.write(content)
        try:
            assert open_image(sys.argv[1]).mode in ("L", "RGB")
            counts[0] += 1
        except InputError:
            counts[1] += 1
print(*counts)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "image"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, refused = map(int, done.stdout.split())
    assert read + refused == 1400 and read > 50 and refused > 50
