"""Broken input for benchmarks/fault_campaign.py: random batches for the objective, random damage for the readers."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.fault_runs import Bench
from benchmarks.fault_trials import Trial

PRECISIONS = ("float32", "bfloat16", "float16")
WIDTH, WORDS, LENGTH = 24, 40, 12


def random_batches(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """Steps on batches of random sizes and scales, in three precisions, as the trainer makes them.

    Survived: every weight is finite afterwards, and the loss too, but in float16, which may overflow and is skipped.
    """
    import torch

    for trial in range(number):
        torch.manual_seed(rng.randrange(2**31))
        if trial % 50 == 0:
            objective = _objective(rng)
            kept = {name: value.clone() for name, value in objective.state_dict().items()}
        batch, sound = _batch(rng), []
        for precision in PRECISIONS:
            loss = _step(objective, batch, rng.randrange(1, 200), precision)
            sound.append(
                (precision == "float16" or bool(loss.isfinite()))
                and all(bool(value.isfinite().all()) for value in objective.state_dict().values())
            )
            objective.load_state_dict(kept)
        yield Trial(all(sound))


def _step(objective, batch, epoch: int, precision: str):
    """One optimiser step; returns the loss."""
    import torch

    from modules.runtime.environment import autocast

    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16 if precision == "float16" else 1.0)
    with autocast(torch.device("cpu"), precision):
        loss = objective(batch, epoch)["loss"]
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    objective.after_step()
    return loss.detach()


def _objective(rng: random.Random):
    """R2GenCMN on stored features, with a strategy and options drawn at random."""
    import torch

    from models.r2gencmn import R2GenCMN, Settings
    from modules.data.detection_features import DetectionExtractor
    from modules.ithn.objective import Objective
    from modules.ithn.settings import ITHNSettings
    from modules.ithn.synthesis import STRATEGIES

    settings = Settings(d_model=16, d_ff=16, num_heads=2, num_layers=1, cmm_size=16, cmm_dim=16, topk=4)
    backbone = R2GenCMN(visual_extractor=DetectionExtractor(4, WIDTH), num_ids=WORDS, settings=settings)
    strategy = rng.choice(tuple(STRATEGIES))
    variant = rng.choice(("paper", "released"))
    clamped = (strategy, variant) == ("ithn", "paper") and rng.random() < 0.5
    settings = ITHNSettings(
        strategy=strategy,
        ithn_variant=variant,
        alpha=rng.choice((0.001, 0.1, 1.0)),
        embedding_dim=8,
        contrastive_form=rng.choice(("standard", "decoupled")),
        clamp_segment=clamped,
        mask_identical=rng.random() < 0.5,
    )
    objective = Objective(backbone, settings)
    # Weights as far from their start as a wild training leaves them.
    with torch.no_grad():
        for parameter in objective.backbone.parameters():
            parameter.mul_(10 ** rng.uniform(-1, 0.5))
    return objective


def _batch(rng: random.Random):
    import torch

    from modules.data.batches import Batch

    rows = rng.randint(1, 8)
    positive, negative = _pair(rng, rows), _pair(rng, rows)
    return Batch(
        positive=positive,
        negative=negative,
        has_negative=torch.rand(rows) < rng.random(),
        sample_index=torch.arange(rows),
        report_key=torch.randint(0, 3, (rows,)),
        ids=[str(row) for row in range(rows)],
        reports=[""] * rows,
    )


def _pair(rng: random.Random, rows: int):
    import torch

    from modules.data.batches import Pair

    lengths = torch.randint(2, LENGTH + 1, (rows,))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.randint(1, WORDS, mask.shape) * mask
    tokens[:, 0] = 0
    tokens[torch.arange(rows), lengths - 1] = 0
    views = torch.rand(rows, 2) < 0.7
    views[:, 0] = True
    features = torch.randn(rows, 2, 4, WIDTH) * 10 ** rng.uniform(-6, 2)
    return Pair(images=features * views[..., None, None], view_mask=views, tokens=tokens, token_mask=mask)


def annotations(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """Random damage to annotation.json, in its bytes or in its values: read, or refused with one line."""
    from modules.data.annotations import read_annotation

    content = (bench.folder / "data" / "annotation.json").read_text()
    path = bench.folder / "fuzzed.json"
    for _ in range(number):
        if rng.random() < 0.5:
            path.write_bytes(_scrambled(content.encode(), rng))
        else:
            path.write_text(json.dumps(_distorted(json.loads(content), rng)))
        yield Trial(_refused_or_read(read_annotation, path))


def checkpoints(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """Random damage to a checkpoint that has no checksum beside it: read, or refused with one line."""
    from modules.training.checkpoint import load_checkpoint
    from modules.training.checkpoint_folder import CURRENT

    content = (bench.folder / "reference" / CURRENT).read_bytes()
    path = bench.folder / "fuzzed.pth"
    for _ in range(number):
        path.write_bytes(_scrambled(content, rng))
        yield Trial(_refused_or_read(load_checkpoint, path))


def _refused_or_read(read, path: Path) -> bool:
    from modules.runtime.errors import InputError

    try:
        read(path)
    except InputError as error:
        return "\n" not in str(error) and str(path) in str(error)
    except Exception:  # what must not happen, whatever it is
        return False
    return True


def _scrambled(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, removed, repeated or put in at a few places."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) or 1), rng.randint(1, 64)
        noise = rng.randbytes(length)
        changed[place : place + rng.choice((0, length))] = rng.choice((noise, b"", bytes(changed[:length])))
    return bytes(changed)


WRONG = (None, True, -1, 1.5, 10**30, "", "\0", "../../x", [], {}, [None], ["", 3], {"a": []}, "é\ud800", "x" * 10_000)


def _distorted(value, rng: random.Random):
    """One value somewhere in the tree replaced by one that has no business there."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        return {k: _distorted(v, rng) if k == key else v for k, v in value.items() if k != key or rng.random() < 0.95}
    if isinstance(value, list) and value and rng.random() < 0.95:
        place = rng.randrange(len(value))
        return [_distorted(v, rng) if i == place else v for i, v in enumerate(value)]
    return rng.choice(WRONG)


