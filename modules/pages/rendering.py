"""What all pages are made with: templates that escape; style and script with the hashes of a security policy."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def environment() -> jinja2.Environment:
    """The templates, with every text escaped and an error for a name that is not given."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page_parts(
    template: str, styles: Sequence[str], scripts: Sequence[str] = (), own_style: str = ""
) -> tuple[jinja2.Template, dict[str, Markup], dict[str, str]]:
    """A template, its ``style`` and ``script`` from files, and for each the source that a security policy names.

    ``own_style``: further rules of this page. They are not escaped: no text of a report may be in them.
    """
    texts = {
        name: [(TEMPLATES / file).read_text(encoding="utf-8") for file in files]
        for name, files in (("style", styles), ("script", scripts))
    }
    texts["style"] += [own_style] if own_style else []
    parts = {name: Markup("\n".join(found)) for name, found in texts.items()}
    digests = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in parts.items()}
    return environment().get_template(template), parts, {name: f"'sha256-{text}'" for name, text in digests.items()}


def data_uri(content: bytes, media_type: str) -> str:
    """``content`` as a data: URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
