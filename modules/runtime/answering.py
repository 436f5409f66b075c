"""A process of its own that answers one request at a time, and is replaced where it takes too long or dies."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

from modules.runtime.errors import InputError

SECONDS_TO_END = 5.0

# Turns a request (plain values) and its files (their bytes) into an answer of plain values; InputError is passed on.
Answer = Callable[[dict[str, Any], list[bytes]], dict[str, Any]]


class AnswerFailed(Exception):
    """No answer came: the process took too long or died. A new one has been started."""


class AnsweringProcess:
    """``ask`` hands a request to a child process with the ``(answer, facts)`` that ``make_answer(*arguments)`` returns.

    Messages are JSON and raw bytes: nothing that a request holds is unpickled. The child ends when this process does,
    however it ends, since its pipe is closed then. InputError where the child cannot start, in the child's own words.
    """

    def __init__(self, make_answer: Callable[..., tuple[Answer, dict[str, Any]]], *arguments: Any, timeout: float):
        self._make_answer, self._arguments, self.timeout = make_answer, arguments, timeout
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._make_answer, self._arguments), daemon=True)
        self._process.start()
        other.close()
        self._facts: dict[str, Any] | None = None

    def wait_until_ready(self) -> dict[str, Any]:
        """The facts that the child sends once it is loaded; InputError with its reason where it cannot be."""
        try:
            return self._wait_for_facts()
        except (EOFError, OSError) as error:
            raise InputError("the process that writes reports died while it was starting") from error

    def _wait_for_facts(self) -> dict[str, Any]:
        """As ``wait_until_ready``, but EOFError or OSError from a child that died."""
        if self._facts is None:
            told = json.loads(self._pipe.recv_bytes())
            if "refused" in told:
                raise InputError(told["refused"])
            self._facts = told
        return self._facts

    def ask(self, request: dict[str, Any], files: Sequence[bytes]) -> dict[str, Any]:
        """The answer to one request; InputError where the child refuses it, AnswerFailed where none came in time."""
        try:
            self._wait_for_facts()
            self._pipe.send_bytes(json.dumps(request | {"number_of_files": len(files)}).encode())
            for content in files:
                self._pipe.send_bytes(content)
            if not self._pipe.poll(self.timeout):
                raise TimeoutError(f"no report within {self.timeout:g} s (--time_limit)")
            answer = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as error:  # TimeoutError is one
            self.close()
            self._start()
            reason = str(error) if isinstance(error, TimeoutError) else "the process that writes reports died"
            raise AnswerFailed(reason) from error
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer

    def close(self) -> None:
        """End the child, whatever it is doing."""
        self._pipe.close()
        self._process.kill()
        self._process.join(SECONDS_TO_END)


def _serve(pipe: Any, make_answer: Callable[..., Answer], arguments: tuple[Any, ...]) -> None:
    """The child: prepare once, then answer until the pipe is closed."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the parent decides
    try:
        answer, facts = make_answer(*arguments)
    except InputError as error:
        pipe.send_bytes(json.dumps({"refused": str(error)}).encode())
        return
    pipe.send_bytes(json.dumps(facts).encode())
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
            files = [pipe.recv_bytes() for _ in range(request.pop("number_of_files"))]
        except (EOFError, OSError):
            return
        try:
            result = answer(request, files)
        except InputError as error:
            result = {"refused": " ".join(str(error).split())}
        except MemoryError:
            result = {"refused": "not enough memory for these images"}
        pipe.send_bytes(json.dumps(result).encode())
