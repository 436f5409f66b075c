"""--jpeg_draft: which files are decoded smaller, how close the pixels are, and that nothing mixes the two kinds."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from modules.config import EXPORTED, Config
from modules.data.images import ImageFolder, open_image
from modules.data.shards import Shard, ShardImages
from modules.data.transforms import eval_transform, train_transform
from modules.inference.study_files import StudyFiles
from modules.run.data import image_folder, image_source, image_transform
from modules.run.predictor import StudyReader, load_predictor
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from tests.data.test_feature_cache import build as build_features
from tests.data.test_image_cache import LOOK
from tests.data.test_image_cache import build as build_images

WIDTH, HEIGHT = 400, 480


def film(width=WIDTH, height=HEIGHT):
    """(H, W) uint8: smooth, with edges, as a radiograph has them."""
    y, x = np.mgrid[:height, :width]
    values = 127 + 60 * np.sin(x / 31) * np.cos(y / 47) + 50 * ((x // 80 + y // 80) % 2)
    return np.clip(values, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Grey, of sides that no scale divides, in colour, turned by its header, small; and a PNG file."""
    folder = tmp_path_factory.mktemp("pictures")
    picture, turned = Image.fromarray(film()), Image.Exif()
    turned[274] = 6  # by 90 degrees clockwise
    picture.save(folder / "grey.jpg", quality=95)
    Image.fromarray(film(WIDTH + 3, HEIGHT + 9)).save(folder / "odd.jpg", quality=95)
    picture.convert("RGB").save(folder / "colour.jpg", quality=95)
    picture.save(folder / "turned.jpg", quality=95, exif=turned)
    Image.fromarray(film(60, 72)).save(folder / "small.jpg", quality=95)
    picture.save(folder / "film.png")
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """Sizes at which JPEG files are decoded from now on."""
    sizes, load = [], JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda self: (sizes.append(self.size), load(self))[1])
    return sizes


@pytest.mark.parametrize(
    ("name", "size", "scaled", "resized"),
    [
        ("grey.jpg", 50, (100, 120), (57, 68)),  # a quarter is enough, an eighth is not
        ("grey.jpg", 44, (50, 60), (50, 60)),
        ("grey.jpg", 176, (400, 480), (400, 480)),  # to 201 x 241: not even half
        ("odd.jpg", 44, (51, 62), (50, 60)),
        ("colour.jpg", 50, (100, 120), (57, 68)),
        ("turned.jpg", 50, (100, 120), (68, 57)),
        ("small.jpg", 50, (60, 72), (60, 72)),
        ("film.png", 50, None, (400, 480)),
    ],
)
def test_the_smallest_scale_that_is_not_below_the_resized_image(pictures, decoded, name, size, scaled, resized):
    transform = train_transform(size, *LOOK, jpeg_draft=True)
    image = ImageFolder(pictures, draft=transform.draft)(name)
    assert set(decoded) == ({scaled} if scaled else set())
    assert image.size == resized and image.mode == ("RGB" if name == "colour.jpg" else "L")
    whole = ImageFolder(pictures)(name)
    draft, full = (transform.resized(one).astype(int) for one in (image, whole))
    # The same geometry, so that random crops agree, and close; equal where nothing was skipped.
    assert draft.shape == full.shape
    assert np.abs(draft - full).mean() < 3
    assert np.array_equal(draft, full) == (image.size == whole.size)
    rng = torch.Generator()
    crops = [transform.pixels(one, rng.manual_seed(7)).float() for one in (image, whole)]
    assert (crops[0] - crops[1]).abs().mean() < 3


def test_it_is_off_unless_asked_for():
    assert Config().jpeg_draft is False and "jpeg_draft" in EXPORTED
    extractor = SimpleNamespace(mean=LOOK[0], std=LOOK[1])
    for asked in (False, True):
        for augment in (False, True):
            transform = image_transform(Config(jpeg_draft=asked), extractor, augment=augment)
            assert (transform.draft is not None) == asked


