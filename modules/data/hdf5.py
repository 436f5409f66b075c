"""What of an HDF5 file is read: matrices of numbers that lie in the file itself, in memory that it does not decide.

HDF5 can name other files (external links, virtual data sets, external storage), load filters from libraries, and unpack
a chunk to any size.
"""

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py

MAX_WIDTH = 2**14  # columns; region features have 1,024 or 2,048
MAX_CHUNK = 2**26  # bytes that are unpacked at once
_DEFLATE, _SHUFFLE, _CHECKSUM = 1, 2, 3  # the filters of HDF5's own
_SLACK = 2**10  # bytes by which packing may make a chunk longer


class Refused(ValueError):
    """What is wrong with a data set; completes its name."""


def own_dataset(file: "h5py.File", name: str) -> "h5py.Dataset | None":
    """The data set ``name`` of an open file, None where it has none; Refused for a link that may lead out of it."""
    import h5py

    found = file
    for part in filter(None, name.split("/")):
        if not isinstance(found, h5py.Group):
            return None
        link = found.get(part, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise Refused(f"is a link to another place ({type(link).__name__})")
        found = found[part]
    return found if isinstance(found, h5py.Dataset) else None


def require_plain_matrix(dataset: "h5py.Dataset", rows: int) -> None:
    """Refused unless ``dataset`` is a matrix (n, width) of plain numbers in this file, whose first ``rows`` can be
    read in memory of their own size or MAX_CHUNK."""
    if dataset.is_virtual or dataset.external:
        raise Refused("has its numbers in another file")
    if dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        raise Refused(f"holds {dataset.dtype}, expected numbers of up to 64 bits")
    if dataset.ndim != 2 or 0 in dataset.shape:
        raise Refused(f"has the shape {dataset.shape}, expected (n, width) with at least one row")
    if dataset.shape[1] > MAX_WIDTH:
        raise Refused(f"has {dataset.shape[1]} columns, more than {MAX_WIDTH}")
    if dataset.chunks is not None:
        _require_modest_chunks(dataset, rows)


def _require_modest_chunks(dataset: "h5py.Dataset", rows: int) -> None:
    down, across = dataset.chunks
    size = down * across * dataset.dtype.itemsize
    if size > MAX_CHUNK:
        raise Refused(f"has chunks of {size} bytes, more than {MAX_CHUNK}")
    packing = dataset.id.get_create_plist()
    filters = [packing.get_filter(place)[0] for place in range(packing.get_nfilters())]
    if not set(filters) <= {_DEFLATE, _SHUFFLE, _CHECKSUM} or filters.count(_DEFLATE) > 1:
        raise Refused("is packed by another filter than gzip, shuffle and fletcher32; save it with these")
    for row in range(0, min(rows, dataset.shape[0]), down):
        for column in range(0, dataset.shape[1], across):
            stored = dataset.id.get_chunk_info_by_coord((row, column))
            if stored.byte_offset is None:  # never written
                continue
            if stored.size > size + size // 2**10 + _SLACK:
                raise Refused(f"has a chunk of {size} bytes that is stored in {stored.size}")
            if _DEFLATE in filters:
                _, packed = dataset.id.read_direct_chunk((row, column))
                if len(zlib.decompressobj().decompress(packed, size + _SLACK)) == size + _SLACK:
                    raise Refused(f"has a chunk of {size} bytes that unpacks to more")
