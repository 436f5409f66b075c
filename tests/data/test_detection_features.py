"""Detection features in HDF5: what is read, by several processes too; how they are masked; one line where they fail."""

import pickle

import h5py
import numpy as np
import pytest
import torch

from models import backbone_class, settings_class
from modules.data.annotations import read_annotation
from modules.data.datasets import ReportDataset, build_loader
from modules.data.detection_features import DetectionExtractor, DetectionFeatures, detections_of
from modules.data.tokenizers import Tokenizer
from modules.decoding.options import DecodingOptions
from modules.runtime.errors import InputError
from tests.coco_support import coco_records, make_coco, make_detections

torch.set_num_threads(1)
IMAGE = "val2014/000000000103.jpg"  # 103 has 1 + 103 % 4 = 4 detections


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = make_coco(tmp_path_factory.mktemp("coco"))
    make_detections(folder / "detections.hdf5")
    return folder


def reader(coco, most=50):
    return detections_of(str(coco / "detections.hdf5"), read_annotation(coco / "annotation.json").splits, most)


def stored(coco, image):
    with h5py.File(coco / "detections.hdf5") as file:
        return torch.from_numpy(file[f"{image}_features"][:])


@pytest.mark.parametrize(("most", "rows"), [(50, 4), (4, 4), (2, 2)])
def test_rows_come_in_the_files_order_and_zeros_fill_up(coco, most, rows):
    found = reader(coco, most)(IMAGE)
    assert found.shape == (most, 6) and found.dtype == torch.float32
    assert torch.equal(found[:rows], stored(coco, 103)[:rows]) and not found[rows:].any()


def test_half_precision_and_chunks_are_read(tmp_path):
    values = np.random.default_rng(0).random((3, 4))
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        file.create_dataset("7_features", data=values.astype("float16"), chunks=(1, 4), compression="gzip")
    found = DetectionFeatures(str(tmp_path / "d.hdf5"), {"a": "7"}, 3)("a")
    assert torch.equal(found, torch.from_numpy(values.astype("float16").astype("float32")))


def test_worker_processes_read_what_one_process_reads(coco):
    studies = read_annotation(coco / "annotation.json").splits["train"]
    detections = reader(coco)
    dataset = ReportDataset(
        studies, Tokenizer.from_reports(["a red square"], 1, "coco"), detections, detections, max_seq_length=8
    )
    alone = [dataset[index].positive.images for index in range(len(dataset))]  # leaves a handle open before the fork
    loader = build_loader(dataset, 3, False, num_workers=3)
    for _ in range(2):
        found = torch.cat([batch.positive.images for batch in loader])
        assert torch.equal(found, torch.stack(alone)) and found.shape == (10, 1, 50, 6)
    assert detections._handle is None  # closed when the workers were forked
    assert torch.equal(dataset[3].positive.images, alone[3])


def test_a_reader_travels_without_its_handle(coco):
    detections = reader(coco)
    detections(IMAGE)
    again = pickle.loads(pickle.dumps(detections))
    assert again._handle is None and torch.equal(again(IMAGE), detections(IMAGE))


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file.create_dataset(f"{name[1:]}_features", data=value)


@pytest.mark.parametrize(
    ("datasets", "part"),
    [
        ({}, "has no '101_features'; every record of the annotation needs a matrix"),
        ({"_101": np.ones(4)}, "'101_features' has the shape (4,), expected (n, width) with at least one row"),
        ({"_101": np.ones((0, 4))}, "has the shape (0, 4)"),
        ({"_101": np.ones((2, 4)), "_103": np.ones((2, 5))}, "'103_features' has 5 columns, but the first image has 4"),
        ({"_101": np.ones((2, 4))}, "has no '103_features'"),
    ],
)
def test_what_does_not_fit_is_named(coco, tmp_path, datasets, part):
    write(tmp_path / "d.hdf5", **datasets)
    ids = {"val2014/000000000101.jpg": "101", IMAGE: "103"}
    with pytest.raises(InputError) as error:
        DetectionFeatures(str(tmp_path / "d.hdf5"), ids, 50)(IMAGE)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"", b"no HDF5 at all", "cut"])
def test_a_damaged_file_is_named(coco, tmp_path, content):
    whole = (coco / "detections.hdf5").read_bytes()
    if content is not None:
        (tmp_path / "d.hdf5").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(InputError, match="d.hdf5: cannot be read") as error:
        DetectionFeatures(str(tmp_path / "d.hdf5"), {IMAGE: "103"}, 50)
    assert "\n" not in str(error.value)


def test_an_image_of_no_record_is_named(coco):
    with pytest.raises(InputError, match="no record of the annotation has 'other.jpg' as its first image"):
        reader(coco).locate("other.jpg")


def test_absent_detections_are_masked_and_not_averaged():
    extractor = DetectionExtractor(3, 2)
    patches, mask, pooled = extractor(torch.tensor([[[[1.0, 0.0], [3.0, 4.0], [0.0, 0.0]]], [[[0.0, 0.0]] * 3]]))
    assert mask.tolist() == [[True, True, False], [True, False, False]]
    assert pooled.tolist() == [[2.0, 2.0], [0.0, 0.0]] and patches.shape == (2, 3, 2)


SIZES = {"d_model": 16, "d_ff": 16, "num_heads": 2, "num_layers": 1}
BACKBONES = {
    "r2gencmn": {"topk": 4, "cmm_size": 16, "cmm_dim": 16},
    "r2gen": {"rm_num_heads": 2, "rm_d_model": 16},
    "xpronet": {"num_cluster": 14, "num_protype": 2, "d_img_ebd": 8, "d_txt_ebd": 8, "topk": 4},
    "visualgpt": {"gpt2_layers": 2, "gpt2_positions": 16},
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_blind_to_the_rows_that_fill_up(name):
    """The same detections with more rows of zeros below them give the same log-probabilities and the same caption."""
    kind, settings = backbone_class(name), settings_class(name)(**SIZES | BACKBONES[name])
    more = {"no_finding": 13} if name == "xpronet" else {}
    detections = torch.rand(2, 1, 3, 6, generator=torch.Generator().manual_seed(1)) + 0.1
    detections[1, 0, 2] = 0
    outputs, answers = [], []
    for rows in (3, 7):
        torch.manual_seed(0)
        extractor = DetectionExtractor(rows, 6)
        model = kind(visual_extractor=extractor, num_ids=11, settings=settings, **more).eval()
        padded = torch.cat([detections, torch.zeros(2, 1, rows - 3, 6)], dim=2)
        labels = torch.zeros(2, 14).index_fill_(1, torch.tensor([3]), 1.0)
        tokens = torch.tensor([[0, 4, 2, 9], [0, 3, 3, 1]])
        output = model(padded, tokens, labels=labels)
        outputs.append((output.log_probs, output.image_features))
        answers.append(model.generate(padded, decoding=DecodingOptions(beam_size=2, max_seq_length=6)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(*answers) and model.image_dim == 6


def test_records_name_their_features(coco):
    records = coco_records()
    detections = reader(coco)
    assert detections.ids[IMAGE] == "103" and len(detections.ids) == sum(map(len, records.values()))
    assert detections.locate(IMAGE) == "/103_features" and detections.shape == (50, 6)
