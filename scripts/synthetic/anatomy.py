"""The drawn patient: shapes and film settings that both views share, and what the findings change about them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from scripts.synthetic.canvas import Canvas, smooth_curve
from scripts.synthetic.findings import Finding

# Cardiothoracic ratio by severity, "" = normal; the gaps keep the grades apart whatever the habitus.
_HEART_RATIO = {"": 0.435, "mild": 0.56, "moderate": 0.64, "severe": 0.73}
_MEDIASTINUM = {"": 0.055, "mild": 0.095, "moderate": 0.118, "severe": 0.142}  # half-width above the heart


@dataclass(frozen=True)
class Variation:
    """How far films differ in what no report mentions; the demo's values are 1."""

    nuisance: float = 1.0  # multiplies the spread of habitus, positioning, exposure and grain
    faintest: float = 1.0  # findings are drawn at a strength between this and 1


DEMO = Variation()
PHANTOM = Variation(nuisance=2.0, faintest=0.4)


@dataclass
class Anatomy:
    """Numbers in body coordinates (see canvas); lengths are shares of the image width."""

    half_width: float  # of the thorax at its base
    dome: dict[int, float]  # side -> height (y) of the diaphragm dome
    flatness: float  # 0 = domed diaphragm, 1 = flat
    heart_ratio: float
    heart_shift: float
    mediastinum: float
    knob: float  # radius of the aortic knob
    unfolded: float  # how far the aorta bulges beyond the mediastinum
    spine_curve: float
    rib_slope: float
    rib_phase: float
    breast: float
    fat: float  # thickness of the chest wall
    tilt: dict[str, float]
    scale: float
    shift: tuple[float, float]
    gain: float
    contrast: float
    noise: float
    blur: float

    def canvas(self, size: int, view: str) -> Canvas:
        return Canvas(size, tilt=self.tilt[view], scale=self.scale, shift=self.shift)

    @property
    def heart_borders(self) -> tuple[float, float]:
        """x of the right and of the left heart border."""
        width = 2 * self.heart_ratio * self.half_width
        return self.heart_shift - 0.34 * width, self.heart_shift + 0.66 * width

    def spine_x(self, y):
        """x of the spine's middle at height ``y``."""
        return self.spine_curve * np.sin(np.pi * np.clip((np.asarray(y) - 0.1) / 0.75, 0, 1))

    def wall_x(self, y):
        """Distance of the inner chest wall from the midline at height ``y``."""
        heights = (0.08, 0.10, 0.14, 0.20, 0.30, 0.42, 0.56, 0.70, 0.85)
        shares = (0.30, 0.45, 0.62, 0.76, 0.88, 0.95, 0.99, 1.0, 1.0)
        return self.half_width * np.interp(y, heights, shares)

    def lung(self, side: int) -> np.ndarray:
        """Outline (M, 2) of one lung in the frontal view."""
        w, dome = self.half_width, self.dome[side]
        angle = dome + 0.115 * (1 - self.flatness) + 0.05 * self.flatness  # y of the costophrenic angle
        wall = [
            (0.02, 0.19),
            (0.32 * w, 0.107),
            (0.52 * w, 0.115),
            (0.74 * w, 0.19),
            (0.90 * w, 0.32),
            (0.98 * w, 0.52),
            (1.0 * w, angle - 0.10),
            (0.99 * w, angle),
        ]
        rise = (angle - dome) * (1 - 0.6 * self.flatness)
        floor = [
            (0.99 * w, angle),
            (0.86 * w, dome + 0.35 * rise),
            (0.62 * w, dome + 0.02 * rise),
            (0.42 * w, dome),
            (0.22 * w, dome + 0.22 * rise),
            (0.0, 0.5 * (self.dome[1] + self.dome[-1]) + 0.3 * rise),
        ]
        outline = np.concatenate([smooth_curve(wall), smooth_curve(floor), [(0.0, 0.3)]])
        return outline * (side, 1)

    def dome_curve(self, side: int) -> np.ndarray:
        """Points (M, 2) along the diaphragm from the lateral wall to the midline (frontal view)."""
        return self.lung(side)[-62:-1]

    def lateral_lung(self, side: int) -> np.ndarray:
        """Outline (M, 2) of one lung in the lateral view, the front of the chest on the left."""
        d, dome = self.half_width / 0.375, self.dome[side] - 0.015
        angle = dome + 0.135 * (1 - self.flatness) + 0.05 * self.flatness
        rise = (angle - dome) * (1 - 0.5 * self.flatness)
        back = [
            (-0.06 * d, 0.16),
            (0.03 * d, 0.105),
            (0.15 * d, 0.145),
            (0.255 * d, 0.28),
            (0.305 * d, 0.45),
            (0.305 * d, 0.64),
            (0.275 * d, angle),
        ]
        floor = [
            (0.275 * d, angle),
            (0.22 * d, dome + 0.5 * rise),
            (0.10 * d, dome + 0.08 * rise),
            (-0.03 * d, dome),
            (-0.17 * d, dome + 0.06 * rise),
            (-0.285 * d, dome + 0.3 * rise),
        ]
        front = [
            (-0.285 * d, dome + 0.3 * rise),
            (-0.29 * d, 0.55),
            (-0.235 * d, 0.36),
            (-0.15 * d, 0.23),
            (-0.06 * d, 0.16),
        ]
        return np.concatenate([smooth_curve(back), smooth_curve(floor), smooth_curve(front)])

    def zone_centre(self, side: int, zone: str) -> tuple[float, float]:
        """Centre of the upper, mid or lower zone of a lung in the frontal view."""
        y = {"upper": 0.25, "mid": 0.44, "lower": self.dome[side] - 0.085}[zone]
        x = {"upper": 0.55, "mid": 0.60, "lower": 0.68}[zone] * self.half_width
        return side * x, y

    def lateral_zone_centre(self, side: int, zone: str) -> tuple[float, float]:
        """Centre of the upper (apex), mid (front) or lower (back) zone in the lateral view."""
        y = {"upper": 0.25, "mid": 0.44, "lower": self.dome[side] - 0.05}[zone]
        x = {"upper": 0.03, "mid": -0.12, "lower": 0.15}[zone] * self.half_width / 0.375
        return x, y


