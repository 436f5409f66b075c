"""Reports in any language: words, characters and subwords, and what is said where words lack spaces."""

import json
import logging
import random
import re

import pytest
import torch
from PIL import Image

from modules.config import Config
from modules.data.subword_tokenizer import SubwordTokenizer
from modules.data.tokenizers import (
    Tokenizer,
    count_words,
    join_words,
    lacks_spaces,
    largest_threshold,
    unknown_share,
    words_of,
)
from modules.flags import parse_flags
from modules.run.predictor import load_predictor
from modules.run.testing import run_testing
from modules.run.vocabulary import build_tokenizer, tokenizer_from_state
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from scripts import check_data

CHINESE = [
    "双肺纹理清晰，未见实变影。",
    "心影大小正常。",
    "右侧胸腔少量积液。",
    "左肺下叶见结节，约1.5cm。",
    "骨性胸廓未见异常。",
]
SPANISH = [
    "El corazón es de tamaño normal.",
    "No hay derrame pleural.",
    "Pulmones sin consolidación.",
    "¿Nódulo de 1,5 cm?",
]
FRENCH = [
    "L’épanchement pleural est minime.",
    "Le cœur est de taille normale.",
    "Pas de pneumothorax.",
    "Nodule : 1,5 cm.",
]
LANGUAGES = {"Chinese": CHINESE, "Spanish": SPANISH, "French": FRENCH}


def reports_of(language, count, seed=0):
    """Made-up reports of two or three sentences."""
    draw = random.Random(seed)
    join = "" if language == "Chinese" else " "
    return [join.join(draw.sample(LANGUAGES[language], draw.choice((2, 3)))) for _ in range(count)]


def test_words_of_any_language():
    assert words_of("双肺纹理清晰，\n约1.5cm。") == "双 肺 纹 理 清 晰 , 约 1.5 cm 。"
    assert words_of("L’épanchement est MINIME (3,5 cm).") == "l'épanchement est minime ( 3,5 cm ) ."
    assert words_of("¿Derrame? No.") == "¿ derrame ? no ."
    assert words_of("हृदय सामान्य है।") == "हृदय सामान्य है ।"
    assert words_of("the <unk> heart") == "the <unk> heart"
    for text in (*CHINESE, *SPANISH, *FRENCH):
        assert words_of(words_of(text)) == words_of(text)
    assert join_words("双 肺 清 晰 。 心 影 normal size".split()) == "双肺清晰。心影 normal size"
    assert join_words("the heart is normal .".split()) == "the heart is normal ."


@pytest.mark.parametrize(
    "reports, lacking",
    [
        (CHINESE, True),
        (["双肺 纹理 清晰 ， 未 见 实变 影 。", "心影 大小 正常 。"], False),  # a word segmenter's
        (["両側肺野に異常影を認めません。心拡大なし。"], True),
        (["ปอดทั้งสองข้างปกติ ไม่พบก้อนเนื้อ หัวใจขนาดปกติ"], True),
        (["양측 폐야에 이상 소견 없습니다."], False),
        (SPANISH, False),
        (["The heart is normal. 心影"], False),
        ([], False),
    ],
)
def test_reports_without_spaces_are_known(reports, lacking):
    assert lacks_spaces(reports) is lacking


def test_reports_without_spaces_stop_training_and_name_the_remedy():
    with pytest.raises(InputError, match="no spaces between words.*--tokenizer subword or --tokenizer character"):
        build_tokenizer(Config(threshold=1), CHINESE, kind="word")
    for name in ("subword", "character"):
        assert isinstance(build_tokenizer(Config(tokenizer=name), CHINESE, kind="word"), SubwordTokenizer)
    assert isinstance(build_tokenizer(Config(threshold=1), SPANISH, kind="word"), Tokenizer)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("size", [0, 120])
def test_subwords_there_and_back(language, size):
    reports = reports_of(language, 30)
    made = SubwordTokenizer.from_reports(reports, size)
    assert made.num_ids == made.vocab_size + 1 and (not size or made.num_ids <= size)
    for report in reports:
        ids = made.encode(report)
        assert ids[0] == ids[-1] == 0 and 0 not in ids[1:-1] and max(ids) < made.num_ids
        assert made.decode(ids[1:]) == words_of(report)
        spans = made.words(ids[1:-1])
        assert [start for _, start, _ in spans] == [0, *(stop for _, _, stop in spans[:-1])]
        assert spans[-1][2] == len(ids) - 2
        assert words_of(join_words([word for word, _, _ in spans])) == words_of(report)
    shorter = len(made.encode(reports[0]))
    assert shorter <= len(SubwordTokenizer.from_reports(reports, 0).encode(reports[0]))
    assert made.encode("ж") == [0, *made.encode("ж")[1:-1], 0] and made.unk_id in made.encode("ж")
    assert "<unk>" in made.decode(made.encode("ж")[1:])
    assert made.unk_id not in made.encode(reports[0]) and 0 not in made.encode("<end> <unk>")[1:-1]


