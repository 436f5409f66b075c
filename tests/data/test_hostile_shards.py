"""Shards and their list that are damaged, or made to do harm: one line each, and memory that they do not decide."""

import copy
import io
import json
import os
import tarfile
from hashlib import sha256

import pytest
from PIL import Image

from modules.data.shards import MANIFEST, Manifest, Shard, ShardImages
from modules.runtime.errors import InputError
from tests.runtime.test_hostile_images import little_memory

GOOD = {
    "format": "ithn-shards-1",
    "annotation_sha256": "a",
    "negatives": "annotation",
    "num_neighbours": 1,
    "splits": {"train": [{"file": "train-000000.tar", "size": 10, "sha256": "b", "rows": [0, 1]}]},
}


def changed(*path, value):
    content = found = copy.deepcopy(GOOD)
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = value
    return json.dumps(content)


FIRST = ("splits", "train", 0)
MANIFESTS = {
    "brackets": "[" * 200_000,
    "objects": '{"a":' * 200_000,
    "digits": '{"format": ' + "1" * 6000 + "}",
    "not UTF-8": b"\xff\xfe\x00",
    "nothing": "",
    "a list": "[]",
    "null": "null",
    "another key": changed("more", value=1),
    "splits of a list": changed("splits", value=[]),
    "splits of texts": changed("splits", value={"train": "abc"}),
    "a shard of a text": changed(*FIRST, value="abc"),
    "a shard of nothing": changed(*FIRST, value={}),
    "rows of a number": changed(*FIRST, "rows", value=3),
    "rows of texts": changed(*FIRST, "rows", value=["a"]),
    "rows of lists": changed(*FIRST, "rows", value=[[0]]),
    "rows below 0": changed(*FIRST, "rows", value=[-1]),
    "rows of fractions": changed(*FIRST, "rows", value=[0.5]),
    "a size of a text": changed(*FIRST, "size", value="10"),
    "a size below 0": changed(*FIRST, "size", value=-1),
    "a size of petabytes": changed(*FIRST, "size", value=2**50),
    "a path": changed(*FIRST, "file", value="../x.tar"),
    "an address": changed(*FIRST, "file", value="x::http:evil.tar"),
    "a number for a file": changed(*FIRST, "file", value=3),
    "a hidden file": changed(*FIRST, "file", value=".tar"),
    "neighbours of a text": changed("num_neighbours", value="1"),
    "neighbours of a truth value": changed("num_neighbours", value=True),
    "a hash of a list": changed("annotation_sha256", value=[]),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_other_lists_get_one_line(name, tmp_path):
    content = MANIFESTS[name]
    (tmp_path / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"--shards .*shards\.json is damaged or of another version") as error:
        Manifest.load(str(tmp_path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_the_list_places_every_record_once(tmp_path):
    for rows, count in (([0, 1], 3), ([0, 0], 2), ([0, 5], 2), ([], 1)):
        (tmp_path / MANIFEST).write_text(changed(*FIRST, "rows", value=rows))
        with pytest.raises(InputError, match="does not place each of the"):
            Manifest.load(str(tmp_path)).shards_of(str(tmp_path), "train", count)
    (tmp_path / MANIFEST).write_text(json.dumps(GOOD))
    manifest = Manifest.load(str(tmp_path))
    assert len(manifest.shards_of("x", "train", 2)) == 1
    with pytest.raises(InputError, match="records of 'val'"):
        manifest.shards_of("x", "val", 1)


@pytest.mark.timeout(20)
def test_pipes_and_endless_files(tmp_path):
    os.mkfifo(tmp_path / MANIFEST)
    with pytest.raises(InputError, match="cannot be read: Not a regular file"):
        Manifest.load(str(tmp_path))
    os.unlink(tmp_path / MANIFEST)
    (tmp_path / MANIFEST).symlink_to("/dev/zero")
    with pytest.raises(InputError, match="cannot be read: Not a regular file"):
        Manifest.load(str(tmp_path))
    os.unlink(tmp_path / MANIFEST)
    (tmp_path / MANIFEST).touch()
    os.truncate(tmp_path / MANIFEST, 2**33)
    with little_memory(), pytest.raises(InputError, match="more than"):
        Manifest.load(str(tmp_path))
    os.mkfifo(tmp_path / "train-000000.tar")
    with pytest.raises(InputError, match="train-000000.tar cannot be read"):
        ShardImages(str(tmp_path), (Shard("train-000000.tar", 10, "b", (0,)),), [["a.png"]])("a.png")


def png():
    buffer = io.BytesIO()
    Image.new("L", (40, 30), 90).save(buffer, "PNG")
    return buffer.getvalue()


def tar(*members, mode=tarfile.GNU_FORMAT):
    """Bytes of a tar file of (name, content or TarInfo's own changes)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=mode) as archive:
        for name, content, *changes in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            for key, value in dict(*changes).items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(content) if entry.isreg() else None)
    return buffer.getvalue()


def header(name, size, kind=b"0"):
    """A tar header that announces ``size`` bytes, with nothing behind it."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


def sparse(size):
    """A member of no stored bytes that unpacks to ``size`` of zeros (GNU's old form)."""
    block = bytearray(header("00000000.0.png", 0, b"S"))
    block[386:398], block[398:410] = b"%011o\0" % size, b"%011o\0" % 0
    block[483:495] = b"%011o\0" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records, name="00000000.0.png", content=b"x"):
    body = b""
    for key, value in records.items():
        text = f" {key}={value}\n".encode()
        length = len(text) + len(str(len(text) + 2))
        body += str(length).encode() + text
    return (
        tar(("pax", body, {"type": tarfile.XHDTYPE, "size": len(body)}))[:512]
        + body.ljust(512, b"\0")
        + tar((name, content))
    )


INDEX = json.dumps({"images": {"0.png": "a.png"}}).encode()
SHARDS = {
    "no tar": b"x" * 2000,
    "an empty tar": tar(),
    "no list": tar(("00000000.0.png", png())),
    "a list of brackets": tar(("00000000.json", b"[" * 100_000), ("00000000.0.png", png())),
    "a list that is none": tar(("00000000.json", b"[1]"), ("00000000.0.png", png())),
    "a list of another image": tar(("00000000.json", b'{"images": {"1.png": "a.png"}}'), ("00000000.0.png", png())),
    "a list of lists": tar(("00000000.json", b'{"images": {"0.png": ["a.png"]}}'), ("00000000.0.png", png())),
    "a row that is a word": tar(("zero.json", INDEX), ("zero.0.png", png())),
    "a link": tar(
        ("00000000.json", INDEX), ("00000000.0.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})
    ),
    "a device": tar(("00000000.json", INDEX), ("00000000.0.png", b"", {"type": tarfile.CHRTYPE})),
    "a long name of 3 GiB": header("x", 3 * 2**30, b"L"),
    "a pax header of 3 GiB": header("x", 3 * 2**30, b"x"),
    "a global header of 3 GiB": header("x", 3 * 2**30, b"g"),
    "a member of 3 GiB": header("00000000.0.png", 3 * 2**30),
    "long names in a row": header("x", 0, b"L") * 5000,
    "a sparse member of terabytes": sparse(8**11 - 1) + tar(("00000000.json", INDEX)),
    "pax: sparse": pax({"GNU.sparse.major": 1, "GNU.sparse.minor": 0, "GNU.sparse.realsize": 10**15}),
    "pax: a sparse map that is none": pax({"GNU.sparse.map": "a,b", "GNU.sparse.size": 10**12}),
    "pax: a size below 0": pax({"size": -512}),
    "pax: a size that is a word": pax({"size": "many"}),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SHARDS)
def test_other_shards_get_one_line(name, tmp_path):
    content = SHARDS[name]
    (tmp_path / "s.tar").write_bytes(content)
    shard = Shard("s.tar", len(content), sha256(content).hexdigest(), (0,))
    with little_memory(), pytest.raises(InputError) as error:
        ShardImages(str(tmp_path), (shard,), [["a.png"]])("a.png")
    assert "\n" not in str(error.value) and "make the shards again" in str(error.value)


def test_a_good_one_is_read(tmp_path):
    content = tar(("00000000.json", INDEX), ("00000000.0.png", png()))
    (tmp_path / "s.tar").write_bytes(content)
    shard = Shard("s.tar", len(content), sha256(content).hexdigest(), (0,))
    assert ShardImages(str(tmp_path), (shard,), [["a.png"]])("a.png").size == (40, 30)
