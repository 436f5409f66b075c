"""Stored features of a frozen extractor: the same numbers, computed once, found again, and never for other weights."""

import copy
import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from modules.data.feature_cache import build_feature_cache
from modules.data.images import ImageFolder
from modules.data.transforms import eval_transform
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime.errors import InputError
from modules.runtime.records import private_folder
from modules.runtime.run_log import Bar
from tests.gloo_support import run_together
from tests.transform_support import LOOK


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return VisualExtractor("resnet18", image_size=32, frozen=True)


def build(demo, folder, extractor, paths=None, **changes):
    found = sorted(path.relative_to(demo / "images").as_posix() for path in (demo / "images").glob("*/*.png"))[:5]
    settings = {
        "extractor": extractor,
        "transform": eval_transform(32, *LOOK),
        "device": torch.device("cpu"),
        "batch_size": 2,
        "progress": Bar,
    } | changes
    return build_feature_cache(folder, ImageFolder(demo / "images"), paths or found, **settings)


def test_features_are_the_extractors(demo, tmp_path, extractor):
    cache = build(demo, tmp_path, extractor)
    images = ImageFolder(demo / "images")
    for path in cache.rows:
        pixels = eval_transform(32, *LOOK)(images(path))
        expected, _, _ = extractor(pixels[None, None])
        torch.testing.assert_close(cache(path), expected[0], rtol=1e-5, atol=1e-5)
    assert oct(cache.file.stat().st_mode)[-3:] == "600" and len(list(tmp_path.iterdir())) == 1


def made_together(images, folder):
    """The bytes of the file that the processes make together."""
    torch.manual_seed(0)
    extractor = VisualExtractor("resnet18", image_size=32, frozen=True)
    return torch.frombuffer(bytearray(build(images, folder, extractor).file.read_bytes()), dtype=torch.uint8)


@pytest.mark.thorough
def test_processes_make_the_file_together(demo, tmp_path):
    alone = made_together(demo, private_folder(tmp_path / "alone"))
    for result in run_together(made_together, 3, tmp_path, demo, private_folder(tmp_path / "together")):
        assert torch.equal(result, alone)


def test_the_file_is_found_again_and_belongs_to_weights_and_images(demo, tmp_path, extractor):
    class Unused(torch.nn.Module):
        patches_per_view, width = extractor.patches_per_view, extractor.width

        def state_dict(self):
            return extractor.state_dict()

        def __repr__(self):
            return repr(extractor)

    first = build(demo, tmp_path, extractor)
    assert build(demo, tmp_path, Unused()).file == first.file
    torch.manual_seed(1)
    assert build(demo, tmp_path, VisualExtractor("resnet18", image_size=32, frozen=True)).file != first.file
    other = copy.deepcopy(extractor)
    other.model[2] = torch.nn.GELU()  # the same weights
    assert build(demo, tmp_path, other).file != first.file
    assert build(demo, tmp_path, extractor, transform=eval_transform(32, (0.5,) * 3, LOOK[1])).file != first.file
    image = demo / "images" / next(iter(first.rows))
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert build(demo, tmp_path, extractor).file != first.file
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_splits_of_the_same_images_share_the_file(demo, tmp_path, extractor):
    first = build(demo, tmp_path, extractor)
    again = build(demo, tmp_path, extractor, list(reversed(first.rows)))
    assert again.file == first.file and len(list(tmp_path.iterdir())) == 1
    for path in first.rows:
        assert torch.equal(again(path), first(path))


def test_other_images_of_the_same_names_sizes_and_times_have_a_file_of_their_own(tmp_path, extractor):
    files = []
    for name, grey in (("one", 10), ("two", 200), ("link", None)):
        images = tmp_path / name / "images"
        if grey is None:
            (tmp_path / name).symlink_to(tmp_path / "two")
        else:
            images.mkdir(parents=True)
            Image.new("L", (40, 40), grey).save(images / "a.bmp")
            os.utime(images / "a.bmp", ns=(1, 1))
        files.append(build(tmp_path / name, tmp_path, extractor, paths=["a.bmp"]).file)
    assert files[0] != files[1] == files[2]


@pytest.mark.thorough
def test_training_on_stored_features(train, demo_index, tmp_path):
    """Scores with and without the store are those of one and the same model; its loader processes read the file too."""
    frozen = ["--freeze_visual_extractor", "true", "--negative_index", demo_index, "--num_workers", 1]
    folder = train(*frozen, "--feature_cache", tmp_path / "cache", "--epochs", 2)
    with_cache = json.loads((folder / "results.json").read_text())
    assert len(list((tmp_path / "cache").iterdir())) == 1

    from modules.flags import parse_flags
    from modules.run.testing import run_testing

    run_testing(*parse_flags(["--load", str(folder / "model_best.pth"), "--feature_cache", ""], "main_test.py", ""))
    without = json.loads((folder / "results.json").read_text())
    assert without["config"]["feature_cache"] == ""
    for row, scores in with_cache["test"].items():
        numbers = {name: value for name, value in scores.items() if value is not None}
        assert {name: without["test"][row][name] for name in numbers} == pytest.approx(numbers, rel=1e-4), row


