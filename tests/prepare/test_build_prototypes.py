"""Initial prototypes: clusters inside each label's group, the file, and the script that makes it."""

import json
import pickle
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open

from modules.data.prototype_files import load_prototypes, save_prototypes
from modules.labels.rules import CLASSES
from modules.prepare.prototype_clusters import cluster_by_label
from modules.runtime.errors import InputError

SIZES = {"num_protype": 2, "d_img_ebd": 3, "d_txt_ebd": 1}
ROWS = torch.arange(28 * 4, dtype=torch.float32).view(28, 4)


def sorted_rows(rows):
    return rows[np.lexsort(np.round(rows, 1).T)]


def test_each_class_is_clustered_on_its_own():
    rng = np.random.default_rng(0)
    corners = np.array([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0], [10.0, 10.0]])
    features = np.repeat(corners, 25, axis=0) + 0.01 * rng.standard_normal((100, 2))
    labels = np.zeros((100, 2))
    labels[:75, 0], labels[50:, 1] = 1, 1  # the third corner's studies are of both classes
    centres, short = cluster_by_label(features.astype(np.float32), labels, 2, classes=("a", "b"), seed=0)
    assert centres.shape == (2, 2, 2) and not short
    # Class a has three corners and two centres: one holds two neighbouring corners.
    assert any(
        np.allclose(sorted_rows(centres[0]), sorted_rows(np.array(pair)), atol=0.01)
        for pair in ([[0, 5], [10, 0]], [[5, 0], [0, 10]])
    )
    np.testing.assert_allclose(sorted_rows(centres[1]), sorted_rows(corners[2:]), atol=0.01)


def test_classes_with_too_few_members_are_filled_and_named():
    features = np.random.default_rng(1).standard_normal((30, 4)).astype(np.float32)
    features[3] = features[2]
    labels = np.zeros((30, 3))
    labels[:4, 0], labels[:, 1] = 1, 1  # three different members, all 30, none
    centres, short = cluster_by_label(features, labels, 8, classes=("few", "all", "none"), seed=3)
    assert short == {"few": 3, "none": 0}
    np.testing.assert_allclose(sorted_rows(centres[0, :3]), sorted_rows(features[:3]), atol=1e-6)
    # Copies stay near the members that they copy, and no two rows are the same.
    nearest = np.linalg.norm(centres[0, 3:, None] - features[None, :3], axis=-1).min(axis=1)
    assert (nearest > 0).all() and (nearest < 0.5).all()
    assert len(np.unique(centres.reshape(24, 4), axis=0)) == 24
    assert np.isfinite(centres).all()
    again, _ = cluster_by_label(features, labels, 8, classes=("few", "all", "none"), seed=3)
    np.testing.assert_array_equal(centres, again)


def test_large_groups_are_read_in_batches(monkeypatch):
    monkeypatch.setattr("modules.prepare.prototype_clusters.MOST_AT_ONCE", 50)
    features = np.repeat(np.eye(3, dtype=np.float32) * 9, 40, axis=0)
    features += 0.01 * np.random.default_rng(0).standard_normal(features.shape).astype(np.float32)
    centres, _ = cluster_by_label(features, np.ones((120, 1)), 3, classes=("a",), seed=0)
    np.testing.assert_allclose(sorted_rows(centres[0]), sorted_rows(np.eye(3) * 9), atol=0.05)


def test_our_file_is_arranged_by_the_names_of_its_classes(tmp_path):
    path = tmp_path / "prototypes.safetensors"
    save_prototypes(path, ROWS, CLASSES, {"seed": 1})
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert torch.equal(load_prototypes(path, CLASSES, **SIZES), ROWS)
    turned = load_prototypes(path, CLASSES[::-1], **SIZES)
    assert torch.equal(turned[:2], ROWS[-2:]) and torch.equal(turned[-2:], ROWS[:2])


