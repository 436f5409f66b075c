"""Support devices and the incidental findings outside the 14 classes, in both views; metal is whiter than bone."""

import numpy as np

from scripts.synthetic.canvas import smooth_curve
from scripts.synthetic.findings import Finding
from scripts.synthetic.lateral import spine_line
from scripts.synthetic.scene import Scene

# Paths of tubes and wires: the part that lies on the device's own side (x counted outwards), the part in the middle
# (x as on the film), the width.
_Path = tuple[list[tuple[float, float]], list[tuple[float, float]], float]
_FRONTAL: dict[str, list[_Path]] = {
    "pacemaker": [
        (
            [(0.255, 0.205), (0.16, 0.155)],
            [(-0.03, 0.21), (-0.05, 0.36), (-0.055, 0.53), (0.02, 0.65), (0.13, 0.655)],
            0.0075,
        ),
        ([(0.255, 0.205), (0.15, 0.165)], [(-0.037, 0.225), (-0.058, 0.38), (-0.085, 0.50)], 0.0075),
    ],
    "central line": [([(0.115, -0.05), (0.095, 0.08), (0.055, 0.16)], [(-0.035, 0.24), (-0.045, 0.40)], 0.009)],
    "port": [([(0.25, 0.245), (0.21, 0.14), (0.12, 0.13)], [(-0.03, 0.21), (-0.045, 0.40)], 0.008)],
    "endotracheal tube": [
        ([], [(0.012, -0.1), (0.010, 0.10), (0.008, 0.265)], 0.005),
        ([], [(-0.012, -0.1), (-0.010, 0.10), (-0.012, 0.255)], 0.010),
    ],
    "nasogastric tube": [
        ([], [(0.015, -0.1), (0.018, 0.2), (0.022, 0.45), (0.020, 0.64), (0.06, 0.74), (0.13, 0.83)], 0.010)
    ],
    "chest tube": [([(0.52, 0.66), (0.36, 0.60), (0.26, 0.44), (0.22, 0.25)], [], 0.018)],
    "sternal wires": [
        ([], [(-0.018, y + 0.008), (0.0, y - 0.006), (0.018, y + 0.008), (0.0, y + 0.014), (-0.014, y + 0.004)], 0.006)
        for y in (0.26, 0.325, 0.39, 0.455, 0.52, 0.585)
    ],
}
_LATERAL: dict[str, list[_Path]] = {
    "pacemaker": [
        ([], [(-0.16, 0.225), (-0.08, 0.20), (-0.02, 0.36), (-0.03, 0.54), (-0.13, 0.66), (-0.21, 0.655)], 0.0075),
        ([], [(-0.16, 0.225), (-0.07, 0.21), (-0.01, 0.38), (-0.07, 0.50)], 0.0075),
    ],
    "central line": [([], [(-0.05, -0.05), (-0.04, 0.1), (-0.03, 0.25), (-0.025, 0.40)], 0.008)],
    "port": [([], [(-0.17, 0.26), (-0.10, 0.18), (-0.03, 0.25), (-0.025, 0.40)], 0.008)],
    "endotracheal tube": [([], [(-0.045, -0.1), (-0.015, 0.12), (0.01, 0.265)], 0.010)],
    "nasogastric tube": [
        ([], [(0.0, -0.1), (0.03, 0.2), (0.085, 0.45), (0.09, 0.62), (0.03, 0.74), (-0.06, 0.815)], 0.010)
    ],
    "chest tube": [([], [(0.02, 0.66), (0.07, 0.5), (0.05, 0.28)], 0.018)],
    "sternal wires": [
        ([], [(x - 0.012, y), (x + 0.004, y + 0.005), (x + 0.006, y + 0.015)], 0.010)
        for x, y in zip(np.linspace(-0.15, -0.315, 6), np.linspace(0.23, 0.55, 6), strict=True)
    ],
}
_GENERATOR = np.array([(-1, -0.6), (-0.6, -1), (0.6, -1), (1, -0.6), (1, 0.6), (0.6, 1), (-0.6, 1), (-1, 0.6)])


