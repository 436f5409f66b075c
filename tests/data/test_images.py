"""Images of every mode, paths that try to leave, broken files."""

import contextlib
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from modules.data.images import MAX_BYTES, ImageFolder, blank_problem, load_image, open_image, refuse_blank
from modules.runtime.errors import InputError

torch.set_num_threads(1)
RAMP = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(tmp_path, image, name="x.png", **options):
    path = tmp_path / name
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def pixels(path):
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- modes


def test_greyscale_is_copied_to_three_channels(tmp_path):
    path = saved(tmp_path, RAMP)
    assert np.array_equal(pixels(path), np.repeat(RAMP[..., None], 3, axis=2))
    assert open_image(path).mode == "L"


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.bmp", "x.webp", "x.jp2"])
def test_rgb_comes_in_unchanged(tmp_path, name):
    colours = noise(24, 32, 3)
    options = {"lossless": True} if name.endswith("webp") else {}
    assert np.array_equal(pixels(saved(tmp_path, colours, name, **options)), colours)


def test_full_range_16_bit_is_divided_by_257(tmp_path):
    deep = RAMP.astype(np.uint16) * 257
    for name in ("x.png", "x.tif"):
        assert np.array_equal(pixels(saved(tmp_path, deep, name))[..., 0], RAMP)
    assert np.array_equal(pixels(saved(tmp_path, deep.astype(">u2"), "big.tif"))[..., 0], RAMP)


@pytest.mark.parametrize(("highest", "full"), [(255, 255), (256, 1023), (4095, 4095), (3000, 4095), (16383, 16383)])
def test_shallower_data_in_16_bit_files_keeps_its_contrast(tmp_path, highest, full):
    deep = np.linspace(0, highest, 24 * 32).astype(np.uint16).reshape(24, 32)
    expected = np.floor(deep * 255.0 / full + 0.5)
    assert np.array_equal(pixels(saved(tmp_path, deep))[..., 0], expected)


def test_white_is_zero_tiff_is_inverted_at_every_depth(tmp_path):
    # Pillow inverts 8 bits on writing and on reading, deeper values on neither.
    shallow = saved(tmp_path, RAMP, "8.tif", tiffinfo={262: 0})
    assert (255 - RAMP).tobytes() in shallow.read_bytes()
    assert np.array_equal(pixels(shallow)[..., 0], RAMP)
    deep = saved(tmp_path, (255 - RAMP).astype(np.uint16) * 257, "16.tif", tiffinfo={262: 0})
    assert np.array_equal(pixels(deep)[..., 0], RAMP)


