"""Mutations of every file that a flag can name, always the same ones: each is read or gets its one line."""

import io
import json
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from modules.data.annotations import read_annotation
from modules.data.prototype_files import load_prototypes, save_prototypes
from modules.evaluation.report_statistics import load_statistics
from modules.inference.study_files import StudyFiles
from modules.labels import chexbert
from modules.labels.array_pickle import read_pickled_arrays
from modules.labels.rules import CLASSES
from modules.labels.study_labels import read_labels
from modules.layers.visual_extractor_weights import load_weights
from modules.mining.index import HardNegativeIndex
from modules.run.predictor import StudyReader
from modules.runtime.errors import InputError, one_line
from modules.runtime.input_files import require_plain_archive
from modules.training.checkpoint import load_checkpoint
from tests.runtime.test_hostile_images import little_memory

MUTATIONS = 150
SPLICES = (b"null", b"1e999", b"[]", b"{}", b'""', b"-1", b"NaN", b"\\ud800", b"9" * 30, b"\xff" * 4, b"\0" * 4)


def mutated(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        # Half of the changes near the start, where headers are.
        at = rng.randrange(len(content)) if rng.random() < 0.5 else min(len(content) - 1, int(rng.expovariate(1 / 60)))
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[at : at + rng.choice((1, 4, 30, 1000))]
        elif kind == 2:
            content[at:at] = rng.choice(SPLICES)
        elif kind == 3:
            start = rng.randrange(len(content))
            content[at : at + 8] = content[start : start + 8]
        else:
            del content[at:]
        content = content or bytearray(b"\0")
    return bytes(content)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def annotation(_):
    record = {"id": "a", "report": "Clear lungs.", "image_path": ["a.png"], "split": "train", "study_id": 5}
    negative = {"id": "b", "report": "x", "image_path": "b.png", "neg_report": "n", "neg_image_path": ["q"]}
    return json.dumps(
        {
            "train": [record, negative],
            "val": [record | {"id": "c", "split": "val"}],
            "test": [record | {"id": "d", "split": "test", "view": ["PA"]}],
        }
    ).encode()


def csv_labels(_):
    return "\n".join([",".join(["id", *CLASSES]), *(f"s{i}," + ",".join("1" * 14) for i in range(3)), ""]).encode()


def index(path):
    HardNegativeIndex(
        np.array([[1], [0]], np.int32), np.ones((2, 1), np.float32), {"ann_path": "x", "train_sha256": "y", "flags": {}}
    ).save(path)
    return path.read_bytes()


def prototypes(path):
    save_prototypes(path, torch.ones(28, 4), CLASSES, {})
    return path.read_bytes()


def statistics(path):
    np.savez(path, **{"model/CIDEr": np.zeros(3), "format": np.array("x")})
    return path.read_bytes()


def read_prototypes(path):
    return load_prototypes(path, CLASSES, num_protype=2, d_img_ebd=2, d_txt_ebd=2)


def own_weights(path):
    try:
        load_weights(torch.nn.Linear(2, 2), str(path))
    except ValueError as error:  # which build_extractor turns into an InputError
        raise InputError(str(error)) from error


LINEAR = torch.nn.Linear(2, 2).state_dict()
READERS = {
    "annotation.json": (annotation, read_annotation),
    "noted.json": (annotation, lambda path: read_annotation(path, on_problem=lambda problem: None)),
    "labels.csv": (csv_labels, read_labels),
    "noted.csv": (csv_labels, lambda path: read_labels(path, on_problem=lambda problem: None)),
    **{
        f"labels{number}.pickle": (
            lambda _, number=number: pickle.dumps({"a": np.ones(14), "b": np.zeros(14)}, number),
            lambda path: read_labels(path, columns="chexbert"),
        )
        for number in (3, 4, 5)
    },
    "list.pickle": (lambda _: pickle.dumps({"a": [0.0] * 14, "b": [1] * 14}, 2), read_pickled_arrays),
    "index.safetensors": (index, HardNegativeIndex.load),
    "prototypes.safetensors": (prototypes, read_prototypes),
    "prototypes.pt": (lambda _: saved(torch.ones(28, 4)), read_prototypes),
    "old.pt": (lambda _: saved(torch.ones(28, 4), _use_new_zipfile_serialization=False), read_prototypes),
    "weights.pth": (lambda _: saved({"state_dict": LINEAR}), own_weights),
    "chexbert.pth": (lambda _: saved({"model_state_dict": LINEAR}), lambda path: chexbert._read_weights(str(path))),
    "checkpoint.pth": (lambda _: saved({"state_dict": LINEAR, "epoch": 1}), load_checkpoint),
    "statistics.npz": (statistics, load_statistics),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(60)
def test_any_bytes_are_read_or_get_one_line(tmp_path, name):
    make, read = READERS[name]
    path = tmp_path / name
    content = make(path)
    rng = random.Random(name)
    refused = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(rng, content))
        try:
            read(path)
        except InputError as error:
            refused += 1
            assert one_line(str(error)) and len(str(error)) < 2000
    assert refused > MUTATIONS // 4


def pickled(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


FUNCTION = b"\x8c\x16numpy._core.multiarray\x8c\x0c_reconstruct\x93"
TRICKS = {
    "a number of a memory of 2^31 places": pickled(b"N", b"r\xff\xff\xff\x7f"),
    "2^40 bytes that are not there": pickled(b"\x96" + (2**40).to_bytes(8, "little")),
    "2^40 letters that are not there": pickled(b"\x8d" + (2**40).to_bytes(8, "little")),
    "a frame of 2^40 bytes": pickled(b"\x95" + (2**40).to_bytes(8, "little") + b"N"),
    "a state for a function": pickled(FUNCTION, b"}\x8c\x05extra\x88s", b"b"),
    "an object of the registry": pickled(b"\x82\x01"),
    "an instance by its class": pickled(b"\x8c\x05numpy\x8c\x05dtype\x93", b")\x81"),
    "an instance in the old way": b"(inumpy\ndtype\n.",
    "a call of a call": pickled(FUNCTION, b")R", b")R"),
    "a persistent id": pickled(b"\x8c\x01a", b"Q"),
    "a key of ten thousand digits": pickled(b"}", b"\x8b" + (4200).to_bytes(4, "little") + b"\x01" * 4200, b"]s"),
    "a list in itself": pickled(b"}\x8c\x01a", b"]\x94h\x00a", b"s"),
}


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.timeout(20)
def test_tricks_of_pickles_cost_nothing(tmp_path, name):
    path = tmp_path / "labels.pickle"
    path.write_bytes(TRICKS[name])
    with little_memory(), pytest.raises(InputError):
        read_pickled_arrays(path)


def test_one_long_list_named_a_thousand_times_is_one_array(tmp_path):
    numbers = [0.0] * 10_000
    (tmp_path / "labels.pickle").write_bytes(pickle.dumps({f"s{i}": numbers for i in range(2000)}))
    with little_memory():
        found = read_pickled_arrays(tmp_path / "labels.pickle")
    assert len(found) == 2000 and found["s0"] is found["s1999"]


def test_archives_that_torch_writes_pass_and_others_do_not(tmp_path):
    (tmp_path / "plain.pth").write_bytes(saved(LINEAR))
    (tmp_path / "old.pth").write_bytes(saved(LINEAR, _use_new_zipfile_serialization=False))
    (tmp_path / "cut.pth").write_bytes(saved(LINEAR)[:-20])
    for name in ("plain.pth", "old.pth", "cut.pth"):  # the last is the reader's to name
        require_plain_archive(tmp_path / name, "--flag")


def test_statistics_that_unpack_to_gigabytes(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("model/CIDEr.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "<f8", "fortran_order": False, "shape": (10**7,)})
            for _ in range(80):
                member.write(bytes(10**6))
        archive.filelist[0].file_size = 2**31  # as a member that is that large announces itself
    with little_memory(), pytest.raises(InputError, match="not the statistics of a run"):
        load_statistics(tmp_path / "x.npz")


@pytest.mark.timeout(20)
def test_prediction_has_the_caps_of_training(tmp_path, capsys):
    for name in ("a.dcm", "a.png"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM")
        os.truncate(tmp_path / name, 3 * 2**30)
        reader = StudyReader([StudyFiles(name, (tmp_path / name,))], 2, 1)
        with little_memory():
            assert list(reader) == [] and reader.unreadable == 1
        assert f"has {3 * 2**30} bytes, more than {2**30}" in capsys.readouterr().err
