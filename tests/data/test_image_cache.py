"""Kept images: the same tensors as decoding, made once, kept up to date, private, and safe for several processes."""

import json
import logging
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from modules.data import image_cache
from modules.data.datasets import collate
from modules.data.image_cache import build_image_cache
from modules.data.images import ImageFolder
from modules.data.sample_order import keyed_generator
from modules.data.transforms import eval_transform, train_transform
from modules.runtime.errors import InputError
from tests.transform_support import LOOK

torch.set_num_threads(1)
TRAIN, EVALUATION = train_transform(16, *LOOK, resize=24), eval_transform(16, *LOOK)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path):
    """Folder of images in every shape and mode that matters to the cache."""
    folder = tmp_path / "images"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, values, options in [
        ("wide.png", noise(30, 47), {}),
        ("high.png", noise(61, 33), {}),
        ("small.png", noise(9, 7), {}),
        ("colour.png", noise(30, 40, 3), {}),
        ("grey.jpg", noise(30, 40), {"exif": turned}),
        ("grey_as_rgb.png", np.repeat(noise(30, 40, 1), 3, axis=2), {}),
        ("deep.png", noise(30, 40).astype(np.uint16) * 257, {}),
        ("see_through.png", noise(30, 40, 4), {}),
    ]:
        Image.fromarray(values).save(folder / name, **options)
    return folder


def build(pictures, folder, transform=TRAIN, paths=None, workers=0, **limits):
    paths = paths or sorted(path.name for path in pictures.iterdir())
    folder.mkdir(mode=0o700, exist_ok=True)
    return build_image_cache(
        folder,
        ImageFolder(pictures, **limits),
        paths,
        transform=transform,
        workers=workers,
        progress=lambda items, description: items,
    )


def decoded(monkeypatch):
    """Names of the image files that are decoded from now on."""
    names, original = [], image_cache.ImageFolder.__call__
    monkeypatch.setattr(
        image_cache.ImageFolder, "__call__", lambda self, path: (names.append(path), original(self, path))[1]
    )
    return names


@pytest.mark.parametrize("transform", [TRAIN, EVALUATION], ids=["train", "evaluation"])
def test_tensors_are_bit_equal_to_decoding(pictures, tmp_path, transform, monkeypatch):
    cache, images = build(pictures, tmp_path / "cache", transform), ImageFolder(pictures)
    expected = {
        (path, seed): transform(images(path), keyed_generator(seed)) for path in cache.rows for seed in range(6)
    }
    names = decoded(monkeypatch)
    for (path, seed), tensor in expected.items():
        assert torch.equal(transform(cache(path), keyed_generator(seed)), tensor), path
    assert not names
    assert cache("grey_as_rgb.png").shape[0] == cache("wide.png").shape[0] == 1
    assert cache("colour.png").shape[0] == cache("see_through.png").shape[0] == 3


def test_worker_processes_make_the_same_file_and_draw_no_random_number(pictures, tmp_path):
    before = torch.get_rng_state()
    alone, shared = (build(pictures, tmp_path / f"cache{workers}", workers=workers).file for workers in (0, 2))
    assert alone.name == shared.name and alone.read_bytes() == shared.read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


