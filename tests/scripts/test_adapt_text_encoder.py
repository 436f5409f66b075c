"""Adapting a text encoder: what is learned and from which reports, what is written, what is refused."""

import itertools
import json
import shutil
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)

from modules.data.annotations import read_annotation
from modules.mining.text_encoders import EncoderOptions, build_text_encoder
from scripts.research.adapt_text_encoder import RECORD, distinct_reports
from scripts.research.masked_language_model import MaskedLanguageModel, hold_out
from tests.hostile_support import Touch, refused, run

SCRIPT = "scripts.research.adapt_text_encoder"
ORGANS, STATES, FINDINGS = ("heart", "lung", "hilum", "spine"), ("normal", "clear", "large"), ("effusion", "mass")
REPORTS = [
    f"the {organ} is {state} . there is no {finding} ."
    for organ, state, finding in itertools.product(ORGANS, STATES, FINDINGS)
]
WORDS = ["the", "is", ".", "there", "no", *ORGANS, *STATES, *FINDINGS]
BERT_TOKENS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")
TOKENS = {"bert": BERT_TOKENS, "distilbert": BERT_TOKENS, "roberta": ("<s>", "<pad>", "</s>", "<unk>", "<mask>")}
SIZES = {"vocab_size": 5 + len(WORDS), "pad_token_id": 1, "max_position_embeddings": 20}
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_tokenizer(folder, kind, mask=True):
    """Whole words; ids 0 to 4 are the special tokens."""
    first, padding, last, unknown, masked = TOKENS[kind]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate([*TOKENS[kind], *WORDS])}, unk_token=unknown)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(first, 0), (last, 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token=first,
        sep_token=last,
        pad_token=padding,
        unk_token=unknown,
        **({"mask_token": masked} if mask else {}),
    )
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A folder per kind: masked-LM checkpoints, and "headless", a BERT without its head as MiniLM comes."""
    torch.manual_seed(0)
    bert = BertConfig(**SIZES, **WIDTHS)
    made = {
        "bert": BertForMaskedLM(bert),
        "headless": BertModel(bert),
        "roberta": RobertaForMaskedLM(RobertaConfig(**SIZES, **WIDTHS)),
        "distilbert": DistilBertForMaskedLM(DistilBertConfig(**SIZES, dim=16, n_layers=2, n_heads=2, hidden_dim=32)),
    }
    folders = {}
    for name, model in made.items():
        folders[name] = tmp_path_factory.mktemp(name)
        save_tokenizer(folders[name], "bert" if name == "headless" else name)
        model.save_pretrained(folders[name])
    return folders


def annotate(path, reports=REPORTS, **others):
    """An annotation with these training reports; val and test as given, else of one report."""
    splits = {"train": reports, "val": ["the spine is large ."], "test": ["no mass ."]} | others
    path.write_text(
        json.dumps(
            {
                split: [
                    {
                        "id": f"patient{split}{row}",
                        "report": report,
                        "image_path": [f"{split}{row}.png"],
                        "split": split,
                    }
                    for row, report in enumerate(texts)
                ]
                for split, texts in splits.items()
            }
        )
    )
    return path


@pytest.fixture
def adapt(bases, tmp_path, monkeypatch, capsys):
    """Run the script on a base and an annotation; returns the folder and what it printed."""
    numbers = itertools.count()

    def adapted(base, *flags, annotation=None, epochs=2):
        out = tmp_path / "made" / f"encoder{next(numbers)}"
        annotation = annotation or annotate(tmp_path / "annotation.json")
        said = []
        with monkeypatch.context() as patch:
            patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
            code, errors = run(
                patch,
                capsys,
                SCRIPT,
                "--ann_path",
                annotation,
                "--text_encoder",
                bases[base],
                "--out",
                out,
                "--epochs",
                epochs,
                "--batch_size",
                4,
                "--lr",
                5e-3,
                "--device",
                "cpu",
                *flags,
            )
        assert code == 0, (code, said, errors)
        return out, "\n".join(said)

    return adapted


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def embed(folder):
    encoder = build_text_encoder(str(folder), EncoderOptions(batch_size=8))
    return encoder.encode(REPORTS), encoder.describe()["weights_sha256"]


# ---- what is learned


@pytest.mark.parametrize("kind", ["bert", "roberta", "headless"])
def test_loss_falls_and_the_miner_takes_the_folder(bases, adapt, tmp_path, kind):
    folder, said = adapt(kind, epochs=12)
    record = json.loads((folder / RECORD).read_text())
    scores = record["held_out_scores"]
    assert [score["epoch"] for score in scores] == list(range(13))
    assert scores[-1]["loss"] < 0.75 * scores[0]["loss"] and scores[-1]["accuracy"] >= scores[0]["accuracy"]
    assert f"loss {scores[0]['loss']:.3f}" in said and f"accuracy {scores[-1]['accuracy']:.3f}" in said
    assert record["new_head"] == ("starts from scratch" in said) == (kind == "headless")
    (before, base), (after, adapted) = embed(bases[kind]), embed(folder)
    assert np.abs(before - after).max() > 0.05
    assert (record["base_weights_sha256"], record["weights_sha256"]) == (base, adapted)
    _, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert all("pooler." in name for name in report["missing_keys"]) and not report["unexpected_keys"]
    # Nothing is frozen.
    old, new = load_file(bases[kind] / "model.safetensors"), load_file(folder / "model.safetensors")
    old = {name.removeprefix(f"{kind}."): tensor for name, tensor in old.items()}
    assert len(new) > 20 and not [name for name in new if torch.equal(new[name], old[name])]


# ---- from which reports, and by which seed


@pytest.mark.parametrize("kind", ["bert", "headless"])
def test_same_seed_same_bytes(adapt, kind):
    first, second, other = (weights(adapt(kind, "--seed", seed)[0]) for seed in (4, 4, 5))
    assert first == second != other


def test_validation_and_test_reports_have_no_influence(adapt, tmp_path):
    alone = annotate(tmp_path / "other.json", val=["there is a new word ."] * 5, test=[*REPORTS, "no no no ."])
    assert weights(adapt("bert")[0]) == weights(adapt("bert", annotation=alone)[0])
    changed = annotate(tmp_path / "changed.json", [*REPORTS[:-1], "no mass . no mass . no mass ."])
    assert weights(adapt("bert")[0]) != weights(adapt("bert", annotation=changed)[0])


def test_same_text_is_read_once_so_that_none_held_out_is_trained_on(adapt, tmp_path):
    repeated = annotate(tmp_path / "repeated.json", [*REPORTS, *(report.upper() for report in REPORTS), *REPORTS])
    assert distinct_reports(read_annotation(repeated), "iu_xray") == REPORTS
    folder, said = adapt("bert", annotation=repeated)
    assert "72 training reports, 24 different ones with known words: 23 to train on, 1 held out" in said
    assert weights(folder) == weights(adapt("bert")[0])


def test_held_out_texts_are_a_twentieth_drawn_by_seed():
    trained, held_out = hold_out(range(200), 3)
    assert len(held_out) == 10 and sorted(trained + held_out) == list(range(200))
    assert held_out == hold_out(range(200), 3)[1] != hold_out(range(200), 4)[1]


def test_captions_are_records_of_their_own(adapt, tmp_path):
    path = annotate(tmp_path / "coco.json")
    content = json.loads(path.read_text())
    for row, item in enumerate(content["train"]):
        del item["report"]
        item["captions"] = [REPORTS[row], f"no {WORDS[row % len(WORDS)]} ."]
    path.write_text(json.dumps(content))
    _, said = adapt("bert", "--dataset_name", "coco", annotation=path)
    assert said.startswith("48 training reports")


# ---- what is written


def test_folder_is_private_and_names_no_path_text_or_id(bases, adapt, tmp_path):
    folder, said = adapt("roberta")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", RECORD} <= names
    for path in folder.glob("*.json"):
        text = path.read_text()
        assert str(tmp_path) not in text and str(bases["roberta"].parent) not in text, path.name
        assert "patient" not in text and not any(report in text for report in REPORTS), path.name
    assert not any(report in said for report in REPORTS) and "do not share it" in said
    record = json.loads((folder / RECORD).read_text())
    assert record["base"] == bases["roberta"].name and record["settings"]["lr"] == 5e-3
    assert record["annotation_sha256"] == read_annotation(tmp_path / "annotation.json").sha256
    assert record["settings"]["tokens_read"] == 18 and record["provenance"]["device"] == "cpu"


def flags_of(bases, tmp_path, base="bert", out="encoder"):
    return [
        "--ann_path",
        annotate(tmp_path / "annotation.json"),
        "--text_encoder",
        bases[base],
        "--out",
        tmp_path / out,
        "--batch_size",
        4,
        "--device",
        "cpu",
        "--epochs",
        1,
    ]


@pytest.mark.parametrize("moment", ["training", "saving"])
@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)])
def test_stopped_run_leaves_nothing(bases, tmp_path, monkeypatch, capsys, moment, stop, code):
    def fail(*anything, **more):
        if moment == "saving":
            (anything[1] / "model.safetensors").write_bytes(b"half")
        raise stop

    target = {"training": (torch.optim.AdamW, "step"), "saving": (MaskedLanguageModel, "save")}[moment]
    monkeypatch.setattr(*target, fail)
    before = {path.name for path in tmp_path.iterdir()} | {"annotation.json"}
    found, said = run(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path))
    assert found == code and "Traceback" not in said
    assert {path.name for path in tmp_path.iterdir()} == before


def test_empty_folder_is_taken_and_becomes_private(bases, tmp_path, monkeypatch, capsys):
    (tmp_path / "encoder").mkdir(mode=0o755)
    code, _ = run(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path))
    assert code == 0 and stat.S_IMODE((tmp_path / "encoder").stat().st_mode) == 0o700


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--epochs", 0), "--epochs 0: must be 1 or more"),
        (("--batch_size", 0), "--batch_size 0"),
        (("--max_length", 2), "--max_length 2: must be 3 or more"),
        (("--seed", -1), "--seed -1"),
        (("--lr", 0), "--lr 0.0: must be"),
        (("--lr", "nan"), "--lr nan: must be"),
        (("--lr", "inf"), "--lr inf: must be"),
        (("--mask_share", 0), "--mask_share 0.0: must lie"),
        (("--mask_share", 1), "--mask_share 1.0: must lie"),
        (("--device", "tpu"), "--device tpu"),
        (("--text_encoder", "tfidf"), "tfidf: has no weights to adapt"),
        (("--text_encoder", "TF-IDF"), "TF-IDF: has no weights to adapt"),
        (("--text_encoder", "./nowhere"), "--text_encoder ./nowhere: no such folder (nor one of minilm, nor a hub id"),
        (("--lr", 1e30), "not a finite number; lower --lr"),
        (("--ann_path", "nowhere.json"), "nowhere.json"),
    ],
)
def test_wrong_flags_are_one_line(bases, tmp_path, monkeypatch, capsys, flags, message):
    assert message in refused(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path), *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"annotation.json"}


def test_out_that_holds_something_is_refused(bases, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    for out, message in (("full", "is not empty"), ("full/kept", "is not a folder")):
        assert message in refused(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path, out=out))
    assert [path.read_text() for path in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([], "split 'train' is empty"),
        (["no mass ."] * 3, "1 different training reports with known words"),
        (["qwertz", "asdf"], "0 different training reports with known words"),
    ],
)
def test_too_few_reports_are_one_line(bases, tmp_path, monkeypatch, capsys, reports, message):
    flags = flags_of(bases, tmp_path)
    annotate(tmp_path / "annotation.json", reports)
    assert message in refused(monkeypatch, capsys, SCRIPT, *flags)


@pytest.mark.parametrize("config", [T5Config(), GPT2Config()], ids=["t5", "gpt2"])
def test_models_of_another_kind_are_refused(bases, tmp_path, monkeypatch, capsys, config):
    config.save_pretrained(tmp_path / "base")
    said = refused(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path), "--text_encoder", tmp_path / "base")
    assert f"a {config.model_type} model does not predict masked words" in said


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("mask", "its tokeniser has no mask token"),
        ("layer", "its weights lack"),
        ("half", "cannot be loaded"),
        ("config", "cannot be loaded"),
        ("rows", "its tokeniser has 19 tokens, its weights 9"),
    ],
)
def test_damaged_bases_are_one_line(bases, tmp_path, monkeypatch, capsys, damage, message):
    base, config = tmp_path / "base", BertConfig(**SIZES, **WIDTHS)
    config.vocab_size = 9 if damage == "rows" else config.vocab_size
    model = BertForMaskedLM(config)
    kept = {name: tensor for name, tensor in model.state_dict().items() if damage != "layer" or "layer.1" not in name}
    model.save_pretrained(base, state_dict=kept)
    save_tokenizer(base, "bert", mask=damage != "mask")
    if damage in ("half", "config"):
        path = base / {"half": "model.safetensors", "config": "config.json"}[damage]
        path.write_bytes(path.read_bytes()[:200])
    assert message in refused(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path), "--text_encoder", base)


@pytest.mark.parametrize("kind", ["pickle", "module"])
def test_code_that_comes_with_a_base_is_not_run(bases, tmp_path, monkeypatch, capsys, kind):
    base, canary = shutil.copytree(bases["bert"], tmp_path / "base"), tmp_path / "executed"
    if kind == "pickle":
        (base / "model.safetensors").unlink()
        torch.save({"bert.x": Touch(canary)}, base / "pytorch_model.bin")
    else:
        config = json.loads((base / "config.json").read_text())
        config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForMaskedLM": "own.Own"}}
        (base / "config.json").write_text(json.dumps(config))
        (base / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    said = refused(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path), "--text_encoder", base)
    assert "cannot be loaded" in said and not canary.exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_out_of_memory_names_what_helps(bases, tmp_path, monkeypatch, capsys, error):
    def fail(*anything, **more):
        raise error

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    said = refused(monkeypatch, capsys, SCRIPT, *flags_of(bases, tmp_path))
    assert "out of memory" in said and "lower --batch_size or --max_length" in said
