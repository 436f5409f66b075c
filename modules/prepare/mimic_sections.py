"""Findings and impression out of a MIMIC-CXR report, which is plain text with headers of many wordings.

A header stands at the beginning of a line, or behind a sentence, and ends in a colon. It counts where its name is one
of the known kinds; any other ("LUNGS:") is text of the section that it stands in.
"""

import re

SECTIONS = ("findings", "impression", "both")
_CANDIDATE = re.compile(
    r"(?:^[ \t]*|(?<=[.!?])[ \t]+)(?P<name>[A-Za-z][A-Za-z0-9 \t/,&()'.#-]{0,70}?)[ \t]*:(?!\d)", re.MULTILINE
)
_RESULT = r"(?:FINAL )?(?:FINDINGS?|IMPRESSIONS?|CONCLUSIONS?)"
# The first kind that fits a header's whole name, in capitals, decides.
_KINDS = (
    ("both", re.compile(rf"{_RESULT} ?(?:AND|&|/|,) ?{_RESULT}")),
    ("findings", re.compile(r"(?:FINAL |CHEST )?FINDINGS?(?: .*)?|REPORT")),
    ("impression", re.compile(r"(?:FINAL )?IMPRESSIONS?(?: .*)?|CONCLUSIONS?|SUMMARY|OPINION")),
    (
        "other",
        re.compile(
            r"(?:INDICATIONS?|COMPARISONS?|TECHNIQUES?|RECOMMENDATIONS?|NOTIFICATIONS?|REASON|CLINICAL|HISTORY|"
            r"WET READ|"
            r"PROCEDURES?|ADDENDUM|STUDY|DATE|CONTRAST|DOSE|TYPE OF|ATTESTATION|DIAGNOSIS)\b.*|"
            r"EXAM(?:INATION)?S?(?: .*)?|.*\bHISTORY|.*\bINDICATION|PRIOR\b.*"
        ),
    ),
    # "PA AND LATERAL VIEWS OF THE CHEST:" stands for "FINDINGS:" in reports that have none.
    ("views", re.compile(r".*\b(?:CHEST|VIEWS?|RADIOGRAPHS?|FILMS?|X-?RAYS?|CXR|PORTABLE|UPRIGHT)\b.*")),
)
_RULE = re.compile(r"_{8,}|-{8,}|={8,}")  # "___" is a removed word, more of them a line across the page


def extract_section(text: str, section: str) -> str:
    """``section`` ("findings", "impression" or "both", findings first) of a report on one line; "" where it has none.

    Of a report with a wet read or an addendum the final report is taken. A section that comes more than once is joined.
    """
    found = _sections(text)
    findings = found["findings"] or found["views"]
    if section == "findings":
        return " ".join(findings + found["both"])
    if section == "impression":
        return " ".join(found["impression"] + found["both"])
    return " ".join(findings + found["impression"] + found["both"])


def _sections(text: str) -> dict[str, list[str]]:
    """The texts under each kind of header, empty ones left out."""
    text = text.replace("\r\n", "\n")
    final = [match.end() for match in re.finditer(r"FINAL REPORT", text)]
    text = _RULE.sub(" ", text[final[-1] :] if final else text)
    found: dict[str, list[str]] = {name: [] for name, _ in _KINDS}
    headers = [(match, kind) for match in _CANDIDATE.finditer(text) if (kind := _kind(match["name"]))]
    for index, (match, kind) in enumerate(headers):
        end = headers[index + 1][0].start() if index + 1 < len(headers) else len(text)
        content = " ".join(text[match.end() : end].split())
        if content:
            found[kind].append(content)
    return found


def _kind(name: str) -> str | None:
    """What a header's name stands for; None for one of no known kind, and for words that only precede a colon."""
    words = " ".join(name.split())
    capitals = words == words.upper()
    if not capitals and not (len(words.split()) == 1 and words == words.capitalize()):
        return None
    plain = words.upper().replace("(S)", "S").rstrip(" .")
    kind = next((kind for kind, pattern in _KINDS if pattern.fullmatch(plain)), None)
    # "Chest:" or "Views:" with small letters is a part of the findings.
    return kind if capitals or kind != "views" else None
