"""The frontal view without disease: additive attenuation (0 = air, about 1 = abdomen), as on an inverted film."""

import numpy as np

from scripts.synthetic.anatomy import Anatomy
from scripts.synthetic.canvas import Canvas, smooth_curve
from scripts.synthetic.scene import Scene, grow_vessels

RIB_TOPS = (0.085, 0.135, 0.19, 0.25, 0.312, 0.376, 0.442, 0.51, 0.58, 0.65)  # y where posterior ribs leave the spine


def draw_frontal(patient: Anatomy, rng: np.random.Generator, size: int, markings: float = 1.0) -> Scene:
    """Draw the normal frontal view; ``markings`` scales the vessels (congestion makes them plump)."""
    canvas = patient.canvas(size, "frontal")
    lungs = {side: canvas.fill(patient.lung(side), blur=0.003) for side in (-1, 1)}
    both = np.maximum(lungs[-1], lungs[1])
    chest = np.clip((max(patient.dome.values()) + 0.06 - canvas.y) / 0.08, 0, 1)
    body, density = _soft_tissue(canvas, patient)
    density -= both * (0.50 + 0.05 * canvas.clouds(rng, 4) * 0.4)
    heart = _heart_and_mediastinum(canvas, patient)
    density += heart * (0.25 + 0.75 * both)  # little more shows where it lies before the abdomen
    density += _abdomen(canvas, patient, both, rng) * body
    density += _skeleton(canvas, patient) * body * (0.35 + 0.65 * chest)
    vessels = _vessels(canvas, patient, rng, markings) * both * (1 - 2 * np.minimum(heart, 0.4))
    density += vessels
    density -= _airways(canvas, patient)
    open_lung = {side: lung * (1 - 1.7 * np.minimum(heart, 0.5)) for side, lung in lungs.items()}
    return Scene(canvas, patient, density.astype(np.float32), open_lung, vessels)