def test_the_state_is_plain_complete_and_repeatable():
    reports = reports_of("Chinese", 30)
    made = SubwordTokenizer.from_reports(reports, 60)
    assert SubwordTokenizer.from_reports(reports, 60).definition == made.definition
    other = tokenizer_from_state(json.loads(json.dumps(made.state())))
    assert isinstance(other, SubwordTokenizer) and other.sha256 == made.sha256
    assert [other.encode(text) for text in reports] == [made.encode(text) for text in reports]
    for damaged in (
        "no json",
        json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}),
    ):
        with pytest.raises(InputError, match="subword tokenizer"):
            tokenizer_from_state({"subwords": damaged})


def test_a_threshold_that_loses_many_words_is_told_with_the_one_that_would_do(caplog):
    reports = ["a b c d e f g h i j k l m n o p q r s t u v w x y z"] + ["a b c d e f g h i j k l m n o p q r s t"] * 2
    counts = count_words(reports, "iu_xray")  # six words once, twenty three times, and a full stop three times
    assert unknown_share(counts, 3) == 6 / 69 and largest_threshold(counts, 0.05) == 1
    with caplog.at_level(logging.WARNING, logger="ithn"):
        build_tokenizer(Config(threshold=3), reports, kind="word")
    assert "--threshold 3: 8.7% of the training tokens become <unk>; with --threshold 1 it would be 0.0%" in caplog.text
    assert largest_threshold(counts, 0.1) == 3 and largest_threshold({"a": 4}, 0.05) == 4
    caplog.clear()
    build_tokenizer(Config(threshold=1), reports, kind="word")
    assert not caplog.text


# ---- through the programs


@pytest.fixture
def foreign(tmp_path):
    """Makes a tiny data set with made-up reports in a language and noise as images."""

    def make(language):
        noise, rows = torch.Generator().manual_seed(1), {}
        texts = reports_of(language, 20)
        (tmp_path / "images").mkdir()
        for split, where in (("train", range(14)), ("val", range(14, 17)), ("test", range(17, 20))):
            rows[split] = [
                {"id": f"s{i}", "report": texts[i], "image_path": [f"{i}.png"], "split": split} for i in where
            ]
        for i in range(20):
            pixels = torch.randint(0, 256, (32, 32), generator=noise, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "annotation.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return ["--ann_path", tmp_path / "annotation.json", "--image_dir", tmp_path / "images"]

    return make


@pytest.mark.thorough
@pytest.mark.parametrize(
    "language, tokenizer", [("Chinese", "subword"), ("Spanish", "character"), ("French", "subword")]
)
def test_train_test_and_predict_in_any_language(foreign, train, tmp_path, language, tokenizer):
    flags = ["--tokenizer", tokenizer, "--max_seq_length", 60]
    flags += ["--subword_vocabulary", 80] if tokenizer == "subword" else []
    folder = train(*foreign(language), *flags)
    results = json.loads((folder / "results.json").read_text())
    assert results["test"]["model"]["BLEU_1"] is not None and results["variety"]["references"]["unk_share"] == 0
    assert "English" in results["missing"]["ce_rule"]
    written, content = (folder / "res.csv").read_text(), load_checkpoint(folder / "model_best.pth")
    assert set(content["vocabulary"]) == {"subwords", "cleaner"}
    argv = ["--load", folder / "model_best.pth", "--save_dir", tmp_path / "again"]
    run_testing(*parse_flags(list(map(str, argv)), "main_test.py", ""))
    assert (tmp_path / "again" / "res.csv").read_text() == written
    predictor = load_predictor(str(folder / "model_best.pth"), {"device": "cpu"})
    [report] = predictor.write([[Image.open(tmp_path / "images" / "0.png")]])
    assert report.text and len(report.words) == len(report.log_probs)
    if language == "Chinese":
        assert not re.search("[\u4e00-\u9fff] [\u4e00-\u9fff]", report.text)


def test_check_data_names_reports_without_spaces(foreign):
    def problems(*flags):
        argv = list(map(str, [*foreign_flags, "--num_workers", 0, "--image_size", 32, "--max_seq_length", 60, *flags]))
        given = vars(check_data.build_arguments().parse_args(argv))
        for name in check_data.OWN:
            given.pop(name)
        found = check_data.check(check_data.resolve_config(check_data.settle_flags(given)[0]), False)
        return {problem.kind: problem.message for problem in found.problems}, found.statistics

    foreign_flags = foreign("Chinese")
    found, _ = problems()
    assert "--tokenizer subword" in found["reports have no spaces between words"]
    found, statistics = problems("--tokenizer", "subword")
    assert not found and statistics["reports"]["test"]["tokens_unknown"] == 0
