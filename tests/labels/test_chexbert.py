"""The CheXbert adapter on a tiny random model in the layout of the public checkpoint."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.labels.chexbert import CONDITIONS, Chexbert
from modules.labels.labeler import CLASSES
from modules.runtime.errors import InputError

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "heart",
    "is",
    "normal",
    "lungs",
    "clear",
    ".",
    "no",
    "effusion",
    "##s",
    "edema",
    "mild",
]
REPORTS = ["the heart is normal .", "", "mild edema . no effusions .", "Mild\n edema", "the lungs are clear . " * 9]
HIDDEN = 8


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder with the configuration and vocabulary of a tiny BERT."""
    from transformers import BertConfig

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    BertConfig(
        vocab_size=len(WORDS),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(encoder):
    """The tiny BERT as the library makes it, with weights large enough that its answers differ."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig.from_pretrained(encoder)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def checkpoint(bert, tmp_path):
    """``checkpoint(**changes)`` writes chexbert.pth as it was saved from several GPUs, and returns its path."""

    def write(drop=(), **changes):
        torch.manual_seed(1)
        state = {f"module.bert.{name}": value for name, value in bert.state_dict().items()}
        state["module.bert.embeddings.position_ids"] = torch.arange(16)[None]
        for head, name in enumerate(CONDITIONS):
            state[f"module.linear_heads.{head}.weight"] = torch.randn(2 if name == "No Finding" else 4, HIDDEN)
            state[f"module.linear_heads.{head}.bias"] = torch.randn(2 if name == "No Finding" else 4)
        state = {key: value for key, value in (state | changes).items() if key not in drop}
        path = tmp_path / "chexbert.pth"
        torch.save(
            {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"param_groups": [{"lr": 1e-5}]}}, path
        )
        return path

    return write


def expected_label(state, bert, words, condition):
    """One report's label of one condition, step by step: first token, its head, the largest class, what that means."""
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    with torch.no_grad():
        first = bert(input_ids=ids).last_hidden_state[0, 0]
    head = CONDITIONS.index(condition)
    logits = state[f"module.linear_heads.{head}.weight"] @ first + state[f"module.linear_heads.{head}.bias"]
    return [None, 1, 0, -1][int(logits.argmax())]


def test_labels_equal_the_model_taken_apart(encoder, bert, checkpoint):
    path = checkpoint()
    state = torch.load(path, weights_only=True)["model_state_dict"]
    found = Chexbert(path, encoder, batch_size=2).label(REPORTS)
    assert found.shape == (5, 14)
    cut = ["[CLS]", *(["the", "lungs", "[UNK]", "clear", "."] * 9)[:14], "[SEP]"]
    pieces = [
        ["[CLS]", "the", "heart", "is", "normal", ".", "[SEP]"],
        ["[CLS]", "[SEP]"],
        ["[CLS]", "mild", "edema", ".", "no", "effusion", "##s", ".", "[SEP]"],
        ["[CLS]", "mild", "edema", "[SEP]"],
        cut,
    ]
    seen = set()
    for row, words in enumerate(pieces):
        for column, name in enumerate(CLASSES):
            label = expected_label(state, bert, words, name)
            assert found[row, column] == label or (label is None and np.isnan(found[row, column])), (row, name)
            seen.add((name == "No Finding", label))
    assert {label for is_normal, label in seen if not is_normal} == {None, 1, 0, -1}
    assert {label for is_normal, label in seen if is_normal} <= {None, 1}


def test_no_finding_is_positive_or_blank_and_order_and_batches_do_not_matter(encoder, checkpoint):
    head = CONDITIONS.index("No Finding")
    for bias, label in (([0.0, 9e9], 1.0), ([9e9, 0.0], np.nan)):
        labeler = Chexbert(checkpoint(**{f"module.linear_heads.{head}.bias": torch.tensor(bias)}), encoder)
        found = labeler.label(REPORTS)
        assert np.array_equal(found[:, CLASSES.index("No Finding")], [label] * 5, equal_nan=True)
    backwards = Chexbert(checkpoint(**{f"module.linear_heads.{head}.bias": torch.tensor(bias)}), encoder, batch_size=3)
    assert np.array_equal(backwards.label(REPORTS[::-1])[::-1], found, equal_nan=True)


def test_a_single_process_checkpoint_is_read_too(encoder, checkpoint, tmp_path):
    content = torch.load(checkpoint(), weights_only=True)
    expected = Chexbert(tmp_path / "chexbert.pth", encoder).label(REPORTS)
    content["model_state_dict"] = {
        key.removeprefix("module."): value for key, value in content["model_state_dict"].items()
    }
    torch.save(content, tmp_path / "plain.pth")
    assert np.array_equal(Chexbert(tmp_path / "plain.pth", encoder).label(REPORTS), expected, equal_nan=True)


@pytest.mark.thorough
def test_script_labels_a_file_with_it(encoder, checkpoint, tmp_path):
    (tmp_path / "in.csv").write_text("id,report\na,the heart is normal .\nb,mild edema\n")
    script = Path(__file__).resolve().parents[2] / "scripts" / "label_reports.py"
    subprocess.run(
        [
            sys.executable,
            script,
            tmp_path / "in.csv",
            "--out",
            tmp_path / "out.csv",
            "--chexbert_path",
            checkpoint(),
            "--chexbert_encoder",
            encoder,
        ],
        check=True,
        capture_output=True,
    )
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = Chexbert(checkpoint(), encoder).label(["the heart is normal .", "mild edema"])
    assert [[float(row[name] or "nan") for name in CLASSES] for row in rows] == pytest.approx(expected, nan_ok=True)


def test_mistakes_are_one_line_with_the_flag(encoder, checkpoint, tmp_path):
    def message(path, folder=encoder):
        with pytest.raises(InputError) as error:
            Chexbert(path, str(folder))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "--chexbert_path" in message(tmp_path / "none.pth") and "no such file" in message(tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    assert "damaged" in message(tmp_path / "bad.pth")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    assert "model_state_dict" in message(tmp_path / "other.pth")
    assert "linear_heads.13.bias" in message(checkpoint(drop=("module.linear_heads.13.bias",)))
    wide = checkpoint(**{"module.linear_heads.0.weight": torch.zeros(4, HIDDEN + 1)})
    assert "size mismatch" in message(wide)
    assert "--chexbert_encoder" in message(checkpoint(), tmp_path / "no" / "such" / "folder")
    folder = tmp_path / "without vocabulary"
    folder.mkdir()
    (folder / "config.json").write_bytes((encoder / "config.json").read_bytes())
    assert "vocab.txt is missing" in message(checkpoint(), folder)