def dicoms(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """DICOM files with bytes changed, cut or doubled, as they are uploaded: an image, or one line."""
    import io

    from modules.data.images import decode_image

    contents = [_dicom(bits) for bits in (8, 16)]
    for _ in range(number):
        content = _scrambled(rng.choice(contents), rng)
        yield _one_line(lambda content=content: decode_image(io.BytesIO(content), "upload.dcm"))


def deep_images(bench: Bench, rng: random.Random, number: int) -> Iterator[Trial]:
    """TIFF files of floats, some of which are no number or infinite: refused with one line."""
    import io

    import numpy as np
    from PIL import Image

    from modules.data.images import decode_image

    for _ in range(number):
        values = np.random.default_rng(rng.randrange(2**32)).random((40, 30), dtype=np.float32)
        values[rng.randrange(40), rng.randrange(30)] = rng.choice((np.nan, np.inf, -np.inf))
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF")
        buffer.seek(0)
        yield _one_line(lambda buffer=buffer: decode_image(buffer, "a.tif"), refused=True)


def _one_line(read: Callable[[], object], refused: bool = False) -> Trial:
    from modules.runtime.errors import InputError

    try:
        read()
    except InputError as error:
        return Trial("\n" not in str(error), why="" if "\n" not in str(error) else str(error))
    except Exception as error:
        return Trial(False, why=f"{type(error).__name__}: {error}"[:300])
    return Trial(not refused, why="it was read" if refused else "")


def _dicom(bits: int) -> bytes:
    """A small radiograph of made-up values."""
    import io

    import numpy as np
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    data, values = Dataset(), np.arange(1200, dtype=f"u{bits // 8}").reshape(40, 30)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 40, 30, 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = bits
    data.HighBit, data.PixelRepresentation, data.WindowCenter, data.WindowWidth = bits - 1, 0, 100, 200
    data.PixelData = values.tobytes()
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
