"""Geometry of the synthesised negatives, in three precisions of the input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from modules.ithn.losses import normalise
from modules.ithn.synthesis import (
    EPS,
    NEEDING_NEGATIVES,
    STRATEGIES,
    ithn,
    mochi,
    prior,
    project,
    released,
    unconstrained,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PER_SAMPLE = {name: STRATEGIES[name].synthesise for name in NEEDING_NEGATIVES}
FUNCTIONS = PER_SAMPLE | {"released": released}  # which mixes the batch, as the code it copies does
hardness = st.floats(0, 1, width=32)


@st.composite
def triples(draw):
    """Image, report and negative features (B, D) of unit length, or zero; some negatives equal their report."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    elements = st.floats(-1, 1, width=32, allow_subnormal=False)
    image, report, negative = (torch.from_numpy(draw(hnp.arrays("float32", shape, elements=elements))) for _ in "zun")
    same = torch.tensor(draw(st.lists(st.booleans(), min_size=shape[0], max_size=shape[0])))
    negative = torch.where(same.unsqueeze(1), report, negative)
    dtype = draw(st.sampled_from(DTYPES))
    return [normalise(x).to(dtype) for x in (image, report, negative)]


def in_float64(features):
    return [x.double() for x in features]


def squared(x):
    return (x * x).sum(-1)


@given(triples(), st.booleans())
def test_p_is_the_foot_of_the_perpendicular_on_the_line(features, clamp_segment):
    p = project(*features, clamp_segment=clamp_segment)
    assert p.dtype == torch.float32
    image, report, negative = in_float64(features)
    line, step = report - negative, p.double() - negative
    length = squared(line)
    has_line = length > EPS * 1.001
    assert not step[length < EPS * 0.999].any()
    along = (step * line).sum(-1) / length.clamp(min=EPS)  # 0 at the negative, 1 at the report
    assert ((step - along.unsqueeze(1) * line)[has_line].abs() < 1e-5).all(), "p is on the line"
    if clamp_segment:
        assert (along[has_line] > -1e-3).all() and (along[has_line] < 1 + 1e-3).all()
        # Nearest point of the segment: no end of it is nearer to the image.
        assert (squared(image - p) <= torch.minimum(squared(image - report), squared(image - negative)) + 1e-5).all()
    else:
        assert (((image - p) * line).sum(-1)[has_line].abs() < 1e-5).all(), "z - p is orthogonal to the line"


@given(triples(), hardness, st.booleans())
def test_the_hinge_loss_never_falls(features, hardness, clamp_segment):
    image, _, negative = in_float64(features)
    for harder in (ithn(*features, hardness, clamp_segment=clamp_segment), unconstrained(*features, hardness)):
        # |z-u|^2 - |z-u~|^2 + m grows when u~ comes nearer to z.
        assert (squared(image - harder) <= squared(image - negative) + 1e-5).all()


@given(triples(), hardness)
def test_eq_5_equals_eq_7(features, hardness):
    image, report, negative = in_float64(features)
    harder = negative.clone().requires_grad_()
    triplet = (squared(image - report) - squared(image - harder) + 10).clamp(min=0)  # Eq. 4, hinge active
    (gradient,) = torch.autograd.grad(triplet.sum(), harder)
    torch.testing.assert_close(gradient, 2 * (image - negative))
    for row in range(len(image)):
        line = report[row] - negative[row]
        if line @ line < EPS * 1.001:
            continue
        projector = torch.outer(line, line) / (line @ line)
        expected = negative[row] + hardness / 2 * projector @ gradient[row]  # Eq. 5, projected ascent
        torch.testing.assert_close(ithn(*features, hardness)[row].double(), expected, rtol=0, atol=1e-5)
    free_step = negative + hardness / 2 * gradient
    torch.testing.assert_close(unconstrained(*features, hardness).double(), free_step, rtol=0, atol=1e-6)


@given(triples(), hardness)
def test_mixing_by_hand(features, hardness):
    _, report, negative = in_float64(features)
    expected = (1 - hardness) * negative + hardness * report
    torch.testing.assert_close(mochi(*features, hardness).double(), expected, rtol=0, atol=1e-6)
    assert (prior(*features, hardness) == negative).all()


@pytest.mark.parametrize("name", FUNCTIONS)
@given(features=triples(), hardness=hardness, seed=st.integers(0, 99))
def test_permuting_the_batch_permutes_the_result(name, features, hardness, seed):
    order = torch.randperm(len(features[0]), generator=torch.Generator().manual_seed(seed))
    harder = FUNCTIONS[name](*features, hardness)
    permuted = FUNCTIONS[name](*(x[order] for x in features), hardness)
    torch.testing.assert_close(permuted, harder[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(features=triples(), hardness=hardness)
def test_hardness_zero_changes_nothing(name, features, hardness):
    torch.testing.assert_close(FUNCTIONS[name](*features, 0.0), features[2].float())


@pytest.mark.parametrize("name", FUNCTIONS)
@given(features=triples(), hardness=hardness)
def test_zero_lines_and_zero_features_are_finite(name, features, hardness):
    features = [x.clone().requires_grad_() for x in features]
    features[2].data[0] = features[1].data[0]  # a line of no length
    features[0].data[-1] = 0
    harder = FUNCTIONS[name](*features, hardness)
    normalise(harder).square().sum().backward()
    assert harder.isfinite().all()
    assert all(x.grad.isfinite().all() for x in features if x.grad is not None)


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@settings(max_examples=10)
@given(features=triples(), hardness=hardness)
def test_a_poisoned_row_stays_alone(name, poison, which, features, hardness):
    def run(features):
        features = [x.clone().requires_grad_() for x in features]
        harder = FUNCTIONS[name](*features, hardness)
        harder.square().sum().backward()
        return [harder.detach(), *(x.grad for x in features)]

    features = [torch.cat([x, x[:1]]) for x in features]
    clean = run(features)
    features[which][-1] = poison
    for before, after in zip(clean, run(features), strict=True):
        assert (before is None) == (after is None)
        if before is not None:
            torch.testing.assert_close(after[:-1], before[:-1], rtol=0, atol=0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(name):
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: FUNCTIONS[name](*x, 0.3), features)


def test_a_report_on_its_own_is_enough():
    features = [torch.randn(1, 8) for _ in range(3)]
    for strategy in FUNCTIONS.values():
        assert strategy(*features, 0.5).shape == (1, 8)