def test_one_private_file_is_made_once(pictures, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ithn")
    first = build(pictures, tmp_path / "cache")
    assert "8 images to decode once, at most 0.0 GiB" in caplog.text and "wide" not in caplog.text
    made = first.file.stat()
    assert oct(made.st_mode)[-3:] == "600"
    assert sorted(path.suffix for path in first.file.parent.iterdir()) == [".bin", ".lock"]
    names = decoded(monkeypatch)
    again = build(pictures, tmp_path / "cache")
    assert not names and again.file == first.file and again.file.stat().st_mtime_ns == made.st_mtime_ns
    # Crop, flip and normalisation come later: they share the file.
    other = train_transform(20, (0.5,) * 3, LOOK[1], resize=24, flip=False)
    assert build(pictures, tmp_path / "cache", other).file == first.file
    # What changes the pixels, or decides which may be seen, does not.
    for change in (
        {"transform": EVALUATION},
        {"transform": train_transform(16, *LOOK, resize=25)},
        {"follow_links": True},
        {"max_pixels": 10**4},
    ):
        assert build(pictures, tmp_path / "cache", **change).file != first.file


def test_the_size_announced_is_a_bound(pictures, tmp_path):
    paths = [path.name for path in pictures.iterdir()]
    bound = sum(image_cache._most_bytes(ImageFolder(pictures), path, TRAIN) for path in paths)
    pixels = build(pictures, tmp_path / "cache").file.stat().st_size - len(paths) * image_cache.ROW.itemsize
    assert pixels <= bound < 2 * pixels


def test_a_changed_image_is_read_anew_at_once_and_kept_by_the_next_run(pictures, tmp_path, monkeypatch):
    cache = build(pictures, tmp_path / "cache")
    before = cache("wide.png").copy()
    Image.fromarray(noise(30, 47, seed=5)).save(pictures / "wide.png")
    os.utime(pictures / "wide.png", ns=(1, 1))
    expected = TRAIN.resized(ImageFolder(pictures)("wide.png"))
    names = decoded(monkeypatch)
    assert np.array_equal(cache("wide.png"), expected) and not np.array_equal(before, expected)
    assert names == ["wide.png"]
    renewed = build(pictures, tmp_path / "cache")
    assert names == ["wide.png"] * 2 and renewed.file == cache.file
    assert np.array_equal(renewed("wide.png"), expected) and names == ["wide.png"] * 2
    assert np.array_equal(renewed("high.png"), cache("high.png"))


def test_missing_and_broken_images_raise_as_without_a_cache(pictures, tmp_path, monkeypatch):
    cache = build(pictures, tmp_path / "cache")
    (pictures / "wide.png").unlink()
    for attempt in (cache, cache.locate, build(pictures, tmp_path / "cache")):
        with pytest.raises(InputError, match="wide.png.*No such file"):
            attempt("wide.png")
    (pictures / "broken.png").write_bytes((pictures / "high.png").read_bytes()[:200])
    with_broken = build(pictures, tmp_path / "cache", paths=["broken.png", "high.png", "../outside.png", "absent.png"])
    for attempt in (with_broken, with_broken.locate):
        with pytest.raises(InputError, match="broken.png.*cannot be decoded"):
            attempt("broken.png")
        with pytest.raises(InputError, match="leaves image_dir"):
            attempt("../outside.png")
    names = decoded(monkeypatch)
    build(pictures, tmp_path / "cache", paths=["broken.png", "high.png", "../outside.png", "absent.png"])
    assert not names  # what cannot be read does not have the others decoded again


def test_links_out_and_large_images_are_refused_whatever_another_run_kept(pictures, tmp_path):
    Image.fromarray(noise(40, 40)).save(tmp_path / "outside.png")
    (pictures / "link.png").symlink_to(tmp_path / "outside.png")
    assert build(pictures, tmp_path / "cache", follow_links=True)("link.png").shape == (1, 24, 24)
    with pytest.raises(InputError, match="leaves image_dir"):
        build(pictures, tmp_path / "cache")("link.png")
    with pytest.raises(InputError, match="more than max_pixels"):
        build(pictures, tmp_path / "cache", max_pixels=1000)("wide.png")


def test_a_cut_off_file_and_the_rest_of_a_killed_run_are_replaced(pictures, tmp_path):
    cache = build(pictures, tmp_path / "cache")
    expected = {path: cache(path).copy() for path in cache.rows}
    content = cache.file.read_bytes()
    left = cache.file.with_name(f".{cache.file.name}.abc.tmp")
    for damaged in (b"", content[:100], content[:-1]):
        cache.file.unlink()
        cache.file.write_bytes(damaged)
        left.write_bytes(b"x")
        again = build(pictures, tmp_path / "cache")
        assert all(np.array_equal(again(path), values) for path, values in expected.items()) and not left.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(pictures, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache, "_write", full)
    with pytest.raises(InputError, match="--image_cache .*cache: No space left on device"):
        build(pictures, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_spawned_process_maps_the_file_itself(pictures, tmp_path):
    cache = build(pictures, tmp_path / "cache")
    sent = pickle.dumps(cache)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent)("wide.png"), cache("wide.png"))
    cache.file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        pickle.loads(sent)


