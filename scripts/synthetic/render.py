"""Structured findings -> the two films of one study."""

import numpy as np

from scripts.synthetic.anatomy import DEMO, Variation, sample_anatomy
from scripts.synthetic.devices import (
    draw_aortic_calcification,
    draw_degenerative_spine,
    draw_device,
    draw_hiatal_hernia,
)
from scripts.synthetic.film import develop
from scripts.synthetic.findings import Finding
from scripts.synthetic.frontal import draw_frontal
from scripts.synthetic.lateral import draw_lateral
from scripts.synthetic.lesions import FOCAL, draw_net
from scripts.synthetic.pleura import (
    EDEMA_MARKINGS,
    draw_edema,
    draw_effusion,
    draw_fracture,
    draw_plaques,
    draw_pneumothorax,
    draw_thickening,
)
from scripts.synthetic.scene import Scene

_VIEWS = {"frontal": draw_frontal, "lateral": draw_lateral}


def render_study(
    findings: tuple[Finding, ...],
    key: tuple[int, ...],
    size: int,
    variation: Variation = DEMO,
    department: int | None = None,
) -> dict[str, np.ndarray]:
    """Draw ``findings`` (completed) as {"frontal", "lateral"}: (size, size) uint8 each, air black.

    ``key`` seeds everything that is left to chance, so that one key with other findings is the same patient. Films of
    a ``department`` have its identification plate.
    """
    marker = "RL"[int(np.random.default_rng([*key, 1]).integers(2))]
    congestion = max(
        [EDEMA_MARKINGS[finding.severity] for finding in findings if finding.finding == "Edema"], default=1.0
    )
    films = {}
    for number, (view, draw) in enumerate(_VIEWS.items()):
        patient = sample_anatomy(np.random.default_rng([*key, 2]), findings, variation.nuisance)
        scene = draw(patient, np.random.default_rng([*key, 3, number]), size, congestion)
        for order, finding in enumerate(findings):
            before = scene.density.copy()
            draw_finding(scene, finding, view, np.random.default_rng([*key, 4, number, order]))
            if variation.faintest < 1:  # the same in both views
                strength = np.random.default_rng([*key, 6, order]).uniform(variation.faintest, 1)
                scene.density = before + np.float32(strength) * (scene.density - before)
        rng = np.random.default_rng([*key, 5, number])
        films[view] = develop(scene, rng, marker if view == "frontal" else "L", department)
    return films


def draw_finding(scene: Scene, finding: Finding, view: str, rng: np.random.Generator) -> None:
    """Add one finding to a drawn scene; findings that only change shapes were drawn with the anatomy."""
    name, patient = (finding.finding, finding.kind), scene.patient
    if name in FOCAL:
        zone_centre = patient.zone_centre if view == "frontal" else patient.lateral_zone_centre
        # From the side, what lies in both lungs is seen through one another.
        share = 0.6 if view == "lateral" and len(finding.sides) == 2 else 1.0
        for side in finding.sides:
            FOCAL[name](scene, finding, zone_centre(side, finding.zone), share * scene.lungs[side], rng)
    elif name == ("Lung Opacity", "interstitial"):
        area = np.max([scene.lungs[side] for side in finding.sides], axis=0)
        draw_net(scene, finding.severity, area, rng)
    elif finding.finding == "Edema":
        draw_edema(scene, finding, view, rng)
    elif finding.finding == "Support Devices":
        draw_device(scene, finding, view)
    elif finding.kind == "aortic calcification":
        draw_aortic_calcification(scene, view)
    elif finding.kind == "degenerative spine":
        draw_degenerative_spine(scene, view)
    elif finding.kind == "hiatal hernia":
        draw_hiatal_hernia(scene, finding, view)
    else:
        _draw_sided(scene, finding, view, rng)


def _draw_sided(scene: Scene, finding: Finding, view: str, rng: np.random.Generator) -> None:
    for side in finding.sides:
        if finding.finding == "Pleural Effusion":
            draw_effusion(scene, finding, side, view)
        elif finding.finding == "Pneumothorax":
            draw_pneumothorax(scene, finding, side, view)
        elif finding.kind == "thickening":
            draw_thickening(scene, finding, side, view)
        elif finding.kind == "plaque":
            draw_plaques(scene, finding, side, view, rng)
        elif finding.finding == "Fracture":
            draw_fracture(scene, finding, side, view, rng)
