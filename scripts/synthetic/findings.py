"""The structured findings: which exist, what attributes they have, and how the demo samples them."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from modules.labels.rules import CLASSES

OTHER = "Other"  # incidental findings outside the 14 classes
ATTRIBUTES = ("kind", "side", "zone", "size", "severity")

# Values with the weights of sampling; weight 0: may be asked for, is never sampled.
_SIDE = {"left": 4, "right": 5, "bilateral": 0}
_SIDES = {"left": 4, "right": 4, "bilateral": 3}
_ZONE = {"upper": 3, "mid": 3, "lower": 5}
_SIZE = {"small": 4, "moderate": 4, "large": 3}
_SEVERITY = {"mild": 5, "moderate": 3, "severe": 3}

# finding -> kind -> (weight of the kind, {attribute: {value: weight}}); "" is the kind of a finding that has only one.
RULES: dict[str, dict[str, tuple[float, dict[str, dict[str, float]]]]] = {
    "Enlarged Cardiomediastinum": {"": (1, {"severity": _SEVERITY})},
    "Cardiomegaly": {"": (1, {"severity": _SEVERITY})},
    "Lung Opacity": {
        "patchy": (4, {"side": _SIDE, "zone": _ZONE, "size": {"small": 2, "moderate": 5, "large": 3}}),
        "interstitial": (2, {"side": {"bilateral": 4, "left": 1, "right": 1}, "severity": _SEVERITY}),
    },
    "Lung Lesion": {
        "nodule": (4, {"side": _SIDE, "zone": _ZONE, "size": {"small": 4, "moderate": 3}}),
        "mass": (2, {"side": _SIDE, "zone": _ZONE, "size": {"moderate": 1, "large": 2}}),
    },
    "Edema": {"": (1, {"severity": _SEVERITY})},
    "Consolidation": {"": (1, {"side": _SIDE, "zone": _ZONE, "size": {"small": 0, "moderate": 4, "large": 4}})},
    "Pneumonia": {"": (1, {"side": _SIDE, "zone": _ZONE, "size": {"small": 2, "moderate": 4, "large": 2}})},
    "Atelectasis": {"": (1, {"side": _SIDES, "zone": {"upper": 0, "mid": 1, "lower": 5}, "size": _SIZE})},
    "Pneumothorax": {"": (1, {"side": _SIDE, "size": _SIZE})},
    "Pleural Effusion": {"": (1, {"side": _SIDES, "size": _SIZE})},
    "Pleural Other": {
        "thickening": (3, {"side": _SIDES, "zone": {"upper": 3, "lower": 2}}),
        "plaque": (2, {"side": _SIDES}),
    },
    "Fracture": {"rib": (4, {"side": _SIDE, "zone": _ZONE}), "clavicle": (1, {"side": _SIDE})},
    "Support Devices": {
        "pacemaker": (4, {"side": {"left": 5, "right": 1}}),
        "central line": (4, {"side": {"left": 2, "right": 5}}),
        "port": (3, {"side": {"left": 1, "right": 4}}),
        "sternal wires": (5, {}),
        "endotracheal tube": (2, {}),
        "nasogastric tube": (2, {}),
        "chest tube": (1, {"side": _SIDE}),
    },
    OTHER: {
        "tortuous aorta": (4, {}),
        "aortic calcification": (2, {}),
        "granuloma": (4, {"side": _SIDE, "zone": _ZONE}),
        "scarring": (2, {"side": _SIDE, "zone": {"upper": 2, "mid": 0, "lower": 1}}),
        "hyperinflation": (3, {}),
        "low lung volumes": (3, {}),
        "elevated diaphragm": (2, {"side": {"left": 1, "right": 2}}),
        "degenerative spine": (5, {}),
        "scoliosis": (2, {"side": {"left": 1, "right": 2}}),
        "hiatal hernia": (1, {"size": {"moderate": 1, "large": 1}}),
    },
}

# How often the demo draws each class among the findings of abnormal studies; skewed, but no class is a rarity.
_SAMPLING_WEIGHTS = {
    "Enlarged Cardiomediastinum": 6,
    "Cardiomegaly": 16,
    "Lung Opacity": 12,
    "Lung Lesion": 9,
    "Edema": 6,
    "Consolidation": 7,
    "Pneumonia": 7,
    "Atelectasis": 12,
    "Pneumothorax": 7,
    "Pleural Effusion": 14,
    "Pleural Other": 6,
    "Fracture": 7,
    "Support Devices": 13,
    OTHER: 13,
}
_COUNT_WEIGHTS = {1: 0.5, 2: 0.33, 3: 0.17}
_IN_HEART_FAILURE = {"Cardiomegaly": 0.5, "Pleural Effusion": 0.4}  # how often edema brings these along


@dataclass(frozen=True)
class Finding:
    """One finding; attributes that it does not have are ""."""

    finding: str
    kind: str = ""
    side: str = ""
    zone: str = ""
    size: str = ""
    severity: str = ""

    @property
    def sides(self) -> tuple[int, ...]:
        """-1 for the patient's right (left of a frontal image), 1 for the left."""
        return {"left": (1,), "right": (-1,), "bilateral": (-1, 1), "": ()}[self.side]


