"""A CUDA device whose kernels do nothing, for what a machine without a GPU can still show of the GPU path.

PyTorch's own host code runs unchanged up to each launch. Real are therefore: devices that do not fit together, calls
that wait for the device, copies, the number of launches, the choice of the attention backend. Not real are all numbers
(what is read back is 0) and all seconds. cuDNN is off, and a convolution is an allocation and one launch.

``build`` compiles benchmarks/null_device.c with gcc against the headers of an installed package. A program runs on the
device where ``environment`` is its environment, and calls ``prepare`` before anything else that uses torch.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modules.runtime.errors import InputError

SOURCE = Path(__file__).with_suffix(".c")
ROOT = SOURCE.parent.parent
# Names of CUDA and cuBLAS that torch's libraries look for. cuDNN and other libraries stay as they are.
_NAMES = re.compile(r"(?:__cuda|cuda|cu|cublas|cublasLt)[A-Z]\w*")
_PRODUCTS = re.compile(r"gemm|gemv|Matmul$|dot|trsm", re.IGNORECASE)


class Unavailable(RuntimeError):
    """The null device cannot be built here; the message says why."""


def build(folder: Path | None = None) -> Path:
    """The library to preload, built in ``folder`` or else in the system's temporary one unless it is there already.

    Raises Unavailable without gcc, nm, a CUDA build of torch or its headers.
    """
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            raise Unavailable(f"{tool} is not installed")
    found = find_spec("torch")
    assert found is not None and found.submodule_search_locations
    libraries = sorted((Path(found.submodule_search_locations[0]) / "lib").glob("lib*.so"))
    if not any(library.name == "libtorch_cuda.so" for library in libraries):
        raise Unavailable("the installed torch is a build without CUDA")
    triton = find_spec("triton")
    places = list(triton.submodule_search_locations or []) if triton else []
    headers = next((path for place in places for path in Path(place).rglob("cuda_runtime_api.h")), None)
    if headers is None:
        raise Unavailable("triton, which has the headers of CUDA, is not installed")
    key = hashlib.sha256(
        SOURCE.read_bytes() + Path(__file__).read_bytes() + str(libraries[0].stat().st_mtime_ns).encode()
    ).hexdigest()[:16]
    folder = folder or Path(tempfile.gettempdir()) / f"null_device_{os.getuid()}"
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        _compile(library, libraries, headers.parent)
    return library


def _compile(library: Path, libraries: list[Path], headers: Path) -> None:
    wanted = {name for needed in libraries for name in _symbols("--undefined-only", needed) if _NAMES.fullmatch(name)}
    # The name of the driver's library: whoever opens that one by name gets this one, which is loaded already.
    name = "-Wl,-soname,libcuda.so.1"
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        own, others, made = Path(scratch) / "own.o", Path(scratch) / "others.c", Path(scratch) / "made.so"
        _gcc("-c", f"-I{headers}", SOURCE, "-o", own)
        rest = [
            f"int {name}(void) {{ {'null_product(); ' if _PRODUCTS.search(name) else ''}return 0; }}"
            for name in sorted(wanted.difference(_symbols("--defined-only", own)))
        ]
        others.write_text("void null_product(void);\n" + "\n".join(rest) + "\n", encoding="utf-8")
        _gcc("-shared", name, own, others, "-o", made)
        made.rename(library)


def _symbols(kind: str, file: Path) -> list[str]:
    dynamic = ["-D"] if file.suffix == ".so" else []
    listed = subprocess.run(["nm", *dynamic, "--format=posix", kind, file], capture_output=True, text=True).stdout
    return [line.split()[0].split("@")[0] for line in listed.splitlines() if line]


def _gcc(*arguments: str | Path) -> None:
    done = subprocess.run(["gcc", "-fPIC", "-O1", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"gcc: {' '.join(done.stderr.split())[:300]}")


def environment(library: Path, capabilities: Sequence[int] = (80,)) -> dict[str, str]:
    """The environment of a program that finds a null device of each of ``capabilities`` (80 is 8.0)."""
    return os.environ | {
        "LD_PRELOAD": str(library),
        "NULL_DEVICE": str(library),
        "NULL_DEVICES": ",".join(map(str, capabilities)),
        "OMP_NUM_THREADS": "1",
    }


def is_loaded() -> bool:
    """Whether this process runs on the null device."""
    return "NULL_DEVICE" in os.environ


def start_on_it() -> None:
    """Start this program anew on the null device unless it is there; InputError where the device cannot be built."""
    if is_loaded():
        return
    try:
        library = build()
    except Unavailable as reason:
        raise InputError(f"the null device cannot be built: {reason}") from reason
    os.execve(sys.executable, [sys.executable, *sys.argv], environment(library))


class NullDevice:
    """The device's counters, and where a program waited for it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["NULL_DEVICE"])
        self._library.null_name.restype, self._library.null_count.restype = ctypes.c_char_p, ctypes.c_long
        self.names: list[str] = []
        while name := self._library.null_name(len(self.names)):
            self.names.append(name.decode())

    def counts(self) -> Counter[str]:
        """Every counter since the program began; see COUNTERS in benchmarks/null_device.c."""
        return Counter({name: self._library.null_count(number) for number, name in enumerate(self.names)})

    def launch(self) -> None:
        """Count a launch that takes place in Python."""
        self._library.null_launch()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """What the block does, complete at its end; ``waits at <file>:<line>`` are its waits by their callers."""
        found: Counter[str] = Counter()
        with waits_by_line(found):
            before = self.counts()
            try:
                yield found
            finally:
                found.update(self.counts() - before)


