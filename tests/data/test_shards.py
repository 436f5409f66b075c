"""Tar shards: the samples that files give, each shard read once an epoch, with any number of processes."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.data.annotations import read_annotation
from modules.data.images import ImageFolder
from modules.data.sample_order import LANES, EpochBatchSampler
from modules.data.shards import MANIFEST, Manifest, Shard, ShardImages, neighbours_sha256, read_file
from modules.mining.index import HardNegativeIndex
from modules.runtime.errors import InputError
from scripts import make_shards

ROOT = Path(__file__).resolve().parents[2]


def make(out, demo, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys,
            "argv",
            [
                "make_shards.py",
                "--ann_path",
                str(demo / "annotation.json"),
                "--image_dir",
                str(demo / "images"),
                "--out",
                str(out),
                *map(str, flags),
            ],
        )
        make_shards.main()
    return out


@pytest.fixture(scope="module")
def shards(demo, demo_index, tmp_path_factory):
    """Shards of two or three records each, hard negatives beside them."""
    return make(
        tmp_path_factory.mktemp("made") / "shards",
        demo,
        "--negative_index",
        demo_index,
        "--num_neighbours",
        2,
        "--shard_mb",
        0.02,
    )


def split_images(shards, demo, split="train"):
    annotation = read_annotation(demo / "annotation.json")
    return ShardImages(
        str(shards), Manifest.load(str(shards)).splits[split], [study.image_paths for study in annotation.splits[split]]
    )


def test_every_image_is_the_files_own(shards, demo, demo_index):
    images, folder = split_images(shards, demo), ImageFolder(demo / "images")
    assert len(images.shards) > 3
    index = HardNegativeIndex.load(demo_index)
    for row, paths in enumerate(images.paths):
        neighbours = [images.paths[other] for other in index.neighbours[row][:2] if other >= 0]
        for path in (*paths, *(path for other in neighbours for path in other)):
            assert np.array_equal(images.of_record(row)(path), folder(path))
        assert np.array_equal(images(paths[0]), folder(paths[0]))
        assert images.locate(paths[0]).startswith("train-")


@pytest.mark.thorough
def test_training_is_that_from_files_but_for_the_order(shards, demo_index, train, tmp_path, monkeypatch):
    """With the sampler's order held the same, losses and reports are equal to the last bit."""
    monkeypatch.setattr("modules.run.data.ReportDataset.shards", lambda _: None)
    runs = []
    for name, source in (("files", []), ("shards", ["--shards", shards])):
        folder = train("--negative_index", demo_index, "--save_dir", tmp_path / name, *source)
        history = json.loads((folder / "history.json").read_text())
        runs.append(([row["train_loss"] for row in history], (folder / "res.csv").read_text()))
    assert runs[0] == runs[1]


