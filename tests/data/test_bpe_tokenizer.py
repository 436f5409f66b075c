"""GPT-2's BPE: ids around one special id, text there and back, and a pretrained GPT-2 through the programs."""

import json
import shutil

import h5py
import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from models.visualgpt import Settings, VisualGPT
from modules.config import Config
from modules.data.bpe_tokenizer import BpeTokenizer, find_gpt2, read_gpt2
from modules.data.detection_features import DetectionExtractor
from modules.data.tokenizers import Tokenizer, clean_report
from modules.flags import flags_in_effect, parse_flags, preset
from modules.run.build import gpt2_options
from modules.run.testing import run_testing
from modules.run.vocabulary import build_tokenizer, tokenizer_from_state
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from tests.gpt2_support import REPORTS, SIZE_FLAGS, SIZES, SPECIAL, save_bpe, save_gpt2

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    save_bpe(folder)
    save_gpt2(folder, BpeTokenizer.from_folder(folder, "iu_xray").num_ids)
    return folder


@pytest.fixture(scope="module")
def bpe(folder) -> BpeTokenizer:
    return BpeTokenizer.from_folder(folder, "iu_xray")


@pytest.mark.parametrize("text", [*REPORTS, "Übergröße of the heart, 1.5 cm!", "", "<|endoftext|> += <?", "! ! !"])
def test_text_there_and_back(bpe, text):
    ids = bpe.encode(text)
    assert ids[0] == ids[-1] == 0 and 0 not in ids[1:-1]
    assert max(ids) < bpe.num_ids
    assert bpe.decode(ids[1:]) == " ".join(clean_report(text, "iu_xray").split())


def test_only_the_end_and_the_first_id_change_places(bpe, folder):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    begin, end, padding = (vocabulary[token] for token in ("<?", "<|endoftext|>", "+="))
    assert bpe.special_ids == (begin, end, padding)
    first = next(text for text, index in vocabulary.items() if index == 0)
    assert first == "!" and bpe.decode([end]) == "!" and bpe.decode([0, 5]) == ""
    heart = vocabulary["heart"]
    assert heart in bpe.encode("heart") and bpe.decode([heart]) == "heart"


def test_special_tokens_are_no_text(bpe):
    begin, _, padding = bpe.special_ids
    assert bpe.decode([begin, *bpe.encode("heart")[1:-1], padding]) == "heart ."


def test_words_are_made_of_their_pieces(bpe):
    ids = bpe.encode("The heart is unremarkable.")[1:-1]
    spans = bpe.words(ids)
    assert [text for text, _, _ in spans] == ["the", "heart", "is", "unremarkable", "."]
    assert [start for _, start, _ in spans] == [0, *(stop for _, _, stop in spans[:-1])] and spans[-1][2] == len(ids)
    assert spans[3][2] - spans[3][1] > 1
    assert bpe.words([bpe.special_ids[0]]) == []
    words = Tokenizer.from_reports(REPORTS, 1, "iu_xray")
    assert words.words(words.encode("heart is")[1:-1]) == [("heart", 0, 1), ("is", 1, 2), (".", 2, 3)]


def test_byte_pairs_may_hold_wordpieces_sign():
    """GPT-2's vocabulary has the token "##"."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([*REPORTS, "## ## ##"], trainer)
    assert library.token_to_id("##") is not None
    found = BpeTokenizer(library.to_str(), "iu_xray")
    assert [text for text, _, _ in found.words(found.encode("The heart is unremarkable.")[1:-1])] == [
        *("the", "heart", "is", "unremarkable", ".")
    ]
    assert found.unk_id is None


def wordpiece(cleaner):
    special, words = "[PAD] [UNK] [CLS] [SEP]", "the lungs are clear no pneumo ##thorax x ray don t cm"
    pieces = f"{special} {words} . - ' , 1 5 ##0 ##50".split()
    library = Library(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    return BpeTokenizer(library.to_str(), cleaner, ("[CLS]", "[SEP]", "[PAD]"))


@pytest.mark.parametrize(
    "cleaner, text",
    [
        ("iu_xray", "The lungs are clear. No pneumothorax. X-ray, x-ray."),
        ("mimic_cxr", "1. The lungs are clear.\n2. X-ray. No pneumothorax, 1-1.50 cm."),
        ("any", "The lungs are clear. X-ray, 1.50 cm. Don't. 5"),
        ("coco", "the x-ray don't clear"),
    ],
)
def test_a_wordpiece_vocabulary_gives_the_cleaned_report_back(cleaner, text):
    """BERT's decoder would close up " ." and leave "x - ray", so that no report could equal its reference."""
    found, wanted = wordpiece(cleaner), clean_report(text, cleaner)
    ids = found.encode(text)
    if cleaner == "coco":  # the one piece that this vocabulary lacks
        wanted = wanted.replace("dont", "<unk>")
    assert found.decode(ids[1:]) == " ".join(wanted.split())
    spans = found.words(ids[1:-1])
    assert [word for word, _, _ in spans] == wanted.split()
    assert [start for _, start, _ in spans] == [0, *(stop for _, _, stop in spans[:-1])] and spans[-1][2] == len(
        ids
    ) - 2