def _draw(rng: np.random.Generator, weights: dict):
    values = list(weights)
    share = np.array([weights[value] for value in values], dtype=np.float64)
    return values[rng.choice(len(values), p=share / share.sum())]


def possible_kinds(finding: Finding) -> dict[str, float]:
    """The kinds that fit what ``finding`` says already, with their weights; {} if no kind does."""
    kinds = RULES[finding.finding]
    given = {name: value for name in ATTRIBUTES[1:] if (value := getattr(finding, name))}
    return {
        kind: weight
        for kind, (weight, allowed) in kinds.items()
        if finding.kind in ("", kind) and all(value in allowed.get(name, ()) for name, value in given.items())
    }


def complete(finding: Finding, rng: np.random.Generator) -> Finding:
    """Fill the attributes that ``finding`` may have but leaves empty, at random by the weights of RULES."""
    kind = _draw(rng, possible_kinds(finding))
    _, allowed = RULES[finding.finding][kind]
    drawn = {name: getattr(finding, name) or _draw(rng, values) for name, values in allowed.items()}
    return replace(finding, kind=kind, **drawn)


def sample_findings(rng: np.random.Generator, normal_fraction: float) -> tuple[Finding, ...]:
    """Findings of one random study; () with probability ``normal_fraction``."""
    if rng.random() < normal_fraction:
        return ()
    names = [_draw(rng, _SAMPLING_WEIGHTS) for _ in range(_draw(rng, _COUNT_WEIGHTS))]
    if "Edema" in names:
        names += [name for name, share in _IN_HEART_FAILURE.items() if rng.random() < share]
    findings: list[Finding] = []
    for name in dict.fromkeys(names):
        finding = complete(Finding(name), rng)
        if not any(_overlap(finding, other) for other in findings):
            findings.append(finding)
    return tuple(findings)


_COVERS_LUNG = {
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Lung Opacity",
    "Lung Lesion",
    "Pleural Effusion",
    "Pneumothorax",
    "Edema",
}


def _overlap(first: Finding, second: Finding) -> bool:
    """Whether one of two lung findings could hide the other, so that a report would name what nobody can see."""
    if not {first.finding, second.finding} <= _COVERS_LUNG:
        return False
    names = {first.finding, second.finding}
    if "Edema" in names:
        return names != {"Edema", "Pleural Effusion"}
    same_side = bool(set(first.sides) & set(second.sides))
    zones = {first.zone, second.zone} - {""}
    if "Pleural Effusion" in names:
        return same_side and (zones != {"upper"} or "Pneumothorax" in names)
    return same_side and (len(zones) < 2 or "Pneumothorax" in names)


def class_labels(findings: Iterable[Finding]) -> dict[str, int]:
    """1/0 for the 14 CheXpert classes; "No Finding" = none of the others, devices aside (CheXpert's rule)."""
    present = {finding.finding for finding in findings}
    labels = {name: int(name in present) for name in CLASSES}
    labels["No Finding"] = int(not present - {OTHER, "Support Devices"})
    return labels
