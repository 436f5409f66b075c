"""Archives that are damaged, or made to fill the memory: one line each, and memory that they do not decide."""

import gzip
import io
import struct
import tarfile
import zipfile

import pytest

from modules.prepare.archives import read_files
from modules.runtime.errors import InputError
from tests.data.test_hostile_shards import header, pax, sparse, tar
from tests.runtime.test_hostile_images import little_memory

MOST = 2**20


def contents(path, suffix=".xml"):
    return [(name, read()) for name, read in read_files(path, suffix, MOST)]


def zipped(*members, method=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def lying(content, size):
    """A zip archive of one member whose headers say that it has ``size`` bytes."""
    archive = bytearray(zipped(("a.xml", content)))
    true = struct.pack("<L", len(content))
    for _ in range(2):
        at = archive.index(true)
        archive[at : at + 4] = struct.pack("<L", size)
    return bytes(archive)


GOOD = tar(("a.xml", b"<a/>"))
TARS = {
    "not packed, and no tar": b"x" * 3000,
    "nothing": b"",
    "cut": gzip.compress(GOOD)[:-30],
    "a damaged gzip": gzip.compress(GOOD)[:30] + b"xxxx" + gzip.compress(GOOD)[34:],
    "a damaged bzip2": b"BZh9" + b"x" * 100,
    "a long name of 3 GiB": gzip.compress(header("x", 3 * 2**30, b"L") + bytes(200 * 2**20)),
    "a pax header of 3 GiB": header("x", 3 * 2**30, b"x"),
    "a long link of 3 GiB": header("x", 3 * 2**30, b"K"),
    "a member of 3 GiB": header("a.xml", 3 * 2**30),
    "long names in a row": header("x", 0, b"L") * 5000,
    "a sparse member": sparse(8**11 - 1).replace(b"00000000.0.png", b"a.xml".ljust(14, b"\0")),
    "pax: sparse 1.0": pax({"GNU.sparse.major": 1, "GNU.sparse.minor": 0, "GNU.sparse.realsize": 10**15}, "a.xml"),
    "pax: sparse 0.1": pax({"GNU.sparse.map": "0,1", "GNU.sparse.size": 10**15}, "a.xml"),
    "pax: sparse words": pax({"GNU.sparse.map": "a,b", "GNU.sparse.size": "many"}, "a.xml"),
    "pax: a map of an odd length": pax({"GNU.sparse.map": "1,2,3", "GNU.sparse.size": 3}, "a.xml"),
    "pax: below 0": pax({"size": -512}, "a.xml"),
    "pax: another encoding": pax({"hdrcharset": "klingon", "path": "x"}, "a.xml"),
    "a checksum that is wrong": GOOD[:148] + b"0000000\0" + GOOD[156:],
    "a size that is no number": GOOD[:124] + b"zzzzzzzzzzz\0" + GOOD[136:],
    "xz": b"\xfd7zXZ\0" + b"x" * 100,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", TARS)
def test_other_tar_files_get_one_line(name, tmp_path):
    (tmp_path / "x.tgz").write_bytes(TARS[name])
    with little_memory(200_000), pytest.raises(InputError, match=r"x\.tgz") as error:
        assert not contents(tmp_path / "x.tgz")
        raise InputError("x.tgz: nothing in it to read, and nothing that does harm")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


ZIPS = {
    "no zip": b"x" * 3000,
    "cut": zipped(("a.xml", b"<a/>"))[:-30],
    "a megabyte more than it says": lying(bytes(300 * 2**20), 1000),
    "another method": zipped(("a.xml", bytes(300 * 2**20)), method=zipfile.ZIP_BZIP2)[:-1] + b"\0",
    "more than is read": zipped(("a.xml", bytes(300 * 2**20))),
    "a list of 200 MB": b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 9, 9, 2**31, 0, 0),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ZIPS)
def test_other_zip_files_get_one_line(name, tmp_path):
    content = ZIPS[name]
    if name == "another method":
        # The size that is announced is small: the reader of bzip2 unpacks whatever there is.
        content = content.replace(struct.pack("<L", 300 * 2**20), struct.pack("<L", 1000))
    (tmp_path / "x.zip").write_bytes(content)
    with little_memory(200_000), pytest.raises(InputError, match=r"x\.zip") as error:
        contents(tmp_path / "x.zip")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_many_members_are_not_remembered(tmp_path):
    with gzip.open(tmp_path / "x.tgz", "wb", compresslevel=1) as file:
        for number in range(60_000):
            entry = tarfile.TarInfo(f"{number}.txt")
            file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.write(tar(("a.xml", b"<a/>")))
    with little_memory(30_000):
        assert contents(tmp_path / "x.tgz") == [("a.xml", b"<a/>")]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lambda data: __import__("bz2").compress(data)])
def test_good_ones_are_read(pack, tmp_path):
    (tmp_path / "x.tgz").write_bytes(pack(tar(("b/a.xml", b"<a/>"), ("c.xml", b"<c/>"), ("._c.xml", b""))))
    (tmp_path / "x.zip").write_bytes(zipped(("b/a.xml", b"<a/>"), ("c.xml", b"<c/>")))
    assert contents(tmp_path / "x.tgz") == contents(tmp_path / "x.zip") == [("b/a.xml", b"<a/>"), ("c.xml", b"<c/>")]
