"""draw_mechanism.py and the files of numbers that it draws."""

import sys

import pytest
from matplotlib.figure import Figure

from modules.runtime.errors import InputError
from scripts.research import draw_mechanism, probe_gradients
from scripts.research.probe_numbers import check_numbers, keep_numbers, read_numbers

VARIANCE = {"image": 0.5, "report": 0.3, "both": 0.2}


def read_row(run: str, epoch: int, split: str = "test", **found):
    return {
        "checkpoint": f"out/{run}/seed1/epoch_{epoch}.pth",
        "epoch": epoch,
        "split": split,
        "variance": VARIANCE,
        **found,
    }


def pulled(run: str, epoch: int, part: str, share: float, cosine: float = -0.1, term: str = "L_CP"):
    checkpoint = f"out/{run}/seed1/epoch_{epoch}.pth"
    return {
        "checkpoint": checkpoint,
        "epoch": epoch,
        "term": term,
        "part": part,
        "share": share,
        "ratio": 1.0,
        "cosine": cosine,
    }


@pytest.fixture
def files(tmp_path):
    readings = {"retrieval": 0.9, "retrieval_mean": 0.4, "text_only": 0.3}
    leakage, gradients = tmp_path / "leakage.json", tmp_path / "gradients.json"
    rows = [read_row("ithn", 2, **readings), read_row("ithn", 1, **readings), read_row("plain", 2)]
    keep_numbers(leakage, "probe_image_leakage", [*rows, read_row("ithn", 2, "train", **readings)])
    parts = [(part, 0.25) for part in draw_mechanism.PARTS]
    keep_numbers(gradients, "probe_gradients", [pulled("ithn", epoch, *own) for epoch in (1, 2) for own in parts])
    return leakage, gradients, tmp_path / "figures" / "mechanism.png"


def test_numbers_of_a_checkpoint_are_replaced_and_others_stay(tmp_path):
    path = tmp_path / "numbers.json"
    keep_numbers(path, "probe_gradients", [pulled("a", 1, "decoder", 0.5), pulled("a", 1, "encoder", 0.5)])
    keep_numbers(path, "probe_gradients", [pulled("b", 1, "decoder", 1.0)])
    keep_numbers(path, "probe_gradients", [pulled("a", 1, "decoder", 0.7)])
    assert [(row["checkpoint"][4], row["share"]) for row in read_numbers(path, "probe_gradients")] == [
        ("b", 1.0),
        ("a", 0.7),
    ]
    check_numbers(path, "probe_gradients")


def test_files_of_others_are_neither_read_nor_replaced(tmp_path):
    path = tmp_path / "numbers.json"
    for content in (
        "[]",
        "{",
        '{"probe": "probe_gradients", "rows": [{"checkpoint": "a"}]}',
        '{"probe": "other", "rows": []}',
    ):
        path.write_text(content)
        with pytest.raises(InputError, match="not a file that probe_gradients.py --numbers wrote"):
            read_numbers(path, "probe_gradients")
    with pytest.raises(InputError, match="already exists and is not numbers of probe_gradients"):
        check_numbers(path, "probe_gradients")
    with pytest.raises(InputError, match="No such file"):
        read_numbers(tmp_path / "nowhere.json", "probe_gradients")


def test_the_figure_has_every_row_epoch_and_part(files, monkeypatch):
    leakage, gradients, out = files
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    monkeypatch.setattr(sys, "argv", ["draw_mechanism.py", str(leakage), str(gradients), "--out", str(out)])
    draw_mechanism.main()
    assert tuple(draw_mechanism.PARTS) == probe_gradients.PARTS
    readings, variance, shares, cosines = drawn[0].axes
    assert [label.get_text() for label in readings.get_yticklabels()] == ["ithn", "plain"]
    points = [len(collection.get_offsets()) for collection in readings.collections]
    assert points == [2, 0] * 3  # both epochs of ithn on the test split; plain has no joint embedding
    assert [bar.get_width() for bar in variance.patches] == pytest.approx([0.5, 0.5, 0.2, 0.2, 0.3, 0.3])
    assert [bar.get_width() for bar in shares.patches] == pytest.approx([0.25] * 5)
    assert sum(len(collection.get_offsets()) for collection in cosines.collections) == 8


def test_rows_are_chosen_and_a_wrong_one_is_named(files, monkeypatch):
    leakage, gradients, out = files
    argv = ["draw_mechanism.py", str(leakage), str(gradients), "--out", str(out), "--rows"]
    monkeypatch.setattr(sys, "argv", [*argv, "plain"])
    draw_mechanism.main()
    draw_mechanism.main()  # its own file may be drawn again
    assert out.read_bytes()[1:4] == b"PNG"
    monkeypatch.setattr(sys, "argv", [*argv, "prior"])
    with pytest.raises(InputError, match="--rows prior: the files have ithn, plain"):
        draw_mechanism.main()