def _build_and_count(pictures, folder, counts):
    found = []
    original = image_cache._Decoded.__getitem__
    image_cache._Decoded.__getitem__ = lambda *arguments: (found.append(1), original(*arguments))[1]
    build(pictures, folder)
    counts.put(len(found))


def test_a_process_that_decodes_and_is_killed_is_one_line(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache._Decoded, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match=r"data-loading process .* was killed, .* --num_workers \(now 2\)"):
        build(pictures, tmp_path / "cache", workers=2)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_of_several_processes_one_decodes(pictures, tmp_path):
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    (tmp_path / "cache").mkdir(mode=0o700)
    workers = [context.Process(target=_build_and_count, args=(pictures, tmp_path / "cache", counts)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert sorted(counts.get(timeout=60) for _ in workers) == [0, 0, 8]
    for worker in workers:
        worker.join()


@pytest.mark.thorough
def test_a_run_has_the_same_losses_and_scores_with_it(train, demo_index, tmp_path):
    settings = ["--negative_index", demo_index, "--views", "separate", "--clinical", "false", "--floors", "false"]
    plain = train(*settings, "--save_dir", tmp_path / "plain")
    cached = train(
        *settings, "--save_dir", tmp_path / "cached", "--image_cache", tmp_path / "pixels", "--num_workers", 1
    )
    files = list((tmp_path / "pixels").glob("*.bin"))
    assert len(files) == 3 and oct((tmp_path / "pixels").stat().st_mode)[-3:] == "700"
    histories = [json.loads((folder / "history.json").read_text()) for folder in (plain, cached)]
    for rows in histories:
        for row in rows:
            del row["seconds"]
    assert histories[0] == histories[1]
    results = [json.loads((folder / "results.json").read_text())["test"] for folder in (plain, cached)]
    assert results[0] == results[1]


def test_an_unreadable_image_stops_or_is_replaced(train, demo, tmp_path):
    damaged = tmp_path / "damaged"
    annotation = json.loads((demo / "annotation.json").read_text())
    for path in (demo / "images").glob("*/*.png"):
        copy = damaged / path.relative_to(demo / "images")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    study = annotation["train"][0]
    (damaged / study["image_path"][0]).write_bytes(b"no image")
    with pytest.raises(InputError, match=f"split 'train', study '{study['id']}'.*not an image"):
        train("--image_dir", damaged, "--image_cache", tmp_path / "pixels")


def test_features_and_images_are_not_both_kept(train, tmp_path):
    with pytest.raises(InputError, match="--image_cache .*with --feature_cache no image is read"):
        train("--image_cache", tmp_path, "--feature_cache", tmp_path, "--freeze_visual_extractor", "true")


def test_replacements_are_those_of_the_plain_data_set(pictures, tmp_path):
    from modules.data.annotations import Study
    from modules.data.datasets import ReportDataset
    from modules.data.tokenizers import Tokenizer

    (pictures / "broken.png").write_bytes(b"no image")
    studies = [
        Study(path.stem, "a report .", (path.name,), "train", study_id=path.stem, views=("",))
        for path in sorted(pictures.iterdir())
    ]
    tokenizer = Tokenizer.from_reports(["a report ."], 1, "iu_xray")
    batches = []
    for source in (ImageFolder(pictures), build(pictures, tmp_path / "cache")):
        dataset = ReportDataset(studies, tokenizer, source, TRAIN, max_seq_length=9, on_bad_image="skip")
        batches.append(collate(dataset.__getitems__([(1, index) for index in range(9)])))
    assert batches[0].ids == batches[1].ids and batches[0].replaced == batches[1].replaced == 1
    assert torch.equal(batches[0].positive.images, batches[1].positive.images)