@pytest.mark.thorough
def test_an_averaged_grid_is_the_same_with_and_without_the_store(train, tmp_path):
    from modules.flags import parse_flags
    from modules.run.predictor import load_predictor
    from modules.run.testing import run_testing

    flags = ["--freeze_visual_extractor", "true", "--feature_cache", tmp_path / "cache", "--image_size", 64]
    folder = train(*flags, "--ithn", "off", "--feature_grid", 1)
    with_cache = (folder / "res.csv").read_text()
    [file] = (tmp_path / "cache").glob("*.npy")
    assert np.load(file, mmap_mode="r").shape[1] == 1
    weights = folder / "model_best.pth"
    predictor = load_predictor(str(weights), {"device": "cpu"})
    assert predictor.backbone.visual_extractor.patches_per_view == 1
    run_testing(*parse_flags(["--load", str(weights), "--feature_cache", ""], "main_test.py", ""))
    assert (folder / "res.csv").read_text() == with_cache
    # Another grid has a file of its own, and one that cannot be is a line.
    train(*flags, "--ithn", "off", "--save_dir", tmp_path / "whole")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    with pytest.raises(InputError, match="feature_grid 3: at most 2"):
        train(*flags, "--feature_grid", 3)


def test_only_a_frozen_extractor_is_stored(train, tmp_path):
    with pytest.raises(InputError, match="--freeze_visual_extractor true"):
        train("--feature_cache", tmp_path)


@pytest.mark.thorough
def test_a_resumed_run_goes_on_with_the_features_that_it_began_with(train, demo_index, tmp_path):
    """The extractor's weights come from a file that a resume does not read again: they are the checkpoint's."""
    torch.manual_seed(5)
    torch.save(resnet18().state_dict(), tmp_path / "weights.pth")
    cut = tmp_path / "cut"
    flags = [
        "--freeze_visual_extractor",
        "true",
        "--feature_cache",
        tmp_path / "cache",
        "--ithn",
        "off",
        "--lr_scheduler",
        "constant",
        "--visual_extractor_weights",
        tmp_path / "weights.pth",
    ]
    whole = train(*flags, "--epochs", 2, "--save_dir", tmp_path / "whole")
    train(*flags, "--epochs", 1, "--save_dir", cut)
    again = train("--resume", cut / "current_checkpoint.pth", "--epochs", 2, "--save_dir", cut)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    first, second = (json.loads((folder / "history.json").read_text()) for folder in (whole, again))
    assert [row["train_loss"] for row in first] == [row["train_loss"] for row in second]
    assert (whole / "res.csv").read_text() == (again / "res.csv").read_text()


class Interrupted(torch.nn.Module):
    """The extractor, which ends the program at its third batch; it counts the images that it sees."""

    def __init__(self, inner, batches):
        super().__init__()
        self.inner, self.batches, self.seen = inner, batches, 0
        self.patches_per_view, self.width = inner.patches_per_view, inner.width

    def state_dict(self):
        return self.inner.state_dict()

    def forward(self, images):
        if self.batches == 0:
            raise KeyboardInterrupt
        self.batches -= 1
        self.seen += len(images)
        return self.inner(images)


def test_an_interrupted_file_is_continued(demo, tmp_path, extractor):
    whole = build(demo, private_folder(tmp_path / "whole"), extractor)
    folder = private_folder(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        build(demo, folder, Interrupted(extractor, 2))
    [partial] = folder.iterdir()
    with open(partial, "ab") as file:
        file.write(b"half a row")
    rest = Interrupted(extractor, 9)
    again = build(demo, folder, rest)
    assert rest.seen == 1 and again.file.read_bytes() == whole.file.read_bytes()
    assert [path.name for path in folder.iterdir()] == [again.file.name]


class Held(Interrupted):
    """An extractor that stops before its first batch until ``go`` is set."""

    def __init__(self, inner):
        super().__init__(inner, 9)
        self.begun, self.go = threading.Event(), threading.Event()

    def forward(self, images):
        self.begun.set()
        assert self.go.wait(60)
        return super().forward(images)


def test_a_second_training_waits_for_the_first_ones_features(demo, tmp_path, extractor, caplog):
    caplog.set_level(logging.INFO, logger="ithn")
    folder, first, second = private_folder(tmp_path / "shared"), Held(extractor), Held(extractor)
    second.go.set()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(build, demo, folder, first)
        assert first.begun.wait(60)
        two = pool.submit(build, demo, folder, second)
        end = time.monotonic() + 60
        while "waits for them" not in caplog.text and not two.done() and time.monotonic() < end:
            time.sleep(0.01)
        first.go.set()
        files = {one.result(60).file, two.result(60).file}
    assert "waits for them" in caplog.text and first.seen == 5 and second.seen == 0
    assert list(folder.iterdir()) == list(files)
    assert files.pop().read_bytes() == build(demo, private_folder(tmp_path / "own"), extractor).file.read_bytes()


def test_workers_decode_and_halves_are_stored(demo, tmp_path, extractor):
    whole = build(demo, tmp_path, extractor)
    half = build(demo, tmp_path, extractor, dtype="float16", workers=2)
    assert half.file != whole.file and half.file.stat().st_size < 0.6 * whole.file.stat().st_size
    for path in whole.rows:
        assert half(path).dtype == torch.float32
        torch.testing.assert_close(half(path), whole(path), rtol=1e-3, atol=1e-3)
    other = build(demo, private_folder(tmp_path / "workers"), extractor, workers=2)
    assert other.file.read_bytes() == whole.file.read_bytes()
    path = demo / "images" / next(iter(whole.rows))
    content = path.read_bytes()
    path.write_bytes(b"no image")
    try:
        for workers in (0, 1):
            with pytest.raises(InputError, match="cannot be decoded"):
                build(demo, tmp_path, extractor, workers=workers)
    finally:
        path.write_bytes(content)
