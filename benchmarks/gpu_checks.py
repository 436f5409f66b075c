"""The checks of scripts/gpu_check.py: each yields rows of one table, and one that fails leaves the others running."""

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_cases as cases
from benchmarks.host_cases import NARROW, GivenFeatures, build_backbone, make_batch
from benchmarks.measurement import operations, product_rate
from benchmarks.null_device import is_loaded, waits_by_line
from modules.layers import batch_statistics, relational_memory
from modules.runtime.cores import usable_cores
from modules.runtime.kernels import choose_kernels

SECONDS = 330  # in which everything must be done
LARGE_PRODUCT = (8192, 8192, 8192)
LARGEST_DIFFERENCE = 1e-2  # of float32 gradients between a GPU and a CPU, relative, in norm
SKIPPED_STEPS = 3  # while float16's loss scale is being found


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table, with its numbers by name; ``ok`` is None where there is nothing to hold it against."""

    section: str
    what: str
    value: str
    ok: bool | None = None
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
    """What the checks share: the device, sizes, and the time that is left."""

    device: torch.device
    quick: bool
    seconds: float = SECONDS
    started: float = dataclasses.field(default_factory=time.monotonic)
    products: dict[str, float] = dataclasses.field(default_factory=dict)  # operations per second, by precision

    def __post_init__(self) -> None:
        self.half = cases.half_precision(self.device)

    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.started)

    def precision(self, name: str) -> str:
        """``name``, and for HALF this GPU's."""
        return self.half if name == cases.HALF else name


Found = Iterator[tuple[str, str, bool | None, dict[str, float]]]  # what, value, ok, figures


def machine(run: Run) -> Found:
    """Name, versions, and the best product of matrices of each precision, which steps are held against."""
    device = run.device
    major, minor = torch.cuda.get_device_capability(device)
    yield "GPU", f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}", None, {}
    cores, total = usable_cores(), torch.cuda.get_device_properties(device).total_memory / 2**30
    yield "memory and cores", f"{total:.1f} GiB, {cores} cores", None, {"gib": total, "cores": cores}
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    yield "versions", versions, None, {}
    shapes = () if run.quick else (LARGE_PRODUCT,)
    for name, precision, allowed in (
        ("float32", "float32", False),
        ("TF32", "float32", True),
        (run.half, run.half, False),
    ):
        with cases.tf32(allowed):
            rate = run.products[name] = product_rate(str(device), "wall", precision, shapes)
        yield f"product of matrices, {name}", f"{rate / 1e12:.1f} TFLOP/s", None, {"flops_per_second": rate}


def values(run: Run) -> Found:
    """Losses, gradients and reports of tiny models: the GPU's against the CPU's."""
    cpu = torch.device("cpu")
    for name in NARROW:
        torch.manual_seed(2)
        group = make_batch(True, length=cases.TINY_LENGTH)
        ours, reference = (cases.gradients(name, group, device) for device in (run.device, cpu))
        worst = cases.largest_difference(ours, reference)
        yield f"{name}: gradients against the CPU's", f"{worst:.1e}", worst < LARGEST_DIFFERENCE, {"difference": worst}
        for decoding in cases.SEARCHES[:1] if run.quick else cases.SEARCHES:
            if name == "hf" and "guidance" in decoding:
                continue
            mine, theirs = (cases.tiny_reports(name, device, **decoding) for device in (run.device, cpu))
            alike = int((mine == theirs).all(-1).sum()) if mine.shape == theirs.shape else 0
            shown = ", ".join(f"{flag} {value}" for flag, value in decoding.items())
            yield f"{name}: reports, {shown}", f"{alike} of {len(theirs)} equal", alike == len(theirs), {"equal": alike}


def fused_kernels(run: Run) -> Found:
    """What training checks before it uses them, for R2Gen with the sizes of its memory as published."""
    for check, sizes in ((relational_memory.KERNELS, (3, 8, 512)), (batch_statistics.KERNELS, ())):
        worst = check.worst(run.device, *sizes)
        value = f"{worst.value:.1e}, at most {worst.most:.0e}"
        yield f"{check.path}: against the plain one", value, worst.is_rounding(), {"difference": worst.value}


def waits(run: Run) -> Found:
    """Places of the program at which a step waits for the GPU, and steps that were skipped."""
    for name, strategy, asked in cases.WAITING[:2] if run.quick else cases.WAITING:
        precision = run.precision(asked)
        trainer, group = cases.tiny_trainer(name, strategy, precision, run.device)
        for _ in range(3):
            cases.take_step(trainer, group)
        found: Counter[str] = Counter()
        with waits_by_line(found):
            cases.take_step(trainer, group)
        shown = ", ".join(f"{line} ({count})" for line, count in found.items()) or "none"
        yield f"{name}, {strategy}, {precision}: waits of a step", shown, not found, {"waits": found.total()}
        more = 1 if run.quick else 20
        for _ in range(more):
            cases.take_step(trainer, group)
        trainer.guard.read()
        skipped = trainer.guard.skipped
        what = f"{name}, {strategy}, {precision}: skipped of {more + 4} steps"
        yield what, f"{skipped}", skipped <= SKIPPED_STEPS, {"skipped": skipped}