@contextlib.contextmanager
def waits_by_line(found: Counter[str]) -> Iterator[None]:
    """Count each wait for the device in the block, of any CUDA device, as ``waits at <file>:<line>`` of its caller."""
    import torch

    def noted(message: Warning | str, *_: Any) -> None:
        if "synchronizing CUDA" in str(message):
            found[f"waits at {_caller()}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = noted
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _caller() -> str:
    """The innermost line of the project that is being run."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "torch"


def prepare() -> NullDevice:
    """Make torch usable on the null device, which must be loaded; returns its counters."""
    import torch

    from modules.layers.device_check import pass_unchecked

    device = NullDevice()
    pass_unchecked()  # the path that a GPU takes is the one to count
    torch.backends.cudnn.enabled = False
    _replace_convolutions(device)
    torch.zeros(1, device="cuda")  # creates the context
    return device


def _replace_convolutions(device: NullDevice) -> None:
    import torch
    from torch import Tensor

    def like(x: Tensor, result: Tensor) -> Tensor:
        """Memory for ``result``, which is on the meta device, in the layout of ``x``."""
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        device.launch()
        return torch.empty(result.shape, dtype=result.dtype, device=x.device, memory_format=layout)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *how):
        assert x.dtype == weight.dtype and x.device == weight.device, (x.dtype, weight.dtype, x.device, weight.device)
        return like(x, torch.ops.aten.convolution(x.to("meta"), weight.to("meta"), None, *how))

    def backward(grad: Tensor, x: Tensor, weight: Tensor, bias_sizes, *how):
        *_, wanted = how
        of_input, of_weight, of_bias = wanted
        return (
            like(x, x) if of_input else None,
            like(x, weight) if of_weight else None,
            like(x, weight.flatten(1)[:, 0]) if of_bias else None,
        )

    global _convolutions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its own kernels are replaced
        _convolutions = torch.library.Library("aten", "IMPL")
        _convolutions.impl("convolution", forward, "CUDA")
        _convolutions.impl("convolution_backward", backward, "CUDA")


if __name__ == "__main__":  # python benchmarks/null_device.py program.py --flags: the program on the null device
    import runpy

    if is_loaded():
        sys.path.insert(0, str(ROOT))
        null = prepare()
        sys.argv = sys.argv[1:]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print(dict(null.counts()), file=sys.stderr)
    else:
        os.execve(sys.executable, [sys.executable, *sys.argv], environment(build()))
