"""What is measured of reading images, and what is recommended."""

import numpy as np
import pytest
from PIL import Image

from modules.data.images import ImageFolder
from modules.data.reading_speed import ReadingSpeed, advice, reading_speed, some_images
from modules.data.transforms import train_transform
from modules.runtime.errors import InputError
from tests.transform_support import LOOK

SPEED = ReadingSpeed(images=12, width=2500, height=3000, decoded=20.0, drafts=40.0, cached=2000.0)


def fill(folder, names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (300, 240), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def test_images_are_spread_over_the_folder(tmp_path):
    fill(tmp_path, [f"{study}/{view}.png" for study in range(6) for view in range(2)])
    (tmp_path / "0" / "report.txt").write_text("no image")
    assert len(some_images(str(tmp_path), 100)) == 12
    few = some_images(str(tmp_path), 3)
    assert len(few) == 3 and len({path.split("/")[0] for path in few}) == 3
    assert some_images(str(tmp_path / "absent"), 3) == []


def test_speeds_are_of_the_files_that_can_be_read(tmp_path):
    fill(tmp_path, ["a.jpg", "b.png"])
    (tmp_path / "c.png").write_bytes(b"no image")
    transform = train_transform(32, *LOOK)
    speed = reading_speed(ImageFolder(tmp_path), ["a.jpg", "b.png", "c.png"], transform)
    assert (speed.images, speed.width, speed.height) == (2, 240, 300)
    assert set(speed.rates()) == {"decoded in full", "--jpeg_draft", "--image_cache"}
    assert min(speed.rates().values()) > 0 and speed.cached > speed.decoded
    # Drafts change nothing where no file is a large JPEG.
    assert reading_speed(ImageFolder(tmp_path), ["b.png"], transform).drafts is None
    with pytest.raises(InputError, match="none of 1 images in .* could be read"):
        reading_speed(ImageFolder(tmp_path), ["c.png"], transform)


@pytest.mark.parametrize(
    ("workers", "needed", "fine", "text"),
    [
        (16, 300.0, True, "the GPU takes 300 a second, 16 processes (--num_workers auto) read 320"),
        (16, 600.0, False, "give --image_cache FOLDER, or --jpeg_draft true, whose pixels differ slightly"),
        (16, 900.0, False, "give --image_cache FOLDER, which decodes each image once"),
        (2, 9000.0, False, "give --image_cache FOLDER and more cores"),
        (2, None, True, "20 decoded in full, 40 --jpeg_draft, 2,000 --image_cache; 2 processes read 40"),
    ],
)
def test_advice(workers, needed, fine, text):
    found = advice(SPEED, workers, needed)
    assert found[0] is fine and text in found[1]
