"""What the process behind scripts/serve.py does: loads a checkpoint once, then writes reports for images in memory."""

import dataclasses
import io
import sys
from collections.abc import Callable, Mapping
from typing import Any

from modules.runtime.errors import InputError

SIMILAR = 3  # training reports shown below a report


Write = Callable[[Mapping[str, Any], list[bytes]], dict[str, Any]]


def report_writer(path: str, given: Mapping[str, Any], index_path: str | None) -> tuple[Write, dict[str, Any]]:
    """A function (request, files) -> {"html": ...} with the model in checkpoint ``path``, and what the page must know.

    A request has ``names`` of its files, ``together`` (they are views of one study) and ``beam_size``.
    InputError as in load_predictor.
    """
    from modules.data.images import decode_image, refuse_blank
    from modules.inference.prediction import ABSENT_CONTEXT
    from modules.inference.report_index import ReportIndex
    from modules.pages.prediction_page import PageStudy, render_studies
    from modules.run.predictor import load_predictor

    predictor = load_predictor(path, given)
    note = ABSENT_CONTEXT if predictor.backbone.study_context is not None else ""
    if note:
        print(note, file=sys.stderr, flush=True)
    index = None
    if index_path:
        index = ReportIndex.load(index_path)
        index.check(index_path, predictor.extractor_sha256(), predictor.backbone.image_dim)

    def write(request: Mapping[str, Any], files: list[bytes]) -> dict[str, Any]:
        decoding = dataclasses.replace(predictor.decoding, beam_size=request["beam_size"], group_size=1)
        named = list(zip(request["names"], files, strict=True))
        groups = [named] if request["together"] else [[one] for one in named]
        studies = []
        for group in groups:
            if len(group) > predictor.num_views:
                raise InputError(
                    f"{len(group)} images for one study, but this model reads {predictor.num_views}: "
                    "choose 'a study each', or fewer images"
                )
            images = [
                decode_image(io.BytesIO(content), name, draft=predictor.transform.draft) for name, content in group
            ]
            for (name, _), image in zip(group, images, strict=True):
                refuse_blank(image, name)
            predictor.decoding = decoding
            name = ", ".join(name for name, _ in group)
            [report] = predictor.write([images], names=[name], attention=predictor.shows_attention)
            similar = index.nearest(report.pooled, SIMILAR) if index is not None else ()
            studies.append(PageStudy.of(name, images, report, similar))
        return {"html": render_studies(studies)}

    return write, {"num_views": predictor.num_views, "beam_size": predictor.decoding.beam_size, "note": note}
