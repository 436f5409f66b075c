"""Findings of the pleural space and of the whole lung, and broken bones, in both views."""

import numpy as np

from scripts.synthetic.canvas import Canvas
from scripts.synthetic.findings import Finding
from scripts.synthetic.frontal import clavicle, rib
from scripts.synthetic.lateral import lateral_rib
from scripts.synthetic.scene import Scene

_EFFUSION_HEIGHT = {"small": 0.115, "moderate": 0.22, "large": 0.38}
_COLLAPSE = {"small": 0.12, "moderate": 0.26, "large": 0.48}  # how far the lung shrinks towards its hilum
_EDEMA_HAZE = {"mild": 0.13, "moderate": 0.22, "severe": 0.33}
EDEMA_MARKINGS = {"mild": 1.35, "moderate": 1.6, "severe": 1.8}


def draw_effusion(scene: Scene, finding: Finding, side: int, view: str) -> None:
    """Fluid with a meniscus: fills the costophrenic angle, higher at the wall (frontal) and behind (lateral)."""
    patient, canvas = scene.patient, scene.canvas
    height = _EFFUSION_HEIGHT[finding.size]
    if view == "frontal":
        toward_wall = np.clip(side * canvas.x / patient.half_width, 0, 1.05)
        floor = patient.dome[side] + 0.10
        amount = 0.44
    else:
        toward_wall = np.clip((canvas.x + 0.29) / 0.58, 0, 1.05)
        floor = patient.dome[side] + 0.10
        amount = 0.27
    low = {"small": -0.02, "moderate": 0.09, "large": 0.24}[finding.size]
    surface = floor - low - (height - low) * toward_wall**3
    fluid = np.clip((canvas.y - surface) / 0.02 + 0.5, 0, 1) * scene.lungs[side]
    scene.density += fluid * (amount - scene.vessels)


def draw_pneumothorax(scene: Scene, finding: Finding, side: int, view: str) -> None:
    """Air around a shrunken lung: a dark rim without vessels, bounded by a thin bright pleural line."""
    patient, canvas = scene.patient, scene.canvas
    shrink = _COLLAPSE[finding.size]
    if view == "frontal":
        outline, hilum, wall = patient.lung(side), (side * 0.06, 0.60), 85
        amount, line = 0.10, 0.30
    else:
        outline, hilum, wall = patient.lateral_lung(side), (0.02, 0.62), 60
        amount, line = 0.06, 0.22
    inner = hilum + (outline - hilum) * (1 - shrink)
    kept = canvas.fill(inner, blur=0.002)
    rim = scene.lungs[side] * (1 - kept)
    scene.density -= rim * (amount + 0.95 * scene.vessels)
    scene.density += 0.15 * shrink * scene.lungs[side] * kept
    scene.density += line * canvas.strokes([(inner[:wall], 0.0075, 1.0)], blur=0.0012) * scene.lungs[side]


def _peel(canvas: Canvas, outline: np.ndarray, depth: float) -> np.ndarray:
    """Band of the given depth along the inside of a closed outline."""
    return canvas.strokes([(np.concatenate([outline, outline[:1]]), 2 * depth, 1.0)], blur=0.003)


def draw_thickening(scene: Scene, finding: Finding, side: int, view: str) -> None:
    """Pleural thickening: a dense band inside the wall, over the apex (upper) or along the lower wall."""
    patient, canvas = scene.patient, scene.canvas
    outline = patient.lung(side) if view == "frontal" else patient.lateral_lung(side)
    band = _peel(canvas, outline, 0.030 if finding.zone == "upper" else 0.026) * scene.lungs[side]
    if finding.zone == "upper":
        where = np.clip((0.185 - canvas.y) / 0.02 + 0.5, 0, 1)
    else:
        outer = side * canvas.x if view == "frontal" else canvas.x
        where = np.clip((canvas.y - 0.46) / 0.03, 0, 1) * np.clip((outer - 0.2) / 0.02, 0, 1)
    scene.density += (0.40 if view == "frontal" else 0.28) * band * where


