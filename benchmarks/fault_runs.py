"""Tiny trainings that a campaign of faults stops, breaks and resumes, each in a forked process: a second or two.

Nothing is downloaded; the data are synthetic. Everything lies below one temporary folder.
"""

import contextlib
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = (
    "--visual_extractor test_efficientnet --visual_extractor_pretrained false --image_size 32 --d_model 16 "
    "--d_ff 16 --num_heads 2 --num_layers 1 --cmm_size 16 --cmm_dim 16 --topk 4 --embedding_dim 8 "
    "--max_seq_length 24 --beam_size 1 --num_workers 0 --tensorboard false --meteor false --lr_ed 1e-3 "
    "--strategy ithn --alpha 0.5 --batch_size 2 --epochs 3 --checkpoint_steps 2 --monitor_metric nll "
    "--use_bn 1 --device cpu --floors false --report_samples 0"
).split()
# What a run's last checkpoint may differ in from another's: when, where and with which flags it was made.
FREE = ("seconds", "provenance", "config")


@dataclass
class Progress:
    """Shared with a child: how many optimiser steps it has made, and whether it is inside a checkpoint's write."""

    memory: mmap.mmap

    @classmethod
    def shared(cls) -> "Progress":
        return cls(mmap.mmap(-1, 16))

    @property
    def steps(self) -> int:
        return struct.unpack_from("q", self.memory, 0)[0]

    @steps.setter
    def steps(self, value: int) -> None:
        struct.pack_into("q", self.memory, 0, value)


class Bench:
    """Data, a reference run that nothing disturbs, and runs of the same settings to disturb."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.progress = Progress.shared()
        self._make_data()
        self.argv = [
            "--ann_path",
            str(folder / "data" / "annotation.json"),
            "--image_dir",
            str(folder / "data" / "images"),
            "--negative_index",
            str(folder / "negatives.safetensors"),
            "--record_dir",
            str(folder / "records"),
            *FLAGS,
        ]
        started = time.monotonic()
        code = self.wait(self.start(folder / "reference"))
        assert code == 0, f"the undisturbed run ended with {code}: see {folder}/reference.log"
        self.seconds = time.monotonic() - started
        self.reference = load(folder / "reference")
        self.steps = self.reference["position"]["total_steps"]

    def _make_data(self) -> None:
        from scripts.synthetic.dataset import draw_images, plan_studies, prepare_folder, write_tables

        data = self.folder / "data"
        data.mkdir()
        studies = plan_studies(seed=3, number=20, normal_fraction=0.4, findings=None, reports=None)
        prepare_folder(data)
        for _ in draw_images(data, studies, seed=3, size=64, workers=1):
            pass
        write_tables(data, studies, "drawn for a campaign of faults")
        from modules.data.annotations import read_annotation
        from scripts.mine_hard_negatives import build_parser, mine

        arguments = build_parser().parse_args(
            [
                "--ann_path",
                str(data / "annotation.json"),
                "--out",
                str(self.folder / "negatives.safetensors"),
                "--text_encoder",
                "tfidf",
                "--top_k",
                "3",
                "--device",
                "cpu",
            ]
        )
        with quiet(self.folder / "mining.log"):
            mine(arguments, read_annotation(data / "annotation.json")).save(self.folder / "negatives.safetensors")

    def start(self, folder: Path, *flags: str, before: Callable[[], None] | None = None) -> int:
        """Fork main_train.py's work into ``folder``, a process group of its own; returns its process id.

        ``before`` runs in the child first: it sets traps. What is printed goes to <folder>.log.
        """
        self.progress.steps = 0
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, 0)
        try:
            with quiet(folder.with_name(f"{folder.name}.log")):
                os._exit(_work(["--save_dir", str(folder), *self.argv, *flags], self.progress, before))
        finally:  # whatever happens, the child must not go on with its parent's work
            os._exit(71)

    def reach(self, pid: int, folder: Path, rng: random.Random) -> None:
        """Wait for a random instant of the run, or its end: some time after a step that is drawn at random."""
        step = rng.randrange(self.steps)
        # Until there is a folder the program has not begun.
        while not (folder.is_dir() and self.progress.steps >= step or self._ended(pid)):
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 3 * self.seconds / self.steps))

    def _ended(self, pid: int) -> bool:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait(self, pid: int, limit: float = 120.0) -> int | None:
        """Exit code of ``pid``, negative for a signal; None where it had to be killed after ``limit`` seconds."""
        code = _wait(pid, limit)
        if code is None:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return code

    def resume(self, folder: Path, *flags: str) -> bool:
        """Let a broken run continue to its end; whether that end is the reference's, bit by bit."""
        code = self.wait(self.start(folder, "--resume", "auto", *flags))
        return code == 0 and same(self.reference, load(folder))


def _work(argv: list[str], progress: Progress, before: Callable[[], None] | None) -> int:
    from modules.flags import parse_flags
    from modules.run import training
    from modules.runtime.errors import run_entry_point
    from modules.runtime.stopping import GracefulShutdown
    from modules.training.trainer import Trainer

    step = Trainer._step

    def counted(self: Trainer, group: list) -> None:
        step(self, group)
        progress.steps = self.position.total_steps + 1

    # Neither curves nor the test split are what is at stake.
    Trainer._step = counted
    training.training_curves = lambda history: b""
    training.test_and_write = lambda *_, **__: None
    if before is not None:
        before()

    def work() -> None:
        given, ignored = parse_flags(argv, "main_train.py", "")
        with GracefulShutdown() as shutdown:
            training.run_training(given, ignored, shutdown)

    try:
        run_entry_point(work)
    except SystemExit as left:
        import multiprocessing.util

        multiprocessing.util._exit_function()  # what the interpreter does at its end
        return int(left.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 70
    return 0


def _wait(pid: int, limit: float) -> int | None:
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def group_is_gone(pid: int, limit: float = 10.0) -> bool:
    """Whether no process of the group is left, or none soon."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send this process's output to the end of ``log``."""
    kept = [os.dup(number) for number in (1, 2)]
    with open(log, "ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def load(folder: Path) -> dict[str, Any]:
    """The current checkpoint in ``folder``."""
    from modules.training.checkpoint import load_checkpoint
    from modules.training.checkpoint_folder import CURRENT

    return load_checkpoint(folder / CURRENT)


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints are equal bit by bit, but for FREE."""
    import torch

    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one if key not in FREE)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other