def _soft_tissue(canvas: Canvas, patient: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    wall = 0.045 + 0.03 * patient.fat
    w = patient.half_width + wall
    half = [(0.10, -0.25), (0.105, 0.02), (0.17, 0.055), (0.33, 0.075), (0.46, 0.13), (0.60, 0.22), (0.62, 0.42)]
    half += [(0.52, 0.40), (w + 0.015, 0.36), (w + 0.005, 0.55), (w + 0.01, 0.8), (w + 0.02, 1.3)]
    outline = smooth_curve(half)
    polygon = np.concatenate([outline, outline[::-1] * (-1, 1)])
    body = canvas.fill(polygon, blur=0.004)
    thick = canvas.fill(polygon, blur=0.05)  # thins out towards the skin
    density = body * (0.38 + 0.27 * thick)
    shoulder = [
        smooth_curve([(0.2, 0.12), (0.36, 0.10), (0.48, 0.17), (0.47, 0.30), (0.38, 0.25), (0.27, 0.17)], closed=True)
        * (side, 1)
        for side in (-1, 1)
    ]
    density += 0.13 * canvas.fill(*shoulder, blur=0.025) * body
    if patient.breast:
        for side in (-1, 1):
            lower = canvas.disc((side * 0.225, 0.60), (0.165, 0.15), edge=0.12)
            density += patient.breast * lower * np.clip((canvas.y - 0.50) * 6, 0, 1) * body
    return body, density


def _heart_and_mediastinum(canvas: Canvas, patient: Anatomy) -> np.ndarray:
    right, left = patient.heart_borders
    base = max(patient.dome.values()) + 0.05
    bottom = patient.dome[1] + 0.02
    m, knob, bulge = patient.mediastinum, patient.knob, patient.unfolded
    outline = [
        (-0.6 * m - 0.01, 0.12),
        (-m - 0.35 * bulge, 0.24),
        (-m, 0.36),
        (right * 0.90 - 0.005, 0.47),
        (right, 0.58),
        (right * 0.85, bottom),
        (0.0, base),
        (left * 0.7, bottom + 0.015),
        (left, bottom - 0.045),
        (left * 0.90, 0.58),
        (left * 0.62 + 0.01, 0.48),
        (m + 0.022, 0.41),
        (m + 0.012, 0.345),
        (m + 0.002, 0.33),
        (m + 0.3 * bulge, 0.22),
        (0.6 * m + 0.01, 0.12),
    ]
    heart = canvas.fill(smooth_curve(outline), blur=0.0035)
    core = canvas.fill(smooth_curve(outline), blur=0.035)
    density = heart * (0.28 + 0.14 * core)
    arch = canvas.disc((m + 0.2 * bulge, 0.285), (knob + 0.3 * bulge, knob * 1.1 + 0.1 * bulge), edge=0.14)
    density = np.maximum(density, 0.34 * arch)
    y = np.linspace(0.29, 0.75, 12)
    swing = 0.022 + knob * 0.5 + bulge * np.sin(np.pi * np.clip((y - 0.27) / 0.42, 0, 1)) * 1.1
    descending = canvas.strokes([(np.stack([m - 0.035 + swing, y], axis=1), 0.055, 1.0)], blur=0.004)
    density += (0.07 if not bulge else 0.16) * descending
    for side, height in ((-1, 0.425), (1, 0.405)):
        density += 0.15 * canvas.blob((side * (m + 0.032), height), (0.022, 0.038), angle=-0.4 * side)
    return density


def _abdomen(canvas: Canvas, patient: Anatomy, lungs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    left, right = patient.dome_curve(1), patient.dome_curve(-1)
    w = patient.half_width
    edge = [(w + 0.25, left[0, 1] + 0.05), (w + 0.25, 1.3), (-w - 0.25, 1.3), (-w - 0.25, right[0, 1] + 0.05)]
    polygon = np.concatenate([right, left[::-1], edge])
    # The wide blur lets flank and chest wall merge; the lungs' own edge keeps the dome crisp.
    density = 0.27 * canvas.fill(polygon, blur=0.03) * (1 - lungs)
    bubble = (rng.uniform(0.10, 0.17), patient.dome[1] + rng.uniform(0.055, 0.075))
    density -= rng.uniform(0.12, 0.3) * canvas.disc(bubble, (0.06, 0.028), angle=0.15, edge=0.5)
    return density


def rib(patient: Anatomy, side: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Posterior and anterior part (M, 2) of rib ``index`` (0 = first)."""
    top = RIB_TOPS[index] + patient.rib_phase
    slope = patient.rib_slope * (0.4 + 0.08 * index)
    middle = float(patient.spine_x(top))
    wall_y = top + 0.085 + 0.4 * slope
    wall = float(patient.wall_x(wall_y)) + 0.008
    back = [
        (0.03, top),
        (0.30 * wall, top - 0.016),
        (0.60 * wall, top + 0.005 + 0.15 * slope),
        (0.88 * wall, top + 0.035 + 0.30 * slope),
        (wall, wall_y),
    ]
    inner = 0.34 + 0.035 * index
    front = [
        (wall, wall_y),
        (0.965 * wall, wall_y + 0.055),
        (0.80 * wall, wall_y + 0.115),
        (0.5 * (0.80 + inner) * wall, wall_y + 0.155),
        (inner * wall, wall_y + 0.175),
    ]
    curves = []
    for part in (back, front):
        curve = smooth_curve(part) * (side, 1)
        curve[:, 0] += middle * np.clip(1 - np.abs(curve[:, 0]) / wall, 0, 1)  # scoliosis bends the spine, not the wall
        curves.append(curve)
    return curves[0], curves[1]


def _skeleton(canvas: Canvas, patient: Anatomy) -> np.ndarray:
    backs, fronts = [], []
    for side in (-1, 1):
        for index in range(len(RIB_TOPS)):
            back, front = rib(patient, side, index)
            backs += [(back, 0.024, 1.0), (back, 0.016, 0.72)]
            if index < 7:
                fronts += [(front, 0.026, 1.0), (front, 0.018, 0.75)]
    density = 0.115 * canvas.strokes(backs, blur=0.0012) + 0.055 * canvas.strokes(fronts, blur=0.0022)
    clavicles = []
    for side in (-1, 1):
        curve = clavicle(patient, side)
        clavicles += [(curve, 0.030, 1.0), (curve, 0.018, 0.7)]
    density += 0.17 * canvas.strokes(clavicles, blur=0.0015)
    blade = smooth_curve([(0.43, 0.12), (0.40, 0.2), (0.385, 0.33), (0.42, 0.30), (0.455, 0.2)])
    scapulae = [(blade * (side, 1), 0.016, 1) for side in (-1, 1)]
    humeri = [(np.array([(0.485, 0.145), (0.53, 0.42)]) * (side, 1), 0.065, 1) for side in (-1, 1)]
    density += 0.07 * canvas.strokes(scapulae, blur=0.003) + 0.16 * canvas.strokes(humeri, blur=0.005)
    return density + _spine(canvas, patient)


def clavicle(patient: Anatomy, side: int) -> np.ndarray:
    """Centre line (M, 2) of a clavicle."""
    w = patient.half_width
    line = [(0.035, 0.175), (0.30 * w, 0.150), (0.65 * w, 0.122), (0.90 * w, 0.102), (1.12 * w, 0.108)]
    return smooth_curve(line) * (side, 1)


def _spine(canvas: Canvas, patient: Anatomy) -> np.ndarray:
    bodies, details = [], []
    tops = np.linspace(-0.04, 0.96, 18)
    for top, bottom in zip(tops[:-1], tops[1:], strict=True):
        height = bottom - top
        width = 0.030 + 0.010 * max(top, 0)
        x = float(patient.spine_x((top + bottom) / 2))
        high, low = top + 0.12 * height, bottom - 0.12 * height
        bodies.append([(x - width, high), (x + width, high), (x + 0.9 * width, low), (x - 0.9 * width, low)])
        for side in (-1, 1):
            pedicle = x + side * 0.62 * width
            details.append(([(pedicle, top + 0.35 * height), (pedicle, top + 0.6 * height)], 0.011, 1.0))
        details.append(([(x, top + 0.55 * height), (x, bottom)], 0.008, 1.0))
    return 0.085 * canvas.fill(*bodies, blur=0.003) + 0.05 * canvas.strokes(details, blur=0.002)


def _airways(canvas: Canvas, patient: Anatomy) -> np.ndarray:
    shift = patient.heart_shift * 0.5
    trachea = np.array([(shift * 0.2, -0.1), (shift * 0.4, 0.1), (shift - 0.004, 0.33)])
    right = smooth_curve([(shift - 0.004, 0.325), (-0.035, 0.375), (-0.06, 0.43)])
    left = smooth_curve([(shift - 0.004, 0.325), (0.04, 0.38), (0.085, 0.415)])
    return 0.17 * canvas.strokes([(trachea, 0.040, 1.0), (right, 0.026, 0.8), (left, 0.022, 0.8)], blur=0.0035)


def _vessels(canvas: Canvas, patient: Anatomy, rng: np.random.Generator, markings: float) -> np.ndarray:
    sides = np.repeat((-1, 1), 9)
    angles = np.tile(np.linspace(-1.25, 1.35, 9), 2) + rng.normal(0, 0.09, 18)
    lengths = np.where(angles > 0.5, 0.30, 0.25) * rng.uniform(0.8, 1.15, 18)
    starts = np.stack([sides * (patient.mediastinum + 0.02), np.full(18, 0.42)], axis=1)
    strokes = grow_vessels(rng, starts, angles, lengths, sides, 0.0095 * markings)
    return 0.19 * canvas.strokes(strokes, blur=0.0016) * min(markings, 1.5)
