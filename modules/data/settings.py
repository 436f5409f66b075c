"""Names that flags of the data take, and what they mean to a model; torch-free, as --help reads them."""

from modules.runtime.errors import InputError

TEXTS = {"indication": 1, "prior_report": 2}  # kinds of text beside the images -> rows of the type embedding
PRIOR_IMAGE = "prior_image"
CONTEXTS = (*TEXTS, PRIOR_IMAGE)
SECTIONS = ("findings", "impression")  # of a report, in the order in which "both" has them


def parse_contexts(text: str) -> tuple[str, ...]:
    """The kinds of context in a comma-separated list; InputError for another name."""
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    for name in names:
        if name not in CONTEXTS:
            raise InputError(f"--context {text[:60]}: {name[:40]!r} is none of {', '.join(CONTEXTS)}")
    return names