def draw_device(scene: Scene, finding: Finding, view: str) -> None:
    """Draw one support device."""
    canvas, frontal = scene.canvas, view == "frontal"
    for side in finding.sides or (1,):
        wires = [
            (smooth_curve([*((side * x, y) for x, y in own), *middle]), width, 1.0)
            for own, middle, width in (_FRONTAL if frontal else _LATERAL)[finding.kind]
        ]
        scene.density += 0.55 * canvas.strokes(wires)
        if finding.kind == "chest tube":  # hollow
            scene.density -= 0.30 * canvas.strokes([(points, 0.4 * width, 1.0) for points, width, _ in wires])
        if finding.kind == "pacemaker":
            centre, half = ((side * 0.275, 0.215), (0.048, 0.052)) if frontal else ((-0.185, 0.215), (0.012, 0.045))
            scene.density += 0.75 * canvas.fill(centre + _GENERATOR * half)
        if finding.kind == "port":
            if frontal:  # a ring face on, a plate from the side
                scene.density += 0.80 * canvas.disc((side * 0.25, 0.255), (0.026, 0.026), edge=0.1)
                scene.density -= 0.35 * canvas.disc((side * 0.25, 0.255), (0.014, 0.014), edge=0.2)
            else:
                scene.density += 0.80 * canvas.disc((-0.185, 0.265), (0.010, 0.024), edge=0.1)


def draw_aortic_calcification(scene: Scene, view: str) -> None:
    """A bright shell along the outer edge of the aortic arch."""
    patient = scene.patient
    if view == "frontal":
        turns = np.linspace(-1.4, 1.5, 16)
        radius = patient.knob + 0.3 * patient.unfolded
        x = patient.mediastinum + 0.2 * patient.unfolded + 0.93 * radius * np.cos(turns)
        y = 0.285 + 1.03 * radius * np.sin(turns)
    else:
        turns = np.linspace(np.pi + 0.4, 2 * np.pi - 0.1, 16)
        x, y = 0.02 + 0.105 * np.cos(turns), 0.36 + (0.115 + 0.3 * patient.unfolded) * np.sin(turns)
    scene.density += 0.5 * scene.canvas.strokes([(np.stack([x, y], axis=1), 0.009, 1.0)], blur=0.001)


def draw_degenerative_spine(scene: Scene, view: str) -> None:
    """Osteophytes: dense beaks beside the discs, and dense end plates."""
    patient, strokes = scene.patient, []
    if view == "frontal":
        for y in np.linspace(-0.04, 0.96, 18)[5:15]:
            x = float(patient.spine_x(y))
            for side in (-1, 1):
                strokes.append(
                    (np.array([(x + side * 0.025, y), (x + side * 0.062, y - 0.004)]), np.array([0.017, 0.006]), 1.0)
                )
            strokes.append((np.array([(x - 0.035, y), (x + 0.035, y)]), 0.009, 0.8))
    else:
        line = spine_line(patient, samples=4)[5:20]
        for above, here in zip(line[:-1], line[1:], strict=True):
            along = here - above
            across = np.array([-along[1], along[0]]) / np.hypot(*along)
            half = 0.030 + 0.012 * here[1]
            strokes.append(
                (np.array([here + 0.7 * half * across, here + 1.75 * half * across]), np.array([0.019, 0.006]), 1.0)
            )
            strokes.append((np.array([here - half * across, here + half * across]), 0.009, 0.85))
    scene.density += 0.22 * scene.canvas.strokes(strokes, blur=0.002)


def draw_hiatal_hernia(scene: Scene, finding: Finding, view: str) -> None:
    """A rounded shadow behind the heart with air over a fluid level."""
    canvas = scene.canvas
    radius = {"moderate": 0.055, "large": 0.085}[finding.size]
    centre = (
        (0.045, scene.patient.dome[1] - 0.5 * radius) if view == "frontal" else (0.10, scene.patient.dome[1] - 0.03)
    )
    sac = canvas.disc(centre, (1.15 * radius, radius), edge=0.08)
    air = canvas.disc(centre, (0.95 * radius, 0.82 * radius), edge=0.1)
    air = air * np.clip((centre[1] - 0.1 * radius - canvas.y) / 0.004 + 0.5, 0, 1)
    scene.density += (0.22 if view == "frontal" else 0.28) * sac - 0.40 * air
