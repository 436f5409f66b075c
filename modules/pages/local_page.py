"""The page of scripts/serve.py: drop images, read their report; it answers this machine alone and keeps nothing.

Whoever opens the page must know the random token in its address, so another user of the machine cannot; a page of
another site can neither read it (Origin and Host are checked on every route) nor send to it. Uploads are held in memory
until they are read and are written nowhere.
"""

import asyncio
import hmac
import json
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from modules.inference.prediction import WARNING
from modules.pages.rendering import TEMPLATES, page_parts
from modules.runtime.answering import AnswerFailed
from modules.runtime.errors import InputError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

LOOPBACK = "127.0.0.1"
MAX_REQUEST = 256 * 2**20  # bytes of one request's files
MAX_HELD = 2 * MAX_REQUEST  # bytes of all requests that are read or wait
MAX_WAITING = 8  # requests, the one at work included
MAX_FILES = 16
MAX_HEAD = 2**16  # bytes of a request's first line
SECONDS_TO_SEND = 60
MAX_CONNECTIONS = 64
MAX_NAME = 80
TYPE = "application/octet-stream"  # not a form's, so another site cannot send it unasked

HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

# A request (names, together, beam_size) and its files' bytes to {"html": ...}; InputError and AnswerFailed are shown.
Write = Callable[[dict[str, Any], list[bytes]], dict[str, Any]]


class Refused(Exception):
    """A request that is turned down with this status and reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class LocalPage:
    """The application (ASGI) for a server that listens on LOOPBACK at ``port``; ``write`` serves one request at a time.

    ``token`` is the secret of the address, ``note`` a line at the top. Requests beyond MAX_WAITING or MAX_HELD are
    refused at once (503).
    """

    def __init__(
        self, write: Write, *, token: str, port: int, checkpoint: str, beam_size: int, num_views: int, note: str = ""
    ):
        self._write, self._token = write, token
        self._hosts = {f"{LOOPBACK}:{port}", f"localhost:{port}"}
        self._page, policy = _render(checkpoint=checkpoint, beam_size=beam_size, num_views=num_views, note=note)
        self._headers = HEADERS | {"Content-Security-Policy": policy}
        self._held = self._waiting = 0
        self._turn = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse

        if scope["type"] != "http":  # no websockets
            return
        request = Request(scope, receive)
        try:
            response = await self._respond(request)
        except Refused as refusal:
            response = JSONResponse({"error": str(refusal)}, refusal.status)
        except ClientDisconnect:
            return
        response.headers.update(self._headers)
        await response(scope, receive, send)

    async def _respond(self, request: "Request") -> "Response":
        from starlette.responses import HTMLResponse, Response

        self._check_sender(request)
        token, _, route = request.url.path.lstrip("/").partition("/")
        if not hmac.compare_digest(token.encode(), self._token.encode()):
            raise Refused(404, "open the address that scripts/serve.py printed, with everything after the slash")
        match request.method, route:
            case "GET", "":
                return HTMLResponse(self._page)
            case "GET", "example.png":
                return Response((TEMPLATES / "example.png").read_bytes(), media_type="image/png")
            case "POST", "report":
                return await self._report(request)
        raise Refused(404, "there is no such page")

    def _check_sender(self, request: "Request") -> None:
        """Refused unless the browser was pointed at this address itself and, where it sends, by this very page."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if host not in self._hosts:
            raise Refused(400, "open the printed address; through a tunnel, forward the same port number")
        if origin is not None and origin != f"http://{host}":
            raise Refused(403, "another site may not use this page")
        if request.method == "POST" and origin is None:
            raise Refused(403, "a report is written for this page only")
        if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise Refused(403, "another site may not use this page")

    async def _report(self, request: "Request") -> "Response":
        from starlette.responses import JSONResponse

        length = _length(request)
        if self._waiting >= MAX_WAITING or self._held + length > MAX_HELD:
            raise Refused(503, "too many requests at once: try again in a moment")
        self._waiting, self._held = self._waiting + 1, self._held + length
        try:
            asked, files = _parts(await _body(request, length))
            async with self._turn:
                answer = await asyncio.to_thread(self._write, asked, files)
        except InputError as error:
            raise Refused(422, str(error)) from error
        except AnswerFailed as error:
            raise Refused(504, str(error)) from error
        finally:
            self._waiting, self._held = self._waiting - 1, self._held - length
        return JSONResponse(answer)


