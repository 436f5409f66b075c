"""HDF5 files that lead out of themselves, unpack to more than memory holds, or hold something other than numbers."""

import zlib

import h5py
import numpy as np
import pytest

from modules.data.detection_features import DetectionFeatures
from modules.data.hdf5 import MAX_CHUNK, MAX_WIDTH
from modules.runtime.errors import InputError
from tests.runtime.test_hostile_images import little_memory

NAME = "1_features"
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def read(path, identity="1"):
    return DetectionFeatures(str(path), {"a.jpg": identity}, 5)("a.jpg")


@pytest.fixture
def other(tmp_path):
    """A readable file with the wanted name, which no other file may lead to."""
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file[NAME] = ROWS
        file["raw"] = ROWS
    (tmp_path / "raw.bin").write_bytes(ROWS.tobytes())
    return tmp_path / "other.hdf5"


def external_link(file, other):
    file[NAME] = h5py.ExternalLink(str(other), "raw")


def soft_link_through_an_external_one(file, other):
    file["out"] = h5py.ExternalLink(str(other), "/")
    file[NAME] = h5py.SoftLink("/out/raw")


def virtual(file, other):
    layout = h5py.VirtualLayout(ROWS.shape, ROWS.dtype)
    layout[:] = h5py.VirtualSource(str(other), "raw", shape=ROWS.shape)
    file.create_virtual_dataset(NAME, layout)


def external_storage(file, other):
    file.create_dataset(NAME, ROWS.shape, ROWS.dtype, external=[(str(other.with_name("raw.bin")), 0, ROWS.nbytes)])


@pytest.mark.parametrize("way", [external_link, soft_link_through_an_external_one, virtual, external_storage])
def test_no_way_out_of_the_file(way, other, tmp_path):
    assert read(other)[2, 3] == 11
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        way(file, other)
    with pytest.raises(InputError, match=f"d.hdf5: '{NAME}' (is a link to another place|has its numbers in another)"):
        read(tmp_path / "d.hdf5")


def test_no_way_out_through_the_folders_of_an_id(other, tmp_path):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file["out"] = h5py.ExternalLink(str(other), "/")
        file["own/1_features"] = ROWS
    assert read(tmp_path / "d.hdf5", "own/1")[2, 3] == 11
    with pytest.raises(InputError, match="'out/1_features' is a link to another place"):
        read(tmp_path / "d.hdf5", "out/1")
    with pytest.raises(InputError, match="has no 'own/1_features/1_features'"):
        read(tmp_path / "d.hdf5", "own/1_features/1")


@pytest.mark.parametrize(
    "content",
    [
        np.array([[b"a", b"b"]]),
        np.array([[1j]]),
        np.zeros((2, 2), [("x", "f4"), ("y", "i4")]),
        np.zeros((2, 2), np.longdouble),
        np.zeros((2, 2), bool),
        np.array(3.0),
        h5py.Empty("f4"),
        (["a", "b"], h5py.string_dtype()),
        ([[1], [2, 3]], h5py.vlen_dtype(np.int32)),
        ([[None]], h5py.ref_dtype),
        ([[None]], h5py.regionref_dtype),
        (np.zeros((2, 2)), h5py.opaque_dtype(np.dtype("V8"))),
        (np.zeros((2, 2)), np.dtype(("f4", (3,)))),
        "a group",
    ],
    ids=str,
)
def test_what_is_no_matrix_of_numbers_gets_one_line(content, tmp_path):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        if isinstance(content, str):
            file.create_group(NAME)
        elif isinstance(content, tuple):
            file.create_dataset(NAME, np.shape(np.empty(len(content[0]))) * 2, content[1])
        else:
            file[NAME] = content
    with pytest.raises(InputError, match=f"'{NAME}'") as error:
        read(tmp_path / "d.hdf5")
    assert "\n" not in str(error.value)


def packed_bomb(file):
    """A chunk of 48 bytes that unpacks to 200 MB."""
    dataset = file.create_dataset(NAME, ROWS.shape, "f4", chunks=ROWS.shape, compression="gzip")
    dataset.id.write_direct_chunk((0, 0), zlib.compress(bytes(200_000_000), 9)[:1000])


def longer_bomb(file):
    dataset = file.create_dataset(NAME, (64, 1024), "f4", chunks=(64, 1024), compression="gzip")
    dataset.id.write_direct_chunk((0, 0), zlib.compress(bytes(200_000_000), 9))


BOMBS = {
    "a chunk that unpacks to more": packed_bomb,
    "a larger chunk that does": longer_bomb,
    "a chunk of gigabytes": lambda file: file.create_dataset(
        NAME, (2**20, 2**10), "f4", chunks=(2**20, 2**9), compression="gzip"
    ),
    "columns": lambda file: file.create_dataset(NAME, (5, 2**40), "f4", chunks=(1, 2**10)),
    "another filter": lambda file: file.create_dataset(NAME, ROWS.shape, "f4", compression="lzf"),
    "stored in more than it has": lambda file: file.create_dataset(
        NAME, ROWS.shape, "f4", chunks=ROWS.shape, fletcher32=True
    ).id.write_direct_chunk((0, 0), bytes(10**6)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_memory_is_decided_here(name, tmp_path):
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        BOMBS[name](file)
    read_once = tmp_path / "warm.hdf5"
    with h5py.File(read_once, "w") as file:
        file[NAME] = ROWS
    read(read_once)
    with little_memory(), pytest.raises(InputError, match=f"'{NAME}'"):
        read(tmp_path / "d.hdf5")


def test_what_captioning_uses_is_read(tmp_path):
    assert MAX_WIDTH >= 2048 and MAX_CHUNK >= 100 * 2048 * 8
    for number, options in enumerate(
        (
            {},
            {"chunks": (2, 3)},
            {"compression": "gzip", "shuffle": True},
            {"fletcher32": True},
            {"maxshape": (None, 4)},
        )
    ):
        for kind in ("f2", "f4", "f8", "<i2", ">i4", "u1"):
            path = tmp_path / f"{number}{kind[-2:]}.hdf5"
            with h5py.File(path, "w") as file:
                file.create_dataset(NAME, data=ROWS.astype(kind), **options)
            assert np.array_equal(read(path)[:3], ROWS)
