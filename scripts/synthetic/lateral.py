"""The lateral view without disease, the front of the chest on the left; same conventions as frontal."""

import numpy as np

from scripts.synthetic.anatomy import Anatomy
from scripts.synthetic.canvas import Canvas, smooth_curve
from scripts.synthetic.scene import Scene, grow_vessels


def draw_lateral(patient: Anatomy, rng: np.random.Generator, size: int, markings: float = 1.0) -> Scene:
    """Draw the normal lateral view; ``markings`` scales the vessels."""
    canvas = patient.canvas(size, "lateral")
    lungs = {side: canvas.fill(patient.lateral_lung(side), blur=0.003) for side in (-1, 1)}
    both = np.maximum(lungs[-1], lungs[1])
    body, density = _soft_tissue(canvas, patient)
    density -= (0.215 + 0.015 * canvas.clouds(rng, 4)) * (lungs[-1] + lungs[1])
    heart = _heart_and_aorta(canvas, patient)
    density += heart * (0.2 + 0.8 * both)
    density += _abdomen(canvas, patient, lungs, rng) * body
    density += _skeleton(canvas, patient) * body
    vessels = _vessels(canvas, patient, rng, markings) * both * (1 - 1.5 * np.minimum(heart, 0.4))
    density += vessels
    trachea = smooth_curve([(-0.045, -0.1), (-0.015, 0.12), (0.02, 0.27), (0.035, 0.37)])
    density -= 0.17 * canvas.strokes([(trachea, 0.036, 1.0)], blur=0.004)
    open_lung = {side: lung * (1 - 1.7 * np.minimum(heart, 0.5)) for side, lung in lungs.items()}
    return Scene(canvas, patient, density.astype(np.float32), open_lung, vessels)


def spine_line(patient: Anatomy, samples: int = 12) -> np.ndarray:
    """Middle of the vertebral bodies (M, 2) from top to bottom."""
    d = patient.half_width / 0.375
    points = [
        (0.05, -0.15),
        (0.09, 0.05),
        (0.165 * d, 0.22),
        (0.222 * d, 0.40),
        (0.232 * d, 0.56),
        (0.20 * d, 0.74),
        (0.16 * d, 1.1),
    ]
    return smooth_curve(points, samples=samples)


def _soft_tissue(canvas: Canvas, patient: Anatomy) -> tuple[np.ndarray, np.ndarray]:
    d, fat = patient.half_width / 0.375, 0.03 + 0.03 * patient.fat
    chest = 0.4 * patient.breast
    front = [
        (-0.10, -0.25),
        (-0.10, 0.03),
        (-0.13, 0.12),
        (-0.19 * d - fat, 0.23),
        (-0.275 * d - fat, 0.36),
        (-0.325 * d - fat - chest, 0.52),
        (-0.32 * d - fat - 0.4 * chest, 0.66),
        (-0.31 * d - 1.2 * fat, 0.8),
        (-0.31 * d - 1.6 * fat, 1.3),
    ]
    back = [
        (0.29 * d + fat, 1.3),
        (0.30 * d + fat, 0.85),
        (0.335 * d + fat, 0.62),
        (0.335 * d + fat, 0.42),
        (0.275 * d + fat, 0.24),
        (0.17 * d + fat, 0.1),
        (0.135, 0.03),
        (0.13, -0.25),
    ]
    polygon = np.concatenate([smooth_curve(front), smooth_curve(back)])
    body = canvas.fill(polygon, blur=0.004)
    density = body * (0.40 + 0.26 * canvas.fill(polygon, blur=0.05))
    arms = canvas.blob((-0.02, 0.03), (0.15, 0.075)) + 0.5 * canvas.blob((0.05, 0.16), (0.09, 0.06))
    return body, density + 0.22 * arms * body


def _heart_and_aorta(canvas: Canvas, patient: Anatomy) -> np.ndarray:
    grow = patient.heart_ratio / 0.435
    reach = 0.27 * (grow - 1)  # how far the heart grows backwards
    floor = patient.dome[1] + 0.02
    outline = [
        (-0.26, floor - 0.01),
        (-0.265, 0.60),
        (-0.215, 0.50 - 0.2 * reach),
        (-0.13, 0.435 - 0.35 * reach),
        (-0.04 + 0.3 * reach, 0.44 - 0.4 * reach),
        (0.02 + 0.8 * reach, 0.52 - 0.2 * reach),
        (0.035 + reach, 0.61),
        (0.0 + 0.8 * reach, floor),
        (-0.13, floor + 0.02),
    ]
    heart = canvas.fill(smooth_curve(outline, closed=True), blur=0.006)
    core = canvas.fill(smooth_curve(outline, closed=True), blur=0.04)
    density = heart * (0.19 + 0.15 * core)
    wide, bulge = 0.055 + 0.55 * (patient.mediastinum - 0.055) + 0.4 * (patient.knob - 0.036), patient.unfolded
    arch = smooth_curve(
        [
            (-0.10, 0.46),
            (-0.105 - 0.4 * bulge, 0.38),
            (-0.06, 0.295 - 0.3 * bulge),
            (0.03, 0.265 - 0.3 * bulge),
            (0.105 + 0.3 * bulge, 0.31),
            (0.145 + 0.6 * bulge, 0.42),
            (0.15 + 0.8 * bulge, 0.56),
            (0.14, 0.72),
        ]
    )
    density = np.maximum(density, (0.13 + bulge) * canvas.strokes([(arch, wide, 1.0)], blur=0.006))
    front = canvas.strokes([(smooth_curve([(-0.07, 0.14), (-0.10, 0.25), (-0.12, 0.42)]), 1.6 * wide, 1.0)], blur=0.02)
    density += (0.06 + 2.0 * (patient.mediastinum - 0.055)) * front
    return density + 0.15 * canvas.blob((0.025, 0.43), (0.034, 0.04)) + 0.08 * canvas.blob((0.0, 0.38), (0.03, 0.02))