def test_a_published_file_is_taken_as_it_is(tmp_path):
    torch.save(torch.nn.Parameter(ROWS.double()), tmp_path / "init_prototypes.pt")
    found = load_prototypes(tmp_path / "init_prototypes.pt", CLASSES[::-1], **SIZES)
    assert found.dtype == torch.float32 and not found.requires_grad and torch.equal(found, ROWS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (torch.zeros(28, 5), r"holds a Tensor of shape \(28, 5\), but --num_cluster 14 times --num_protype 2 rows"),
        ({"weights": torch.zeros(28, 4)}, "holds a dict"),
        (torch.full((28, 4), torch.nan), "not finite"),
    ],
)
def test_files_that_do_not_fit_say_why(tmp_path, content, reason):
    torch.save(content, tmp_path / "p.pt")
    with pytest.raises(InputError, match=reason):
        load_prototypes(tmp_path / "p.pt", CLASSES, **SIZES)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(print), b"\x10\0\0\0\0\0\0\0{}"])
def test_files_of_anything_else_are_refused(tmp_path, content):
    (tmp_path / "p.pt").write_bytes(content)
    with pytest.raises(InputError, match="damaged, or holds more than"):
        load_prototypes(tmp_path / "p.pt", CLASSES, **SIZES)
    with pytest.raises(InputError, match="scripts/build_prototypes.py makes one"):
        load_prototypes(tmp_path / "absent.pt", CLASSES, **SIZES)


@pytest.fixture
def build(demo, demo_labels, tmp_path, monkeypatch, capsys):
    """``build("--flag", value)`` runs the script on the tiny data set; returns the file and what was printed."""
    from scripts.build_prototypes import main

    def run(*flags):
        path = tmp_path / f"prototypes{len(list(tmp_path.iterdir()))}.safetensors"
        argv = [
            "build_prototypes.py",
            "--ann_path",
            demo / "annotation.json",
            "--image_dir",
            demo / "images",
            "--label_path",
            demo_labels,
            "--out",
            path,
            "--visual_extractor",
            "resnet18",
            "--image_size",
            32,
            "--visual_extractor_pretrained",
            "false",
            "--text_encoder",
            "tfidf",
            "--tfidf_width",
            5,
            "--device",
            "cpu",
            "--num_workers",
            0,
            "--num_protype",
            4,
            *flags,
        ]
        monkeypatch.setattr("sys.argv", [str(part) for part in argv])
        main()
        return path, capsys.readouterr().out

    return run


def test_script(build, demo):
    path, said = build()
    sizes = {"num_protype": 4, "d_img_ebd": 512, "d_txt_ebd": 5}
    rows = load_prototypes(path, CLASSES, **sizes)
    assert "--num_cluster 14 --num_protype 4 --d_img_ebd 512 --d_txt_ebd 5" in said
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["metadata"])
    assert metadata["synthetic"] is True and len(metadata["train_sha256"]) == 64 and "torch" in metadata["packages"]
    annotation = json.loads((demo / "annotation.json").read_text())
    assert sum(metadata["members"].values()) >= len(annotation["train"])
    for name in metadata["too_few"]:
        assert f"{name}: {metadata['too_few'][name]['different_members']} different members for 2 prototypes" in said
    few = [name for name, count in metadata["members"].items() if count < 2]
    assert few and set(few) <= set(metadata["too_few"])
    # Both parts count: their entries are of one size.
    image, text = rows[:, :512], rows[:, 512:]
    assert 0.2 < text.square().mean().sqrt() / image.square().mean().sqrt() < 5
    assert torch.equal(rows, load_prototypes(build()[0], CLASSES, **sizes))
    plain = load_prototypes(build("--mirrored", "false")[0], CLASSES, **sizes)
    assert not torch.equal(rows, plain)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--num_protype", 1], "one cannot be halved"),
        (["--num_protype", 0], "--num_protype 0: must be at least 1"),
        (["--label_path", "absent.csv"], "--label_path absent.csv: cannot be read"),
    ],
)
def test_script_names_mistakes(build, flags, reason):
    with pytest.raises(InputError, match=reason):
        build(*flags)
