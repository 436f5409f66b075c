"""A page of generated reports: each word with its probability, and, pointed at, where the model looked.

Self-contained, private and closed like report.html (modules/pages/html_report.py); its one script is named by its hash.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modules.inference.attention import shares
from modules.inference.prediction import WARNING, WrittenReport
from modules.pages.rendering import data_uri, environment, page_parts
from modules.runtime.records import write_private

LONGEST_SIDE = 512  # pixels of an image in the page
EVEN = 100  # an even share of attention in the page's script


@dataclass(frozen=True)
class PageStudy:
    """A study as the page shows it; only a small JPEG of each image is kept."""

    name: str
    images: tuple[str, ...]  # data addresses
    report: WrittenReport
    similar: tuple[tuple[float, str], ...] = ()  # training reports of similar images, with the cosine

    @classmethod
    def of(
        cls, name: str, images: Sequence[Image.Image], report: WrittenReport, similar: Sequence[tuple[float, str]] = ()
    ) -> "PageStudy":
        """Shrink the images."""
        return cls(name, tuple(data_uri(small_jpeg(image), "image/jpeg") for image in images), report, tuple(similar))


def small_jpeg(image: Image.Image) -> bytes:
    """A JPEG at most LONGEST_SIDE pixels long, without the file's metadata."""
    small = image.convert("L" if image.mode == "L" else "RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    small.info.clear()
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85, optimize=True)
    return buffer.getvalue()


def write_page(path: str | Path, studies: Sequence[PageStudy], *, title: str, checkpoint: str) -> None:
    """Write the page with mode 0600; InputError where it cannot be written."""
    write_private(path, render_page(studies, title=title, checkpoint=checkpoint))


def render_page(studies: Sequence[PageStudy], *, title: str, checkpoint: str) -> str:
    """The page's text."""
    template, parts, hashes = page_parts("prediction.html.j2", ("prediction.css",), ("prediction.js",))
    return template.render(
        **parts,
        hashes=hashes,
        title=title,
        checkpoint=checkpoint,
        warning=WARNING,
        studies=[_shown(study) for study in studies],
    )


def render_studies(studies: Sequence[PageStudy]) -> str:
    """The studies alone, as the page of scripts/serve.py takes them in."""
    return environment().get_template("studies.html.j2").render(studies=[_shown(study) for study in studies])


def _shown(study: PageStudy) -> dict[str, Any]:
    report = study.report
    sentences = [
        {
            "mean": f"{math.exp(sentence.mean_log_prob):.2f}",
            "words": [_word(report.words[i], report.log_probs[i]) for i in range(sentence.start, sentence.stop)],
        }
        for sentence in report.sentences
    ]
    return {
        "name": study.name,
        "images": study.images,
        "sentences": sentences,
        "cut": report.end_log_prob is None,
        "maps": None if report.maps is None else _levels(report.maps),
        "similar": [(f"{cosine:.3f}", text) for cosine, text in study.similar],
    }


def _word(word: str, log_prob: float) -> Mapping[str, str]:
    probability = math.exp(log_prob)
    doubt = "doubtful" if probability < 0.2 else "unsure" if probability < 0.5 else "sure"
    return {"text": word, "probability": f"{probability:.2f}", "doubt": doubt}


def _levels(maps: np.ndarray) -> list:
    """Maps (words, N, g, g) as whole numbers, EVEN being an even share."""
    return np.rint(shares(maps) * EVEN).astype(int).tolist()