@pytest.mark.thorough
def test_training_reads_every_shard_once_an_epoch(shards, demo, demo_index, train, monkeypatch):
    read = []

    def counting(root, name, max_bytes):
        read.append(name)
        return read_file(root, name, max_bytes)

    monkeypatch.setattr("modules.data.shards.read_file", counting)
    train("--negative_index", demo_index, "--shards", shards, "--epochs", 2, "--floors", "false", "--batch_size", 2)
    manifest = Manifest.load(str(shards))
    assert len(manifest.splits["train"]) <= 2 * LANES  # all fit: the second epoch reads nothing
    assert sorted(name for name in read if name.startswith("train")) == sorted(
        shard.file for shard in manifest.splits["train"]
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_order_is_complete_and_interleaves_lanes(world_size, drop_last):
    shards = [list(range(start, start + 30)) for start in range(0, 600, 30)]

    def order(epoch, world_size, rank, start=0):
        sampler = EpochBatchSampler(600, 4, True, 7, rank, world_size, drop_last, shards=shards)
        sampler.set_epoch(epoch, start * 4 * world_size)
        return [[index for _, index in batch] for batch in sampler]

    ranks = [order(1, world_size, rank) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [index for batches in ranks for batch in batches for index in batch]
    assert len(seen) == len(set(seen)) >= 600 - (4 * world_size if drop_last else world_size - 1)
    # The same order whatever the number of processes: a run can go on with another.
    joined = [index for together in zip(*ranks, strict=True) for batch in together for index in batch]
    alone = [index for batch in order(1, 1, 0) for index in batch]
    assert joined == alone[: len(joined)]
    assert order(1, world_size, 0, start=5) == ranks[0][5:]
    assert order(2, world_size, 0) != ranks[0]
    if LANES % world_size == 0:
        # A process reads its own lanes: shards that it shares with others are those where lanes are cut.
        own = [
            {index // 30 for batch in batches[: 600 // LANES // 4 * LANES // world_size] for index in batch}
            for batches in ranks
        ]
        assert sum(map(len, own)) <= 20 + LANES


def test_one_reader_fetches_a_shard_once_an_epoch(monkeypatch):
    """But for those that are cut between two lanes: a lane that goes from one to the next throws no other out."""
    content, read = bytes(257) + b"ustar", []
    monkeypatch.setattr("modules.data.shards.read_file", lambda root, name, most: read.append(name) or content)
    monkeypatch.setattr("modules.data.shards._unpack", lambda content, where: {})
    rows = [range(30 * number, 30 * number + 30) for number in range(40)]
    images = ShardImages(
        "far",
        tuple(
            Shard(f"{number}.tar", len(content), sha256(content).hexdigest(), tuple(own))
            for number, own in enumerate(rows)
        ),
        [[str(row)] for row in range(1200)],
    )
    for batch in EpochBatchSampler(1200, 4, True, shards=rows):
        for _, row in batch:
            with pytest.raises(InputError, match="not with its record"):
                images(str(row))
    assert 40 <= len(read) <= 40 + LANES


def test_few_samples_make_an_epoch_too():
    sampler = EpochBatchSampler(5, 2, True, shards=[[0, 1], [2], [3, 4]])
    sampler.set_epoch(1)
    assert sorted(index for batch in sampler for _, index in batch) == list(range(5))


def test_evaluation_reads_in_order(shards, demo):
    images = split_images(shards, demo, "test")
    assert [row for shard in images.shards for row in shard.rows] == list(range(len(images.paths)))
    sampler = EpochBatchSampler(4, 3, False, shards=[[2, 3], [0, 1]])
    assert [[index for _, index in batch] for batch in sampler] == [[2, 3, 0], [1]]


def test_smaller_images_are_what_training_crops_from(demo, tmp_path):
    from modules.data.transforms import train_transform
    from tests.transform_support import LOOK

    make(tmp_path / "small", demo, "--resize", 40)
    images, folder = split_images(tmp_path / "small", demo), ImageFolder(demo / "images")
    path = images.paths[0][0]
    assert min(images(path).size) == 40 < min(folder(path).size)
    transform = train_transform(32, *LOOK, resize=40)
    seed = torch.Generator
    assert torch.equal(
        transform.pixels(images(path), seed().manual_seed(3)), transform.pixels(folder(path), seed().manual_seed(3))
    )


def test_same_seed_same_bytes(demo, tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name, demo, "--seed", 5)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir()) and MANIFEST in files
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert all((tmp_path / "a" / name).stat().st_mode & 0o777 == 0o600 for name in files)


def test_other_programs_read_the_shards(shards):
    webdataset = pytest.importorskip("webdataset")
    first = sorted(shards.glob("train-*.tar"))[0]
    sample = next(iter(webdataset.WebDataset(str(first), shardshuffle=False).decode("pil")))
    about = sample["json"]
    assert about["report"] and about["split"] == "train" and sample[next(iter(about["images"]))].size == (64, 64)


def test_a_missing_library_is_named(shards, demo, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="need webdataset: pip install -r requirements/shards.txt"):
        make(tmp_path / "out", demo)
    assert not (tmp_path / "out").exists()


def test_damage_is_named(shards, demo, tmp_path):
    images = split_images(shards, demo)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in shards.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    first = copy / images.shards[0].file
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    path = images.paths[images.shards[0].rows[0]][0]
    with pytest.raises(InputError, match="train-000000.tar is not what shards.json says"):
        split_images(copy, demo)(path)
    first.unlink()
    with pytest.raises(InputError, match="train-000000.tar cannot be read"):
        split_images(copy, demo)(path)
    for content in ("{}", "[]", "no json", json.dumps({"format": "x"})):
        (copy / MANIFEST).write_text(content)
        with pytest.raises(InputError, match="damaged or of another version"):
            Manifest.load(str(copy))
    content = json.loads((shards / MANIFEST).read_text())
    content["splits"]["train"][0]["file"] = "../../secret"
    (copy / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not the name of a shard"):
        Manifest.load(str(copy))
    with pytest.raises(InputError, match="cannot be read"):
        Manifest.load(str(tmp_path / "absent"))


def test_other_data_or_negatives_are_refused(shards, demo, demo_index):
    manifest, index = Manifest.load(str(shards)), HardNegativeIndex.load(demo_index)
    annotation = read_annotation(demo / "annotation.json")
    own = neighbours_sha256(index.neighbours, 2)
    manifest.check("s", annotation.sha256, own, 2)
    manifest.check("s", annotation.sha256, None, 1)
    for found in ((annotation.sha256, own, 3), (annotation.sha256, "other", 1), ("other", own, 1)):
        with pytest.raises(InputError, match="--shards s"):
            manifest.check("s", *found)


def test_shards_at_an_address(shards, demo, monkeypatch):
    """fsspec's own memory stands for a store; what does not answer at first is asked again."""
    fsspec = pytest.importorskip("fsspec")
    for path in shards.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/far/{path.name}", path.read_bytes())
    answers, plain = [], fsspec.open

    def busy(*arguments):
        answers.append(arguments)
        if len(answers) % 3:
            raise OSError("busy")
        return plain(*arguments)

    monkeypatch.setattr("fsspec.open", busy)
    monkeypatch.setattr("modules.data.shards.SECONDS_BETWEEN_TRIES", 0.0)
    images, near = split_images("memory://far", demo), split_images(shards, demo)
    path, gone = (images.paths[images.shards[number].rows[0]][0] for number in (0, -1))
    assert np.array_equal(images(path), near(path)) and len(answers) == 6
    fsspec.filesystem("memory").rm(f"/far/{images.shards[-1].file}")
    with pytest.raises(InputError, match="--shards memory://far: train-.* cannot be read"):
        images(gone)


def test_shell_commands_are_no_addresses(shards, tmp_path):
    for root in ("pipe:touch canary", "pipe://touch canary", "shell::echo"):
        with pytest.raises(InputError, match="--shards"):
            Manifest.load(root)
    assert not Path("canary").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_neighbours", "0"], "--num_neighbours 0"),
        (["--shard_mb", "0"], "--shard_mb 0"),
        (["--resize", "-1"], "--resize -1"),
        (["--out", "."], "--out"),
    ],
)
def test_wrong_flags_get_one_line(demo, tmp_path, flags, message):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts" / "make_shards.py",
            "--ann_path",
            demo / "annotation.json",
            "--image_dir",
            demo / "images",
            "--out",
            tmp_path / "out",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