def steps(run: Run) -> Found:
    """Milliseconds of a training step of R2GenCMN with ITHN on ResNet-101, and what bounds them."""
    choose_kernels(tf32=False, deterministic=False)
    counted: dict[tuple[int, int, int], int] = {}
    for case in cases.STEPS:
        case = dataclasses.replace(case, precision=run.precision(case.precision))
        if run.quick:
            case = dataclasses.replace(case, **cases.TINY_STEP)
        if (run.quick and case.compiled) or run.left() < (120 if case.compiled else 90):
            yield str(case), f"left out: {'--quick' if run.quick else 'no time'}", None, {}
            continue
        try:
            with cases.tf32(case.tf32):
                value, figures = _step(run, case, counted)
            yield str(case), value, None, figures
        except torch.cuda.OutOfMemoryError:
            yield str(case), "does not fit into this GPU's memory", None, {}
        torch.cuda.empty_cache()


def _step(run: Run, case: cases.TimedStep, counted: dict) -> tuple[str, dict[str, float]]:
    device = run.device
    torch.cuda.reset_peak_memory_stats(device)
    trainer, group = cases.timed_trainer(case, device)

    def step() -> None:
        cases.take_step(trainer, group)

    key = (case.batch_size, case.views, case.length)
    if key not in counted and not case.compiled and not case.captured:
        counted[key] = operations(step)
    started = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    first = time.perf_counter() - started
    whole, host = cases.milliseconds(step, device, times=1 if run.quick else 8, warm=1 if run.quick else 4)
    product = run.products["TF32" if case.tf32 else case.precision]
    share = counted[key] / (whole / 1000) / product
    images = 2 * case.batch_size * case.views / (whole / 1000)  # those of the hard negatives too
    gib = torch.cuda.max_memory_allocated(device) / 2**30
    figures = {"ms": whole, "host_ms": host, "share": share, "images_per_second": images, "gib": gib, "first_s": first}
    text = f"{whole:.1f} ms ({host:.1f} of the host), {share:.0%} of the product, {images:,.0f} images/s, {gib:.1f} GiB"
    if not is_loaded():  # the null device has no profiler
        count, busy = cases.kernels(step, device)
        figures |= {"kernels": count, "gpu_ms": busy}
        text += f", {count:,} kernels in {busy:.1f} ms"
    return text + (f", first step {first:.0f} s" if case.compiled else ""), figures


def decoding(run: Run) -> Found:
    """Beam search of 16 studies with R2GenCMN, 3 beams, 60 tokens, from given features."""
    length = 6 if run.quick else 60
    for precision in (run.half, "float32"):
        torch.manual_seed(0)
        if run.quick:
            backbone = build_backbone("r2gencmn", GivenFeatures())
        else:
            backbone = cases.published_backbone("r2gencmn", GivenFeatures())
        backbone, took = backbone.to(run.device).eval(), []
        for studies in (16, 16, 15):  # a kernel that is made for each shape would make the last one slow
            patches = torch.randn(studies, 98, 2048, device=run.device)
            torch.cuda.synchronize(run.device)
            started = time.perf_counter()
            cases.search(backbone, patches, precision, length, beam_size=3)
            torch.cuda.synchronize(run.device)
            took.append(time.perf_counter() - started)
        _, again, other = took
        figures = {"first_s": took[0], "again_s": again, "other_s": other, "ms_per_token": 1000 * again / length}
        text = f"{again:.2f} s, {1000 * again / length:.2f} ms a token; first {took[0]:.2f} s, 15 studies {other:.2f} s"
        yield f"beam 3, {length} tokens, {precision}", text, None, figures


def loader(run: Run) -> Found:
    """Images per second that one core reads, of synthetic JPEG radiographs."""
    from benchmarks.images import write_images
    from modules.data.images import ImageFolder
    from modules.data.reading_speed import reading_speed
    from modules.data.transforms import train_transform

    side, count = (256, 2) if run.quick else (2048, 6)
    transform = train_transform(cases.SIDE, (0.5,) * 3, (0.5,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        names = write_images(Path(folder), {"format": "jpeg", "channels": "L", "size": f"{side}x{side}"}, count)
        speed = reading_speed(ImageFolder(folder), names, transform)
    for how, rate in speed.rates().items():
        yield f"JPEG, {side} x {side}, {how}", f"{rate:,.0f} images/s and core", None, {"images_per_core_second": rate}


def determinism(run: Run) -> Found:
    """Whether two runs with --deterministic true are equal; last, since the switch stays on."""
    choose_kernels(tf32=False, deterministic=True)
    torch.backends.cudnn.benchmark = False
    ends = []
    for _ in range(2):
        trainer, _ = cases.tiny_trainer("r2gencmn", "ithn", "float32", run.device)
        torch.manual_seed(3)
        group = [make_batch(True, length=cases.TINY_LENGTH)]
        for _ in range(4):
            cases.take_step(trainer, group)
        ends.append([parameter.detach().cpu() for parameter in trainer.objective.parameters()])
    same = all(map(torch.equal, *ends))
    yield "two runs of 4 steps with --deterministic true", "equal to the bit" if same else "differ", same, {}


SECTIONS: dict[str, Callable[[Run], Found]] = {
    "machine": machine,
    "GPU against CPU": values,
    "fused kernels": fused_kernels,
    "waits": waits,
    "training step": steps,
    "decoding": decoding,
    "loader": loader,
    "determinism": determinism,
}


def rows(run: Run) -> Iterator[Row]:
    """Every check's rows; one that raises an error ends with a row that says so."""
    for section, check in SECTIONS.items():
        try:
            for what, value, ok, figures in check(run):
                yield Row(section, what, value, ok, figures)
        except Exception as error:  # whatever is broken on this GPU is what is looked for
            yield Row(
                section, "the check failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
            )


def as_json(found: list[Row]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [dataclasses.asdict(row) for row in found]