def sample_anatomy(rng: np.random.Generator, findings: Iterable[Finding], nuisance: float = 1.0) -> Anatomy:
    """A random patient; the number of draws does not depend on ``findings``, so the same key gives the same patient."""

    def around(mean: float, sd: float) -> float:
        return float(mean + nuisance * sd * np.clip(rng.standard_normal(), -2, 2))

    lift = around(0, 0.012)
    patient = Anatomy(
        half_width=around(0.375, 0.012),
        dome={-1: around(0.70, 0.008) + lift, 1: around(0.725, 0.008) + lift},
        flatness=0.0,
        heart_ratio=around(0, 0.014),
        heart_shift=around(0, 0.008),
        mediastinum=around(0, 0.004),
        knob=around(0.036, 0.003),
        unfolded=0.0,
        spine_curve=around(0, 0.004),
        rib_slope=around(0.30, 0.05),
        rib_phase=around(0, 0.010),
        breast=float(rng.random() < 0.4) * rng.uniform(0.04, 0.10),
        fat=float(rng.uniform(0, 1)),
        tilt={"frontal": around(0, 0.025), "lateral": around(0, 0.025)},
        scale=around(1.0, 0.025),
        shift=(around(0, 0.012), around(0, 0.012)),
        gain=around(1.0, 0.06),
        contrast=around(1.0, 0.07),
        noise=nuisance * float(rng.uniform(0.008, 0.02)),
        blur=float(rng.uniform(0.0008, 0.0022)),
    )
    _apply(patient, findings, around)
    return patient


def _apply(patient: Anatomy, findings: Iterable[Finding], around) -> None:
    """Change the shapes as the findings ask."""
    present = {finding.finding: finding for finding in findings if finding.finding != "Other"}
    severity = {name: finding.severity for name, finding in present.items()}
    patient.heart_ratio += _HEART_RATIO[severity.get("Cardiomegaly", "")]
    patient.mediastinum += _MEDIASTINUM[severity.get("Enlarged Cardiomediastinum", "")]
    for finding in findings:
        if finding.kind == "hyperinflation":
            patient.flatness = 0.8
            patient.dome = {side: y + 0.085 for side, y in patient.dome.items()}
            patient.heart_ratio *= 0.93
        elif finding.kind == "low lung volumes":
            patient.dome = {side: y - 0.105 for side, y in patient.dome.items()}
        elif finding.kind == "elevated diaphragm":
            patient.dome[finding.sides[0]] -= 0.115
        elif finding.kind == "tortuous aorta":
            patient.knob *= 1.5
            patient.unfolded = 0.05
        elif finding.kind == "scoliosis":
            patient.spine_curve = 0.06 * finding.sides[0]
        elif finding.finding == "Atelectasis" and finding.size == "large":
            for side in finding.sides:
                patient.dome[side] -= 0.03
        elif finding.finding == "Pleural Effusion" and finding.size == "large" and finding.side != "bilateral":
            patient.heart_shift -= 0.03 * finding.sides[0]