def test_every_source_of_a_run_takes_drafts(pictures):
    config = Config(jpeg_draft=True, image_dir=str(pictures))
    transform = eval_transform(50, *LOOK, jpeg_draft=True)
    for source in (image_folder(config, transform), image_source(config, [], transform, negatives=False)):
        assert source("grey.jpg").size == (50, 50)
    assert image_folder(config)("grey.jpg").size == (WIDTH, HEIGHT)  # for people to look at
    reader = StudyReader([StudyFiles("a", (pictures / "grey.jpg",))], 1, 1, transform.draft)
    [[(_, [image], _)]] = list(reader)
    assert image.size == (50, 50)


def test_images_in_shards(pictures, monkeypatch):
    images = ShardImages(
        "", (Shard("0.tar", 1, "", (0,)),), [["grey.jpg"]], draft=eval_transform(50, *LOOK).resized_size
    )
    content = {(0, "grey.jpg"): (pictures / "grey.jpg").read_bytes()}
    monkeypatch.setattr(ShardImages, "_content", lambda *_: content)
    assert images("grey.jpg").size == (50, 50)


def test_caches_of_drafts_are_files_of_their_own(pictures, demo, tmp_path):
    plain, draft = (train_transform(50, *LOOK, jpeg_draft=asked) for asked in (False, True))
    caches = [
        build_images(pictures, tmp_path / "images", one, paths=["grey.jpg"], draft=one.draft) for one in (plain, draft)
    ]
    assert caches[0].file != caches[1].file
    for cache, transform in zip(caches, (plain, draft), strict=True):
        read = ImageFolder(pictures, draft=transform.draft)
        assert np.array_equal(cache("grey.jpg"), transform.resized(read("grey.jpg")))
    assert not np.array_equal(caches[0]("grey.jpg"), caches[1]("grey.jpg"))
    extractor = torch.nn.Identity()
    extractor.patches_per_view, extractor.width = 1, 1
    extractor.forward = lambda pixels: (pixels.flatten(1).mean(1)[:, None, None], None, None)
    made = [
        build_features(demo, tmp_path, extractor, transform=eval_transform(32, *LOOK, jpeg_draft=asked)).file
        for asked in (False, True)
    ]
    assert made[0] != made[1]
    assert repr(plain) == repr(draft)  # keys of caches that are there already stay what they were


def test_without_images_there_is_nothing_to_decode():
    with pytest.raises(InputError, match="--jpeg_draft true: with --detection_features no image is read"):
        Config(jpeg_draft=True, detection_features="x.hdf5")


def test_a_broken_file_is_named(pictures, tmp_path):
    (tmp_path / "cut.jpg").write_bytes((pictures / "grey.jpg").read_bytes()[:3000])
    with pytest.raises(InputError, match="cut.jpg.* cannot be decoded"):
        open_image(tmp_path / "cut.jpg", draft=lambda width, height: (50, 60))


@pytest.mark.thorough
def test_a_run_names_it_and_its_checkpoint_keeps_it(train, tmp_path):
    """And with --precision auto, which each machine that loads the checkpoint decides for itself."""
    folder = train("--jpeg_draft", "true", "--precision", "auto", "--clinical", "false", "--floors", "false")
    results = json.loads((folder / "results.json").read_text())
    assert results["config"]["jpeg_draft"] is True and results["config"]["precision"] == "float32"
    assert "JPEG files read as drafts" in (folder / "report.html").read_text()
    [row] = csv.DictReader((tmp_path / "records" / "iu_xray.csv").open())
    assert row["jpeg_draft"] == "True"
    best = str(folder / "model_best.pth")
    assert load_checkpoint(best)["config"]["precision"] == "auto"
    predictor = load_predictor(best, {})
    assert predictor.transform.draft is not None and predictor.precision == "float32"