def _abdomen(canvas: Canvas, patient: Anatomy, lungs: dict, rng: np.random.Generator) -> np.ndarray:
    density = np.zeros_like(canvas.x)
    for side in (-1, 1):
        outline = patient.lateral_lung(side)
        floor = outline[73:134]
        edge = [(-0.6, floor[-1, 1] + 0.02), (-0.6, 1.4), (0.6, 1.4), (0.6, floor[0, 1] + 0.02)]
        density += 0.12 * canvas.fill(np.concatenate([floor, edge]), blur=0.03) * (1 - lungs[side])
    bubble = (rng.uniform(-0.10, 0.0), patient.dome[1] + 0.045)
    return density - rng.uniform(0.1, 0.22) * canvas.disc(bubble, (0.065, 0.026), edge=0.5)


def lateral_rib(patient: Anatomy, index: int) -> np.ndarray:
    """Centre line (M, 2) of rib ``index``, from the spine downwards to the front."""
    d = patient.half_width / 0.375
    top = 0.10 + 0.072 * index + patient.rib_phase
    reach = 0.17 + 0.022 * index
    return smooth_curve(
        [
            (0.27 * d, top),
            (0.315 * d, top + 0.055),
            (0.22 * d, top + 0.15),
            (0.03 * d, top + 0.25),
            (-min(reach, 0.29) * d, top + 0.32),
        ]
    )


def _skeleton(canvas: Canvas, patient: Anatomy) -> np.ndarray:
    ribs = []
    for index in range(9):
        for offset in (0.0, 0.022):
            curve = lateral_rib(patient, index) + (0.0, offset)
            width = np.linspace(0.021, 0.016, len(curve))
            ribs += [(curve, width, 1.0), (curve, 0.66 * width, 0.7)]
    chest = np.clip((max(patient.dome.values()) + 0.10 - canvas.y) / 0.1, 0.3, 1)
    density = 0.065 * canvas.strokes(ribs, blur=0.0018) * chest
    d = patient.half_width / 0.375
    sternum = smooth_curve([(-0.13 * d, 0.20), (-0.185 * d, 0.27), (-0.265 * d, 0.40), (-0.315 * d, 0.55)])
    density += 0.13 * canvas.strokes([(sternum, 0.022, 1.0), (sternum, 0.013, 0.7)], blur=0.002)
    return density + _spine(canvas, patient)


def _spine(canvas: Canvas, patient: Anatomy) -> np.ndarray:
    line = spine_line(patient, samples=4)[1:-1]
    bodies, arches = [], []
    for top, bottom in zip(line[:-1], line[1:], strict=True):
        along = bottom - top
        across = np.array([-along[1], along[0]]) / np.hypot(*along)
        half = 0.026 + 0.012 * max(top[1], 0)
        a, b = top + 0.1 * along, bottom - 0.1 * along
        bodies.append(np.array([a + half * across, a - half * across, b - half * across, b + half * across]))
        arch = np.array([a - (half + 0.014) * across, b + 0.3 * along - (half + 0.04) * across])
        arches.append((arch, 0.014, 1.0))
    return 0.095 * canvas.fill(*bodies, blur=0.003) + 0.05 * canvas.strokes(arches, blur=0.004)


def _vessels(canvas: Canvas, patient: Anatomy, rng: np.random.Generator, markings: float) -> np.ndarray:
    angles = np.array([-1.2, -0.7, -0.1, 0.5, 1.0, 1.35, -1.3, -0.8, -0.3, 0.3, 0.8]) + rng.normal(0, 0.1, 11)
    sides = np.repeat((1, -1), (6, 5))
    starts = np.array([0.02, 0.42]) + rng.normal(0, 0.022, (11, 2))
    strokes = grow_vessels(rng, starts, angles, 0.24 * rng.uniform(0.75, 1.1, 11), sides, 0.010 * markings)
    return 0.15 * canvas.strokes(strokes, blur=0.002) * min(markings, 1.5)
