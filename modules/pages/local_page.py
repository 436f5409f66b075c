"""The page of scripts/serve.py: drop images, read their report. It answers this machine alone and keeps nothing.

What the browser sends lies in a private folder, in memory where the system has one, until it has been read; it is
deleted then, and the folder when the server ends.
"""

import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modules.inference.prediction import WARNING
from modules.runtime.errors import InputError

LOOPBACK = "127.0.0.1"
TOGETHER, APART = "views of one study", "a study each"
# The page's own files only: whatever the toolkit's templates name elsewhere stays unloaded.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'self'; base-uri 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# Images' paths, whether they are one study, and the beam size, to the page that shows their reports.
Write = Callable[[Sequence[Path], bool, int], str]


def upload_folder() -> Path | None:
    """Where uploads may lie: in memory; None where the system has no such place."""
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else None


def build_app(write: Write, *, checkpoint: str, beam_size: int, num_views: int) -> Any:
    """The web application (FastAPI) around ``write``, for a server that listens on LOOPBACK."""
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(openapi_url=None)
    # A page elsewhere could let its own name point here and read the answers.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])

    @app.middleware("http")
    async def closed(request, call_next):
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    blocks = build_blocks(write, checkpoint=checkpoint, beam_size=beam_size, num_views=num_views)
    blocks.queue(default_concurrency_limit=1, max_size=20)  # one model, one report at a time
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=LOOPBACK,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size="200mb",
    )


def build_blocks(write: Write, *, checkpoint: str, beam_size: int, num_views: int) -> Any:
    """What is on the page, from top to bottom, which is the order of the keyboard as well."""
    import gradio

    with gradio.Blocks(title="Report generation", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        gradio.Markdown(f"# Report generation\n\nwritten by `{html.escape(checkpoint)}`\n\n**{WARNING}**")
        files = gradio.File(label="Images: PNG, JPEG or DICOM", file_count="multiple", type="filepath")
        with gradio.Row():
            meaning = gradio.Radio(
                [TOGETHER, APART],
                value=TOGETHER if num_views > 1 else APART,
                label="Several images are",
                interactive=num_views > 1,
            )
            beams = gradio.Slider(1, 10, value=beam_size, step=1, label="Beams")
        button = gradio.Button("Write the report", variant="primary")
        result = gradio.HTML(label="Reports")
        button.click(
            lambda paths, chosen, width: answer(write, paths, chosen == TOGETHER, int(width)),
            inputs=[files, meaning, beams],
            outputs=[result, files],
            api_visibility="private",
        )
    return blocks


def answer(write: Write, paths: Sequence[str] | None, together: bool, beam_size: int) -> tuple[str, None]:
    """The reports as a frame of their own, and the emptied field of files, which are deleted whatever happens."""
    import gradio

    if not paths:
        raise gradio.Error("Drop an image first.", print_exception=False)
    files = [Path(path) for path in paths]
    try:
        page = write(files, together, beam_size)
    except InputError as error:
        raise gradio.Error(" ".join(str(error).split()), print_exception=False) from error
    finally:
        for file in files:
            file.unlink(missing_ok=True)
    frame = (
        f'<iframe title="Generated reports" sandbox="allow-scripts" srcdoc="{html.escape(page)}" '
        'style="width: 100%; height: 75vh; border: 0"></iframe>'
    )
    return frame, None
