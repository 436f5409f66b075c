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

import pytest
from PIL import Image

from modules.data.images import MAX_BYTES, ImageFolder, open_image
from modules.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GREY = Image.new("L", (40, 30), 90)


@contextlib.contextmanager
def little_memory():
    """Fails where this process needed 60 MB more than it had at the start; each bomb here would take 80 MB or more."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    yield
    assert memory("VmHWM") - before < 60_000


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