def _length(request: "Request") -> int:
    """The number of bytes that are to come; Refused where that is not said, or too much."""
    if request.headers.get("content-type") != TYPE:
        raise Refused(415, f"a request for a report has the type {TYPE}")
    text = request.headers.get("content-length", "")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Refused(411, "the request does not say how long it is")
    if int(text) > MAX_REQUEST + MAX_HEAD:
        raise Refused(413, f"the files have more than {MAX_REQUEST // 2**20} MiB together")
    return int(text)


async def _body(request: "Request", length: int) -> bytearray:
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS_TO_SEND):
            async for piece in request.stream():
                body += piece
                if len(body) > length:
                    raise Refused(400, "the request is longer than it said")
    except TimeoutError as error:
        raise Refused(408, f"the files took longer than {SECONDS_TO_SEND} s to arrive") from error
    return body


def _parts(body: bytearray) -> tuple[dict[str, Any], list[bytes]]:
    """A request's first line, JSON with together, beam_size and the files' names and sizes, and the files behind it."""
    end = body.find(b"\n", 0, MAX_HEAD)
    try:
        head = json.loads(body[: max(end, 0)])
        names, sizes = head["names"], head["sizes"]
        together, beam_size = head["together"], head["beam_size"]
        fits = all(isinstance(name, str) for name in names) and all(type(size) is int and size >= 0 for size in sizes)
        fits = fits and len(names) == len(sizes) and isinstance(together, bool) and type(beam_size) is int
    except (ValueError, KeyError, TypeError, RecursionError):
        fits = False
    if not fits or end + 1 + sum(sizes) != len(body):
        raise Refused(400, "the request is not one of this page")
    if not 1 <= len(names) <= MAX_FILES:
        raise Refused(422, f"1 to {MAX_FILES} images at a time, not {len(names)}")
    if not 1 <= beam_size <= 10:
        raise Refused(422, f"1 to 10 beams, not {beam_size}")
    files, at = [], end + 1
    for size in sizes:
        files.append(bytes(body[at : at + size]))
        at += size
    return {"names": [shown_name(name) for name in names], "together": together, "beam_size": beam_size}, files


def shown_name(name: str) -> str:
    """A file's own name without folders, control characters or more than MAX_NAME characters."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(character for character in last if character.isprintable())[:MAX_NAME] or "image"


def _render(**facts: Any) -> tuple[str, str]:
    """The page's text, with the ``facts`` of its model, and its Content-Security-Policy."""
    styles, scripts = ("prediction.css", "local.css"), ("prediction.js", "local.js")
    template, parts, hashes = page_parts("local.html.j2", styles, scripts)
    policy = (
        f"default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; style-src {hashes['style']}; "
        f"script-src {hashes['script']}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return template.render(**parts, **facts, warning=WARNING, max_files=MAX_FILES), policy


def listen(port: int) -> Any:
    """A socket that listens on loopback; InputError where the port is taken."""
    import socket

    try:
        return socket.create_server((LOOPBACK, port), backlog=2 * MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port}: cannot be listened on ({error}); choose another, or 0") from error


def run_server(page: LocalPage, sockets: Sequence[Any]) -> None:
    """Serve ``page`` until the process is interrupted.

    Connections beyond MAX_CONNECTIONS are refused at once (503); those without a request in SECONDS_TO_SEND are closed.
    """
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(SECONDS_TO_SEND, self.look)

        def look(self) -> None:
            """Close a connection on which no request is being answered; look again later at another."""
            if self.transport.is_closing():
                return
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
            else:
                self.loop.call_later(SECONDS_TO_SEND, self.look)

    config = uvicorn.Config(
        page,
        http=Impatient,
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=list(sockets))