def deep_png(values):
    """A PNG of 16-bit channels, values (H, W, C) of grey with alpha, RGB or RGBA, which Pillow does not write."""
    height, width, channels = values.shape

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    chunks = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("full", [255, 1023, 4095, 16383, 65535])
def test_16_bit_colours_keep_their_contrast_as_greys_do(tmp_path, full, alpha):
    ramp = np.linspace(0, full, 24 * 32).round().astype(np.uint16).reshape(24, 32)
    opaque = [np.full_like(ramp, 65535)] if alpha else []
    expected = np.rint(ramp * (255 / full)) if full < 65535 else ramp >> 8  # as Pillow has them
    for colours in ([ramp, ramp // 2, ramp * 0], [ramp] if alpha else [ramp] * 3):
        path = tmp_path / "x.png"
        path.write_bytes(deep_png(np.stack([*colours, *opaque], axis=-1)))
        assert np.array_equal(pixels(path)[..., 0], expected)


def deep_tiff(values, order="<", planes=False, compressed=False):
    """A TIFF of values (H, W, 3), 16 bits each, in three strips: of lines, or of the colours."""
    height, width, _ = values.shape
    parts = np.moveaxis(values, -1, 0) if planes else np.split(values, 3)
    strips = [part.astype(f"{order}u2").tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    lengths = [len(strip) for strip in strips]
    at = 8 + 2 + 10 * 12 + 4
    places = [at + 30 + sum(lengths[:number]) for number in range(3)]
    short = {256: width, 257: height, 259: 8 if compressed else 1, 262: 2, 277: 3, 278: len(parts[0])}
    short[284] = 2 if planes else 1
    tags = {tag: struct.pack(f"{order}HHLHH", tag, 3, 1, value, 0) for tag, value in short.items()}
    for tag, kind, place in ((258, 3, at), (273, 4, at + 6), (279, 4, at + 18)):
        tags[tag] = struct.pack(f"{order}HHLL", tag, kind, 3, place)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, len(tags))
    content = struct.pack(f"{order}3H6L", 16, 16, 16, *places, *lengths) + b"".join(strips)
    return head + b"".join(tags[tag] for tag in sorted(tags)) + bytes(4) + content


def test_16_bit_colours_of_a_tiff_in_either_byte_order(tmp_path):
    ramp = np.linspace(0, 4095, 24 * 32).astype(np.uint16).reshape(24, 32)
    path = tmp_path / "x.tif"
    for order in "<>":
        path.write_bytes(deep_tiff(np.stack([ramp // 2, ramp, ramp], axis=-1), order))
        assert np.array_equal(pixels(path)[..., 2], np.rint(ramp * (255 / 4095)))


def test_16_bit_planes_of_a_tiff_are_refused_where_pillow_misreads_them(tmp_path):
    path = tmp_path / "x.tif"
    ramp = np.stack([np.linspace(0, 4095, 24 * 32).astype(np.uint16).reshape(24, 32)] * 3, axis=-1)
    for values, compressed in ((ramp, False), (ramp * 16, False), (ramp, True)):
        path.write_bytes(deep_tiff(values, planes=True, compressed=compressed))
        with pytest.raises(InputError, match="x.tif' cannot be decoded: its 16-bit colours lie in planes"):
            load_image(path)
    path.write_bytes(deep_tiff(ramp * 16, planes=True, compressed=True))
    assert np.array_equal(pixels(path), ramp >> 4)


@pytest.mark.parametrize("full", [1023, 4095, 65535])
def test_16_bit_colours_of_a_ppm(tmp_path, full):
    ramp = np.linspace(0, full, 24 * 32).astype(np.uint16).reshape(24, 32)
    path = tmp_path / "x.ppm"
    path.write_bytes(b"P6 32 24 65535\n" + np.stack([ramp, ramp // 2, ramp], axis=-1).astype(">u2").tobytes())
    assert np.array_equal(pixels(path)[..., 2], np.rint(ramp * (255 / full)) if full < 65535 else ramp >> 8)


@pytest.mark.parametrize(("magic", "top"), [("P6", 16383), ("P6", 4095), ("P3", 65535), ("P3", 16383), ("P3", 4095)])
def test_16_bit_colours_of_other_ppms_are_scaled_as_greyscale_is(tmp_path, magic, top):
    ramp = np.linspace(0, 4095, 24 * 32).astype(np.uint16).reshape(24, 32)
    values = np.stack([ramp, ramp // 2, ramp], axis=-1)
    body = values.astype(">u2").tobytes() if magic == "P6" else " ".join(map(str, values.ravel())).encode()
    (tmp_path / "x.ppm").write_bytes(f"{magic} 32 24 {top}\n".encode() + body)
    (tmp_path / "x.pgm").write_bytes(f"P5 32 24 {top}\n".encode() + ramp.astype(">u2").tobytes())
    colours, grey = pixels(tmp_path / "x.ppm"), pixels(tmp_path / "x.pgm")
    assert colours.max() == 255 and np.array_equal(colours[..., 2], grey[..., 0])
    assert abs(colours[..., 1].astype(int) - grey[..., 0] / 2).max() <= 1


def test_floats_and_wide_integers_are_stretched(tmp_path):
    expected = np.rint(np.linspace(0, 255, 12)).reshape(3, 4)
    for values in (np.linspace(-2.5, 7.5, 12, dtype=np.float32), np.linspace(-50000, 500000, 12).astype(np.int32)):
        assert np.array_equal(pixels(saved(tmp_path, values.reshape(3, 4), "x.tif"))[..., 0], expected)
    flat = saved(tmp_path, np.full((3, 4), 7.0, np.float32), "flat.tif")
    assert not pixels(flat).any()
    with pytest.raises(InputError, match="x.tif' cannot be decoded: it holds values that are not finite"):
        load_image(saved(tmp_path, np.full((3, 4), np.nan, np.float32), "x.tif"))


def test_palette_one_bit_and_cmyk(tmp_path):
    colours = Image.fromarray(noise(24, 32, 3)).quantize(16)
    assert np.array_equal(pixels(saved(tmp_path, colours)), np.asarray(colours.convert("RGB")))
    bits = Image.fromarray(RAMP > 100)
    assert bits.mode == "1" and set(np.unique(pixels(saved(tmp_path, bits)))) == {0, 255}
    cmyk = Image.merge("CMYK", [Image.new("L", (8, 8), value) for value in (0, 255, 255, 0)])
    assert np.array_equal(pixels(saved(tmp_path, cmyk, "x.tif"))[0, 0], [255, 0, 0])
    red, green, blue = pixels(saved(tmp_path, cmyk, "x.jpg"))[0, 0]
    assert red > 240 and green < 20 and blue < 20


def test_alpha_is_laid_on_black(tmp_path):
    grey = Image.merge("LA", [Image.fromarray(RAMP), Image.new("L", (32, 24), 255)])
    assert np.array_equal(pixels(saved(tmp_path, grey))[..., 0], RAMP)
    colours = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    colours.putpixel((1, 0), (255, 255, 255, 0))
    assert pixels(saved(tmp_path, colours)).tolist() == [[[200, 100, 50], [0, 0, 0]]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 255, 255, 10, 20, 30])
    assert pixels(saved(tmp_path, palette, transparency=0)).tolist() == [[[0, 0, 0], [10, 20, 30]]]
    assert pixels(saved(tmp_path, np.array([[9, 80]], np.uint8), transparency=9))[0, :, 0].tolist() == [0, 80]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(pixels(saved(tmp_path, RAMP, exif=exif))[..., 0], np.rot90(RAMP, -1))
    assert load_image(saved(tmp_path, RAMP, "x.jpg", exif=exif)).size == (24, 32)


# ---- blank images


def test_blank_images_are_told_from_dark_ones(tmp_path):
    for value in (0, 7, 255):
        image = Image.new("RGB", (40, 30), (value,) * 3)
        kind, reason = blank_problem(image)
        assert kind == "image is blank" and str(value) in reason
        with pytest.raises(InputError, match="image 'x.png' is blank: every pixel has the grey value"):
            refuse_blank(image, "x.png")
    clipped = Image.fromarray(
        np.where(np.arange(1200) < 1120, 255, np.arange(1200) % 200).astype(np.uint8).reshape(30, 40)
    )
    assert blank_problem(clipped)[0] == "image is nearly blank"
    assert "93% of its pixels have grey values around" in refuse_blank(clipped, "x.png")
    outlier = noise(30, 40).astype(np.uint16) * 16  # of 12 bits, and a burnt-in letter of 16
    outlier[0, 0] = 65535
    assert "grey values from 0 to 16, of 0 to 255" in refuse_blank(open_image(saved(tmp_path, outlier)), "x.png")
    half_black = Image.fromarray(np.concatenate([np.zeros((30, 40), np.uint8), noise(30, 40)]))
    dark = Image.fromarray(noise(30, 40) // 10)
    for image in (half_black, dark, Image.fromarray(RAMP)):
        assert blank_problem(image) is None and refuse_blank(image, "x.png") == ""


# ---- what is refused


def png_of(width, height):
    """A PNG whose header announces a size, with hardly any data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(12000, 12000))
    with pytest.raises(InputError, match="12000 x 12000 pixels, more than max_pixels, 89000000"):
        load_image(path)
    path.write_bytes(png_of(60000, 60000))
    with pytest.raises(InputError, match="bomb.png' cannot be decoded"):
        load_image(path)
    with pytest.raises(InputError, match="more than max_pixels, 700"):
        ImageFolder(tmp_path, max_pixels=700)(saved(tmp_path, RAMP).name)


def test_a_strip_that_resizing_would_blow_up_is_refused(tmp_path):
    with pytest.raises(InputError, match="60 x 1 pixels: its sides may differ 50-fold"):
        load_image(saved(tmp_path, np.zeros((1, 60), np.uint8)))


def test_files_that_are_no_images(tmp_path):
    folder = ImageFolder(tmp_path)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "large.dcm").touch()
    os.truncate(tmp_path / "large.dcm", MAX_BYTES + 1)
    for name, reason in {
        "large.dcm": f"{MAX_BYTES + 1} bytes, more than {MAX_BYTES}",
        "pointer.png": "pointer of Git LFS",
        "missing.png": "No such file or directory",
        "empty.png": "is empty (0 bytes)",
        "text.png": "cannot be decoded: not an image",
        "page.png": "cannot be decoded: not an image",  # Pillow would start Ghostscript for it
        "folder.png": "is not a regular file",
        "pipe.png": "is not a regular file",
    }.items():
        for read in (folder, lambda name: open_image(tmp_path / name)):  # as in training, and as in predict.py
            with pytest.raises(InputError) as caught:
                read(name)
            assert name in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.webp"])
def test_truncated_and_flipped_files_raise_input_error_or_decode(tmp_path, name):
    path = saved(tmp_path, noise(40, 50, 3), name)
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    for cut in [1, 10, len(content) // 2, len(content) - 30, *rng.integers(1, len(content) - 30, 20)]:
        path.write_bytes(content[:cut])
        with pytest.raises(InputError, match="cannot be decoded|pixels"):
            load_image(path)
    for position in rng.integers(0, min(len(content), 600), 100):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(flipped))
        with contextlib.suppress(InputError):
            assert load_image(path).mode == "RGB"


@pytest.fixture
def folder(tmp_path):
    """images/ in a place that holds a secret beside it, with links in and out."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    saved(tmp_path, RAMP, "secret.png")
    saved(tmp_path, RAMP, "images/a/0.png")
    (tmp_path / "images" / "out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "images" / "up").symlink_to(tmp_path)
    (tmp_path / "images" / "in.png").symlink_to("a/0.png")
    (tmp_path / "images-other").mkdir()
    saved(tmp_path, RAMP, "images-other/0.png")
    return tmp_path


def test_no_path_leaves_the_folder(folder):
    images = ImageFolder(folder / "images")
    outside = ["../secret.png", "a/../../secret.png", str(folder / "secret.png"), "/dev/zero", "out.png",
               "up/secret.png", "../images-other/0.png", "", ".", "a\0.png"]  # fmt: skip
    for path in [*outside, str(folder / "images" / "a" / "0.png")]:
        with pytest.raises(InputError, match="leaves image_dir"):
            images(path)
    assert images("a/0.png").size == images("in.png").size == (32, 24)


def test_image_dir_itself_may_be_a_link(folder):
    (folder / "link").symlink_to(folder / "images")
    images = ImageFolder(folder / "link")
    assert images("a/0.png").size == (32, 24)
    with pytest.raises(InputError, match="leaves image_dir"):
        images("../secret.png")


def test_links_are_followed_only_where_asked(folder):
    images = ImageFolder(folder / "images", follow_links=True)
    assert images("out.png").size == images("up/secret.png").size == (32, 24)
    with pytest.raises(InputError, match="leaves image_dir"):
        images("../secret.png")


def test_missing_image_dir_is_named(tmp_path):
    with pytest.raises(InputError, match="--image_dir .*nowhere: is not a folder"):
        ImageFolder(tmp_path / "nowhere")
