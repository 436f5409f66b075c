"""Whether reports are in the language and about the body part that the labelers know: English, and the chest.

Both labelers label anything. Where they find nothing on either side, No Finding agrees everywhere, and a clinical F1
of 1 says nothing.
"""

import re
from collections.abc import Sequence

# Of each kind most reports have some, and reports in another language or about another body part hardly any.
_ENGLISH = frozenset(
    "the of is are and with there heart lung lungs clear right left chest size seen evidence within limits without "
    "small has have be or acute disease findings finding abnormality abnormalities process stable unchanged mild "
    "interval change lower upper active".split()
)
_CHEST = re.compile(
    r"\b(lungs?|pulmonary|cardiac|cardio\w+|heart|chest|thora\w+|pleura\w*|pneumonia\w*|pneumothora\w+|mediastin\w+"
    r"|hil(ar|um|a)|costophrenic|(hemi)?diaphragms?|air ?space|bronch\w+|atelecta\w+|ground[- ]glass|consolidat\w+"
    r"|effusions?|cxr|trache\w+)\b",
    re.IGNORECASE,
)


def misfit(references: Sequence[str]) -> str | None:
    """Why clinical labels of texts like ``references`` mean nothing, in one line; None where they can be trusted."""
    reports = [text for text in references if text.strip()]
    if not reports:
        return "there are no reference reports"
    english = sum(len(_ENGLISH & set(re.findall(r"[a-z]+", text.lower()))) >= 2 for text in reports)
    if english <= len(reports) / 2:
        return f"the labelers read English, and {1 - english / len(reports):.0%} of the references are not"
    chest = sum(_CHEST.search(text) is not None for text in reports)
    if chest <= len(reports) / 2:
        return f"the labelers know the chest, and {1 - chest / len(reports):.0%} of the references do not mention it"
    return None