def test_the_unknown_word_of_a_vocabulary_is_known_as_such():
    found = wordpiece("iu_xray")
    ids = found.encode("lungs opaque")
    assert ids[2] == found.unk_id and found.decode(ids[1:]) == "lungs <unk> ."
    pieces = models.Unigram([("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], unk_id=1)
    assert BpeTokenizer(Library(pieces).to_str(), "any", ("</s>",) * 3).unk_id == 1
    ends = models.BPE({"a": 0, "<|endoftext|>": 1}, [], unk_token="<|endoftext|>")  # as some files of GPT-2 have it
    assert BpeTokenizer(Library(ends).to_str(), "any").unk_id is None


def test_state_is_plain_and_complete(bpe):
    state = json.loads(json.dumps(bpe.state()))
    other = tokenizer_from_state(state)
    assert isinstance(other, BpeTokenizer) and other.sha256 == bpe.sha256
    assert [other.encode(text) for text in REPORTS] == [bpe.encode(text) for text in REPORTS]
    words = Tokenizer.from_reports(REPORTS, 1, "iu_xray")
    assert isinstance(tokenizer_from_state(words.state()), Tokenizer)


@pytest.mark.parametrize(
    "state",
    [
        {"bpe": "no json", "cleaner": "iu_xray"},
        {"cleaner": "iu_xray"},
        [],
        {
            "bpe": json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
            "cleaner": "iu_xray",
        },
    ],
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(InputError):
        tokenizer_from_state(state)


def test_a_vocabulary_without_begin_and_padding_takes_its_end(tmp_path):
    save_bpe(tmp_path, special=["<|endoftext|>"])
    found = BpeTokenizer.from_folder(tmp_path, "iu_xray")
    assert set(found.special_ids) == {found.num_ids - 1}


# ---- which tokeniser, which weights


def test_the_flags_decide_which_tokeniser(folder, tmp_path):
    def kind(auto="bpe", **flags):
        return type(build_tokenizer(Config(threshold=1, **flags), REPORTS, kind=auto))

    assert kind(gpt2_path=str(folder)) is BpeTokenizer
    assert kind(gpt2_path=str(folder), auto="word") is Tokenizer
    assert kind(gpt2_path=str(folder), auto="word", tokenizer="bpe") is BpeTokenizer
    assert kind(gpt2_path=str(folder), tokenizer="word") is Tokenizer
    assert kind() is Tokenizer
    assert kind(gpt2_path=str(tmp_path)) is Tokenizer  # a folder without BPE files
    for flags in ({}, {"gpt2_path": str(tmp_path)}):
        with pytest.raises(InputError, match="vocab.json and merges.txt"):
            kind(tokenizer="bpe", **flags)


@pytest.mark.parametrize("safe", [True, False])
def test_weights_of_both_formats(tmp_path, safe):
    save_gpt2(tmp_path, 20, safe=safe)
    weights, sizes = read_gpt2(tmp_path)
    assert sizes == {"d_model": 16, "num_heads": 2, "gpt2_layers": 2, "gpt2_positions": 48}
    assert weights["wte.weight"].shape == (20, 16) and len(weights) == 2 + 2 * 12 + 2


def test_one_line_where_there_is_no_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such folder.*random weights"):
        find_gpt2(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded.*random weights"):
        read_gpt2(tmp_path)


def test_a_hub_that_cannot_be_reached_says_what_to_download(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def absent(*_, **__):
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("no net")))
    with pytest.raises(InputError) as error:
        find_gpt2("gpt2")
    line = str(error.value)
    assert "hf download gpt2" in line and "'--gpt2_path DIR'" in line and "random weights" in line
    assert "text_encoder" not in line


def test_sizes_that_differ_from_the_flags_are_named(folder, bpe):
    with pytest.raises(InputError, match="--d_model 16 --num_heads 2 --gpt2_layers 2 --gpt2_positions 48"):
        gpt2_options(Config(gpt2_path=str(folder)), bpe, pretrained=True)
    with pytest.raises(InputError, match="--max_seq_length 60: at most the decoder's --gpt2_positions 48"):
        gpt2_options(Config(gpt2_positions=48), bpe, pretrained=False)
    fitting = {
        "gpt2_path": str(folder),
        "d_model": 16,
        "num_heads": 2,
        "gpt2_layers": 2,
        "gpt2_positions": 48,
        "max_seq_length": 30,
    }
    assert "wte.weight" in gpt2_options(Config(**fitting), bpe, pretrained=True)["gpt2"]
    words = Tokenizer.from_reports(REPORTS, 1, "iu_xray")
    assert "wte.weight" not in gpt2_options(Config(**fitting), words, pretrained=True)["gpt2"]
    (extra := folder.parent / "other").mkdir()
    save_bpe(extra, special=[*SPECIAL, "<new>"], size=310)
    with pytest.raises(InputError, match="token embeddings"):
        gpt2_options(Config(**fitting), BpeTokenizer.from_folder(extra, "iu_xray"), pretrained=True)


def test_the_papers_settings():
    given, notes = parse_flags(["--backbone", "visualgpt"], "x", "")
    told = "\n".join(notes)  # wrapped into lines
    assert "--gpt2_path gpt2" in told and "--tau 0.2" in told
    settings = preset("visualgpt", "iu_xray")
    assert (settings["optim"], settings["lr_ed"], settings["clip_norm"], settings["beam_size"]) == ("AdamW", 1e-4, 1, 5)
    assert settings["batch_size"] * settings["grad_accumulation"] == 50


@pytest.mark.parametrize("backbone", ["r2gen", "r2gencmn", "xpronet", "visualgpt"])
def test_the_folder_of_the_byte_pairs_is_a_flag_of_every_backbone(backbone):
    given = {"model_name": backbone, "gpt2_path": "folder"}
    with_bpe, lines = flags_in_effect(given | {"tokenizer": "bpe"}, Config(**given, tokenizer="bpe"))
    assert with_bpe["gpt2_path"] == "folder" and lines == []
    _, lines = flags_in_effect(given, Config(**given))
    assert bool(lines) == (backbone != "visualgpt") and all("--gpt2_path" in line for line in lines)


# ---- through the programs


@pytest.mark.thorough
@pytest.mark.parametrize("backbone", ["visualgpt", "r2gencmn"])
def test_a_run_with_bpe_is_tested_without_the_folder(train, folder, tmp_path, demo_index, backbone):
    """Weights and tokeniser travel with the checkpoint."""
    copy = shutil.copytree(folder, tmp_path / "gpt2")
    results = train(
        "--model_name",
        backbone,
        *SIZE_FLAGS,
        "--gpt2_path",
        copy,
        "--tokenizer",
        "bpe",
        "--negative_index",
        demo_index,
        "--max_seq_length",
        40,
    )
    first = (results / "res.csv").read_text()
    shutil.rmtree(copy)
    content = load_checkpoint(results / "model_best.pth")
    assert content["vocabulary"]["bpe"]
    given, notes = parse_flags(["--load", str(results / "model_best.pth")], "main_test.py", "")
    run_testing(given, notes)
    assert (results / "res.csv").read_text() == first
    if backbone == "r2gencmn":
        train(
            "--resume", results / "current_checkpoint.pth", "--save_dir", results, "--epochs", 2, "--max_seq_length", 40
        )
        assert len(load_checkpoint(results / "current_checkpoint.pth")["history"]) == 2


def test_a_published_file_is_tested_on_detection_features(demo, folder, bpe, tmp_path):
    """Names with a wrapper's prefix, any decoding state, no visual extractor, no settings; BPE from a folder."""
    annotation = json.loads((demo / "annotation.json").read_text())
    torch.manual_seed(0)
    with h5py.File(tmp_path / "detections.hdf5", "w") as file:
        for number, record in enumerate(record for records in annotation.values() for record in records):
            file[f"{record['id']}_features"] = torch.randn(3 + number % 4, 10).numpy()
    model = VisualGPT(
        visual_extractor=DetectionExtractor(6, 10),
        num_ids=bpe.num_ids,
        settings=Settings(d_ff=24, num_layers=3, **SIZES),
        begin_id=bpe.special_ids[0],
        end_id=bpe.special_ids[1],
        pad_token=bpe.special_ids[2],
    )
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    state["module.decoder.transformer.h.0.attn.running_keys"] = torch.zeros(10, 2, 3, 8)
    torch.save({"state_dict": state, "epoch": 3, "best_cider": 1.0}, tmp_path / "published.pth")
    flags = [
        "--load",
        tmp_path / "published.pth",
        "--model_name",
        "visualgpt",
        "--gpt2_path",
        folder,
        *SIZE_FLAGS,
        "--d_ff",
        24,
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--detection_features",
        tmp_path / "detections.hdf5",
        "--max_detections",
        6,
        "--max_seq_length",
        12,
        "--visualgpt_compat",
        "published",
        "--save_dir",
        tmp_path / "out",
        "--record_dir",
        tmp_path / "records",
        "--num_workers",
        0,
        "--meteor",
        "false",
        "--clinical",
        "false",
    ]
    given, notes = parse_flags([str(flag) for flag in flags], "main_test.py", "")
    run_testing(given, notes)
    assert len((tmp_path / "out" / "res.csv").read_text().splitlines()) == len(annotation["test"])
    given["d_ff"] = 25
    with pytest.raises(InputError, match=r"pwff.fc1.weight: shape \(24, 16\)"):
        run_testing(given, notes)
