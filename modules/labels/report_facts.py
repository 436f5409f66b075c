"""What a report says beyond its labels: comparisons, devices by kind, the side of findings, contradicting sentences.

All by the rule labeler's sentences (modules.labels.sentences) and its labels of each; sections such as "Comparison:"
are left out there.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from modules.labels.labeler import NEGATIVE, POSITIVE, UNCERTAIN, label_sentence
from modules.labels.sentences import split_sentences

DEVICE = "Support Devices"
# Findings that have a side.
LATERAL = (
    *("Lung Lesion", "Lung Opacity", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture"),
)
LEFT, RIGHT = "left", "right"
# Findings of one kind: who denies an infiltrate may state a scar, which is an opacity too.
CONTRADICTED = (
    *("Cardiomegaly", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture"),
)

# Says what an earlier examination showed, or that something differs from it.
_COMPARES = re.compile(
    r"\b(?:unchanged|compar(?:ed|ison|able)\b|in the interval|interval (?:change|develop|increas|decreas|improv|worsen"
    r"|removal|placement|resol|progress|clearing|appearance)\w*|(?:no|without|little|minimal|slight)(?: \w+)? change"
    r"|stable|prior|previous(?:ly)?|earlier (?:study|exam|film|radiograph)\w*|redemonstrat\w+"
    r"|again (?:seen|noted|demonstrated|identified)|remains?|persist\w*|no longer|since the|new(?:ly)?\b(?! york)"
    r"|worsen\w*|improv(?:ed|ing|ement)"
    r"|(?:has|have) (?:\w+ )?(?:increased|decreased|resolved|cleared|progressed|enlarged))"
)
# Kinds of devices, and what is said of each.
DEVICE_KINDS: Mapping[str, str] = {
    "endotracheal tube": r"endotracheal|\bett\b|\bet tube|tracheostomy|intubat",
    "feeding tube": r"nasogastric|orogastric|enteric|\bngt\b|\bogt\b|\b[no]g tube|feeding tube|dob+hoff|gastrostomy",
    "chest tube": r"chest (?:tube|drain)|thoracostomy|pigtail|pleural (?:tube|drain|catheter)",
    "central line": r"\bpicc\b|central (?:venous )?(?:line|catheter)|\bcv[cl]\b|jugular|subclavian|port-a-cath|mediport"
    r"|(?:chest|infusion) port\b|swan[ -]ganz|hickman|dialysis catheter|pulmonary arter(?:y|ial) catheter",
    "pacemaker": r"\bpacer|pacemaker|\ba?icds?\b|defib|pacing",
    "valve": r"\bvalves?\b",
    "balloon pump": r"balloon pump|\biabp\b",
    "orthopaedic hardware": r"hardware|screw|\bplates?\b|\brods?\b|arthroplast",
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in DEVICE_KINDS.items()}
OTHER_DEVICE = "another device"

_BOTH_SIDES = re.compile(
    r"\b(?:left (?:and|or|greater than|more than) right|right (?:and|or|greater than|more than) left|both"
    r"|bilateral(?:ly)?|biapical|bibasilar)\b"
)
_SIDE = re.compile(r"\b(left|right|bilateral)(?:-sided)?\b")
_CLAUSE = re.compile(r"[,;]| and | but | with | while ")
# A denial of one kind of a finding does not deny the finding.
_PARTIAL = re.compile(
    r"\b(?:new|other|another|additional|further|residual|large|sizable|significant|acute|displaced|definite|increas\w*"
    r"|enlarg\w*|worsen\w*|chang\w*|progress\w*|recurrent|suspicious|focal|lobar|confluent|tension)\b"
)


@dataclass(frozen=True)
class ReportFacts:
    """Of one report: whether it compares, its devices, the sides of its findings, and sentences that contradict others.

    ``sides`` has the findings that are stated, and the sides on which; none where the text does not say.
    ``contradictions`` counts the sentences that deny what another sentence states.
    """

    compares: bool
    devices: frozenset[str]
    sides: Mapping[str, frozenset[str]]
    contradictions: int


@dataclass(frozen=True)
class _Sentence:
    compares: bool
    devices: frozenset[str]
    labels: Mapping[str, int]  # the strongest of each class
    sides: Mapping[str, frozenset[str]]
    denies_a_part: bool


def report_facts(text: str) -> ReportFacts:
    """The facts of a report."""
    found = [_sentence(sentence) for sentence in split_sentences(text)]
    sides: dict[str, frozenset[str]] = {}
    for sentence in found:
        for name, label in sentence.labels.items():
            if label == POSITIVE and name in LATERAL:
                sides[name] = sides.get(name, frozenset()) | sentence.sides.get(name, frozenset())
    return ReportFacts(
        compares=any(sentence.compares for sentence in found),
        devices=frozenset().union(*(sentence.devices for sentence in found)),
        sides=sides,
        contradictions=sum(any(_contradicts(one, other) for other in found) for one in found),
    )


def _contradicts(denial: _Sentence, other: _Sentence) -> bool:
    """Whether a sentence denies what the other states, of a side that both may mean."""
    if denial is other or denial.denies_a_part:
        return False
    for name in CONTRADICTED:
        if denial.labels.get(name) == NEGATIVE and other.labels.get(name) == POSITIVE:
            sides = denial.sides.get(name), other.sides.get(name)
            if not (all(sides) and sides[0].isdisjoint(sides[1])):
                return True
    return False


@lru_cache(maxsize=1 << 15)
def _sentence(sentence: str) -> _Sentence:
    labels: dict[str, int] = {}
    order = (NEGATIVE, UNCERTAIN, POSITIVE)
    for name, label in label_sentence(sentence):
        labels[name] = max(labels.get(name, NEGATIVE), label, key=order.index)
    devices = frozenset()
    if labels.get(DEVICE) in (POSITIVE, UNCERTAIN):
        kinds = [kind for kind, pattern in _KINDS.items() if pattern.search(sentence)]
        devices = frozenset(kinds or [OTHER_DEVICE])
    partial = _PARTIAL.search(sentence) is not None
    return _Sentence(_COMPARES.search(sentence) is not None, devices, labels, _sides(sentence, labels), partial)


def _sides(sentence: str, labels: Mapping[str, int]) -> dict[str, frozenset[str]]:
    """The sides of each finding: those of its clause, else the only one that the sentence names."""
    if not _SIDE.search(sentence) and not _BOTH_SIDES.search(sentence):
        return {}
    sentence = _BOTH_SIDES.sub("bilateral", sentence)
    whole = _sides_of(sentence)
    found: dict[str, frozenset[str]] = {}
    for clause in _CLAUSE.split(sentence):
        own = _sides_of(clause)
        for name in {name for name, _ in label_sentence(clause)} if own else ():
            found[name] = found.get(name, frozenset()) | own
    return {name: found.get(name, whole) for name in labels if name in found or len(whole) == 1}


def _sides_of(text: str) -> frozenset[str]:
    words = set(_SIDE.findall(text))
    return frozenset({LEFT, RIGHT} if "bilateral" in words else words)