def draw_plaques(scene: Scene, finding: Finding, side: int, view: str, rng: np.random.Generator) -> None:
    """Calcified plaques: short, very dense ribbons along the wall and on the dome."""
    patient = scene.patient
    outline = patient.lung(side) if view == "frontal" else patient.lateral_lung(side)
    centre = outline.mean(axis=0)
    inside = centre + (outline - centre) * 0.93
    starts = (48, 62, 92, 106) if view == "frontal" else (40, 56, 88, 100)
    ribbons = []
    for start in starts:
        first = start + int(rng.integers(-2, 3))
        part = inside[first : first + 9]
        ribbons.append((part, 0.017 * np.sin(np.linspace(0.3, np.pi - 0.3, len(part))), 1.0))
    scene.density += (0.55 if view == "frontal" else 0.4) * scene.canvas.strokes(ribbons, blur=0.0015)


def draw_edema(scene: Scene, finding: Finding, view: str, rng: np.random.Generator) -> None:
    """Edema: haze spreading from both hila, and Kerley B lines at the lower wall."""
    canvas, patient = scene.canvas, scene.patient
    haze = _EDEMA_HAZE[finding.severity]
    wide = {"mild": 0.8, "moderate": 0.95, "severe": 1.15}[finding.severity]
    kerley = []
    for side in (-1, 1):
        if view == "frontal":
            cloud = canvas.blob((side * 0.145, 0.44), (0.085 * wide, 0.135 * wide))
            scene.density += haze * cloud * (1 + 0.2 * canvas.clouds(rng, 18)) * scene.lungs[side]
        for index in range(8):
            y = patient.dome[side] - 0.10 + 0.022 * index + rng.uniform(-0.003, 0.003)
            wall = (patient.wall_x(y) - 0.012) * side if view == "frontal" else 0.285
            length = rng.uniform(0.025, 0.055) * (side if view == "frontal" else 1)
            kerley.append((np.array([(wall, y), (wall - length, y + 0.004)]), 0.0055, 1.0))
    both = np.maximum(scene.lungs[-1], scene.lungs[1])
    if view == "lateral":
        scene.density += 1.2 * haze * canvas.blob((0.02, 0.44), (0.13 * wide, 0.12 * wide)) * both
    scene.density += 0.22 * canvas.strokes(kerley, blur=0.001) * both


def draw_fracture(scene: Scene, finding: Finding, side: int, view: str, rng: np.random.Generator) -> None:
    """A broken rib or clavicle: the outer part steps down, a dark gap and some swelling lie between."""
    patient, canvas = scene.patient, scene.canvas
    if finding.kind == "clavicle":
        if view == "lateral":
            return  # lies over the spine there, nothing to see
        curve, at, width, amount = clavicle(patient, side), 20, 0.030, 0.17
    else:
        index = {"upper": 2, "mid": 4, "lower": 6}[finding.zone] + int(rng.integers(0, 2))
        if view == "frontal":
            curve, at, width, amount = rib(patient, side, index)[0], 35, 0.025, 0.15
        else:
            curve, at, width, amount = lateral_rib(patient, min(index - 1, 5)), 24, 0.023, 0.10
    outer = curve[at : at + 12]
    tangent = outer[1] - outer[0]
    normal = np.array([-tangent[1], tangent[0]]) / np.hypot(*tangent)
    normal *= np.sign(normal[1]) or 1
    stepped = outer[2:] + 1.1 * width * normal
    taper = np.array([0.6, *[1.0] * (len(stepped) - 2), 0.6])
    gap = np.array([outer[0] - 0.9 * width * normal, outer[0] + 1.3 * width * normal])
    scene.density -= 0.75 * amount * canvas.strokes([(outer, 0.9 * width, 1.0)])
    scene.density += 1.9 * amount * canvas.strokes([(stepped, 1.1 * width * taper, 1.0)], blur=0.0015)
    scene.density += 1.0 * amount * canvas.strokes([(curve[at - 9 : at], 1.1 * width, 1.0)], blur=0.0015)
    scene.density += 1.4 * amount * canvas.blob(outer[2] + 0.01 * normal, (0.036, 0.036))  # bruised tissue around it
    scene.density -= 1.4 * amount * canvas.strokes([(gap, 0.014, 1.0)], blur=0.001)
