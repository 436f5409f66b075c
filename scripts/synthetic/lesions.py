"""Focal lung findings, drawn around a centre in either view; each adds to ``scene.density`` inside ``mask``.

The classes that real films tell apart poorly are given a look of their own, so that a reader can tell them:
patchy opacity = smooth haze, consolidation = dense with straight edges and air bronchograms, pneumonia = fluffy clumps.
"""

import numpy as np

from scripts.synthetic.findings import Finding
from scripts.synthetic.scene import Scene

RADIUS = {"small": 0.048, "moderate": 0.080, "large": 0.118}
_NODULE_RADIUS = {
    ("nodule", "small"): 0.022,
    ("nodule", "moderate"): 0.034,
    ("mass", "moderate"): 0.050,
    ("mass", "large"): 0.075,
}


def _jitter(rng: np.random.Generator, centre, spread: float) -> np.ndarray:
    return np.asarray(centre) + spread * np.clip(rng.standard_normal(2), -1.5, 1.5)


def draw_haze(scene: Scene, finding: Finding, centre, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Patchy lung opacity: a soft haze through which vessels still show."""
    radius = RADIUS[finding.size]
    centre = _jitter(rng, centre, 0.012)
    haze = scene.canvas.blob(centre, (radius, 0.85 * radius), angle=rng.uniform(-0.6, 0.6))
    haze = np.maximum(haze, scene.canvas.blob(_jitter(rng, centre, 0.6 * radius), (0.7 * radius, 0.6 * radius)))
    scene.density += 0.40 * haze * (1 + 0.12 * scene.canvas.clouds(rng, 14)) * mask


def draw_clumps(scene: Scene, finding: Finding, centre, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Pneumonia: confluent fluffy clumps with ill-defined edges."""
    radius = RADIUS[finding.size]
    centre = _jitter(rng, centre, 0.012)
    extent = scene.canvas.blob(centre, (0.95 * radius, 0.8 * radius), angle=rng.uniform(-0.4, 0.4))
    fluff = np.clip(0.75 + 0.55 * scene.canvas.clouds(rng, 27), 0.1, 1.5)
    scene.density += 0.46 * np.minimum(extent * fluff * 1.1, 1) * mask


def draw_block(scene: Scene, finding: Finding, centre, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Consolidation: a homogeneous block with straight (fissural) borders and dark air bronchograms."""
    radius, canvas = RADIUS[finding.size], scene.canvas
    cx, cy = _jitter(rng, centre, 0.008)
    fissure = cy - 0.9 * radius + rng.uniform(0.1, 0.35) * np.sign(cx or 1) * (canvas.x - cx)
    below = (canvas.y - fissure) * (-1 if finding.zone == "upper" else 1)
    if finding.zone == "upper":
        below = below + 1.8 * radius  # the upper lobe ends on its fissure below
    inside = np.clip(below / 0.006 + 0.5, 0, 1) * np.clip((2.0 * radius - below) / (0.5 * radius) + 0.5, 0, 1)
    block = inside * np.clip((1.55 * radius - np.abs(canvas.x - cx)) / 0.025 + 0.5, 0, 1) * mask
    bronchi = []
    for _ in range(4):
        start = np.array([cx - 0.8 * np.sign(cx or 1) * radius, cy + rng.uniform(-0.3, 0.3) * radius])
        end = np.array([cx + rng.uniform(0.3, 1.1) * np.sign(cx or 1) * radius, cy + rng.uniform(-0.8, 0.8) * radius])
        middle = 0.5 * (start + end) + (0, 0.1 * radius)
        bronchi.append((np.array([start, middle, end]), np.array([0.011, 0.009, 0.006]), 1.0))
    scene.density += block * (0.42 - 0.16 * scene.canvas.strokes(bronchi, blur=0.002))


def draw_nodule(scene: Scene, finding: Finding, centre, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Lung lesion: a sharply outlined round nodule, or a lobulated mass."""
    radius = _NODULE_RADIUS.get((finding.kind, finding.size), 0.05)
    centre = _jitter(rng, centre, 0.02)
    edge = 0.18 if finding.kind == "nodule" else 0.12
    shape = scene.canvas.disc(centre, (radius, 0.93 * radius), angle=rng.uniform(0, 3), edge=edge)
    if finding.kind == "mass":
        for turn in rng.uniform(0, 2 * np.pi, 3):
            lobe = centre + 0.5 * radius * np.array([np.cos(turn), np.sin(turn)])
            shape = np.maximum(shape, scene.canvas.disc(lobe, (0.62 * radius, 0.62 * radius), edge=0.2))
    scene.density += 0.47 * shape * mask


def draw_granuloma(scene: Scene, finding: Finding, centre, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Calcified granuloma: small and as dense as metal almost."""
    spot = scene.canvas.disc(_jitter(rng, centre, 0.02), (0.0125, 0.0115), edge=0.3)
    scene.density += 0.75 * spot * mask


def draw_bands(scene: Scene, finding: Finding, centre, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Atelectasis: one plate (small), several (moderate), or plates over a collapsed wedge (large)."""
    out = np.sign(centre[0]) or 1
    cx, cy = _jitter(rng, centre, 0.008) + (0, 0.015 if finding.zone == "lower" else 0.0)
    bands = []
    for index in range({"small": 1, "moderate": 3, "large": 3}[finding.size]):
        tilt = rng.uniform(-0.12, 0.22)
        half = rng.uniform(0.085, 0.105) * (1 - 0.1 * index)
        x, y = cx - 0.015 * index * out, cy - 0.034 * index
        points = np.array([(x - half, y - tilt * half * out), (x, y + 0.004), (x + half, y + tilt * half * out)])
        bands.append((points, np.array([0.008, 0.016, 0.010]), 1.0))
    scene.density += 0.34 * scene.canvas.strokes(bands, blur=0.0025) * mask
    if finding.size == "large":
        wedge = [
            (cx - 0.10 * out, cy - 0.055),
            (cx + 0.12 * out, cy + 0.01),
            (cx + 0.13 * out, cy + 0.16),
            (cx - 0.15 * out, cy + 0.16),
        ]
        scene.density += 0.30 * scene.canvas.fill(wedge, blur=0.008) * mask


def draw_scar(scene: Scene, finding: Finding, centre, mask: np.ndarray, rng: np.random.Generator) -> None:
    """Scarring: thin crooked strands that meet in a point."""
    centre = _jitter(rng, centre, 0.012)
    strands = []
    for turn in rng.uniform(0, 2 * np.pi) + np.array([0.0, 0.7, 2.6, 3.5, 4.4]) + rng.normal(0, 0.2, 5):
        middle = centre + 0.035 * np.array([np.cos(turn), np.sin(turn)]) + rng.normal(0, 0.006, 2)
        end = centre + rng.uniform(0.055, 0.085) * np.array([np.cos(turn + 0.25), np.sin(turn + 0.25)])
        strands.append((np.array([centre, middle, end]), np.array([0.009, 0.006, 0.004]), 1.0))
    scene.density += 0.34 * scene.canvas.strokes(strands, blur=0.0012) * mask


def draw_net(scene: Scene, severity: str, area: np.ndarray, rng: np.random.Generator) -> None:
    """Interstitial opacity: a net of fine lines over ``area`` (mask), reaching higher with ``severity``."""
    top = {"mild": 0.42, "moderate": 0.26, "severe": 0.10}[severity]
    amount = {"mild": 0.24, "moderate": 0.30, "severe": 0.36}[severity]
    # Lines = where smooth noise crosses zero.
    net = sum(np.clip(1 - np.abs(scene.canvas.clouds(rng, cells)) / 0.28, 0, 1) for cells in (26, 38)) / 1.6
    reach = np.clip((scene.canvas.y - top) / 0.12, 0, 1)
    scene.density += amount * (net - 0.12) * reach * area


FOCAL = {
    ("Lung Opacity", "patchy"): draw_haze,
    ("Pneumonia", ""): draw_clumps,
    ("Consolidation", ""): draw_block,
    ("Lung Lesion", "nodule"): draw_nodule,
    ("Lung Lesion", "mass"): draw_nodule,
    ("Atelectasis", ""): draw_bands,
    ("Other", "granuloma"): draw_granuloma,
    ("Other", "scarring"): draw_scar,
}
