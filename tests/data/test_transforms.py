"""Resizing, crops and normalisation, against torchvision's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from modules.data.images import load_image, open_image
from modules.data.transforms import eval_transform, train_transform
from modules.runtime.errors import InputError
from tests.transform_support import LOOK


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def normalised(image):
    return reference.normalize(reference.to_tensor(image.convert("RGB")), *LOOK)


IMAGES = [(40, 40), (37, 61), (90, 33), (16, 20)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", IMAGES)
def test_eval_transform_equals_torchvision(size, mode):
    image = Image.fromarray(noise(*size, 3)).convert(mode)
    expected = normalised(reference.resize(image.convert("RGB"), [24, 24], antialias=True))
    assert torch.equal(eval_transform(24, *LOOK)(image), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", IMAGES)
def test_train_transform_is_one_of_torchvisions_crops(size, mode):
    image = Image.fromarray(noise(*size, 3)).convert(mode)
    resized = reference.resize(image.convert("RGB"), 32, antialias=True)
    width, height = resized.size
    assert min(width, height) == 32
    crops = normalised(resized).unfold(1, 24, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4)  # (rows, columns, 3, 24, 24)
    transform = train_transform(24, *LOOK, resize=32, flip=True)
    mirrored = 0
    for seed in range(6):
        result = transform(image, torch.Generator().manual_seed(seed))
        straight = (crops == result).flatten(2).all(2)
        turned = (crops == result.flip(2)).flatten(2).all(2)
        assert straight.sum() + turned.sum() == 1
        mirrored += int(turned.sum())
    assert 0 < mirrored < 6


def test_every_crop_and_both_orientations_come_up_equally_often():
    position = np.add.outer(np.arange(4) * 4, np.arange(4)).astype(np.uint8)  # pixel value = row * 4 + column
    transform = train_transform(2, (0, 0, 0), (1, 1, 1), resize=4)
    rng = torch.Generator().manual_seed(0)
    counts = {}
    for _ in range(1800):
        corner = transform(Image.fromarray(position), rng)[0, 0].mul(255).round().int().tolist()
        counts[tuple(corner)] = counts.get(tuple(corner), 0) + 1
    # 9 places times 2 orientations, 100 each on average, sd 10.
    assert len(counts) == 18 and min(counts.values()) > 60 and max(counts.values()) < 140


def test_flip_can_be_turned_off_without_moving_the_crop():
    image = Image.fromarray(noise(40, 40))
    for seed in range(8):
        on = train_transform(24, *LOOK, resize=32, flip=True)(image, torch.Generator().manual_seed(seed))
        off = train_transform(24, *LOOK, resize=32, flip=False)(image, torch.Generator().manual_seed(seed))
        assert torch.equal(on, off) or torch.equal(on.flip(2), off)


@pytest.mark.parametrize("transform", [train_transform(24, *LOOK, resize=32), eval_transform(24, *LOOK)])
def test_greyscale_route_equals_the_rgb_route(tmp_path, transform):
    buffer = io.BytesIO()
    Image.fromarray(noise(50, 70)).save(buffer, "JPEG")
    path = tmp_path / "x.jpg"
    path.write_bytes(buffer.getvalue())
    grey = transform(open_image(path), torch.Generator().manual_seed(3))
    assert open_image(path).mode == "L" and grey.shape == (3, 24, 24) and grey.dtype == torch.float32
    assert torch.equal(grey, transform(load_image(path), torch.Generator().manual_seed(3)))


def test_mean_and_std_of_the_extractor():
    white = Image.new("L", (8, 8), 255)
    assert torch.equal(eval_transform(4, (0.5,) * 3, (0.5,) * 3)(white), torch.ones(3, 4, 4))


def test_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(InputError, match="image size 320 is larger than the resized image, 256"):
        train_transform(320, *LOOK, resize=256)


def test_absent_views_are_zero():
    pixels = torch.full((2, 3, 3, 4, 4), 255, dtype=torch.uint8)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    transform = eval_transform(4, *LOOK)
    normalised_views = transform.normalise(pixels, mask)
    assert torch.equal(normalised_views[mask], transform.normalise(pixels)[mask]) and not normalised_views[~mask].any()
