"""Hard-negative index: the rules of exclusion, the file, and the script that writes it."""

import dataclasses
import json
import shlex
import stat
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from modules.config import Config
from modules.data.annotations import read_annotation
from modules.data.captions import split_captions
from modules.data.study_context import with_sections
from modules.flags import build_parser
from modules.mining.index import HardNegativeIndex, group_ids, mine_neighbours
from modules.runtime.errors import InputError
from scripts import check_data, mine_hard_negatives
from scripts.mine_hard_negatives import main

METADATA = {"ann_path": "a.json", "train_sha256": "0" * 64, "flags": {"text_encoder": "tfidf", "top_k": 2}}


def full_sort(similarity: np.ndarray, k: int, *groups: np.ndarray) -> np.ndarray:
    for ids in groups:
        similarity = np.where(ids[:, None] == ids, -np.inf, similarity)
    similarity = np.pad(similarity, ((0, 0), (0, k)), constant_values=-np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(similarity, order, axis=1) > -np.inf, order, -1)


@pytest.mark.parametrize("by_text", [True, False])
@pytest.mark.parametrize("by_study", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_equals_a_full_sort_over_all_records(seed, by_study, by_text):
    # Integer vectors make all similarities exact, so ties between different texts are ties here and there.
    rng = np.random.default_rng(seed)
    texts, count, k = 40, 90, int(rng.integers(1, 9))
    text = group_ids(rng.integers(0, texts, count).tolist())
    vectors = rng.integers(-2, 3, (text.max() + 1, 4)).astype(np.float32)
    text_group = group_ids(rng.integers(0, 15, text.max() + 1)[text].tolist())
    study_group = group_ids(rng.integers(0, rng.choice([1, 20, 400]), count).tolist())
    rows, similarity = mine_neighbours(
        vectors, text, k, text_group=text_group if by_text else None, study_group=study_group if by_study else None
    )
    exact = (vectors @ vectors.T)[text][:, text]
    groups = [np.arange(count), *([text_group] if by_text else []), *([study_group] if by_study else [])]
    np.testing.assert_array_equal(rows, full_sort(exact, k, *groups))
    found = rows >= 0
    np.testing.assert_array_equal(similarity[found], np.take_along_axis(exact, rows, axis=1)[found])
    assert (similarity[~found] == -np.inf).all() and rows.dtype == np.int32


def test_copies_of_one_text_are_neighbours_in_the_order_of_the_records():
    # Records 0..99 share a text; record 100 is nearest to it and must get its first copies, whatever the arithmetic.
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2, 300)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    text = np.array([0] * 100 + [1])
    rows, _ = mine_neighbours(vectors, text, 4, text_group=text, study_group=np.arange(101))
    assert rows[100].tolist() == [0, 1, 2, 3]
    assert rows[57].tolist() == [100, -1, -1, -1]


def test_records_of_one_study_exclude_each_other_only():
    # Study 0 holds two different texts, a and b; record 3 repeats a in another study.
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], dtype=np.float32)
    text = np.array([0, 1, 2, 0])
    rows, _ = mine_neighbours(vectors, text, 1, text_group=text, study_group=np.array([0, 0, 1, 2]))
    assert rows[:, 0].tolist() == [2, 3, 1, 1]


@pytest.fixture
def index():
    rng = np.random.default_rng(0)
    similarity = np.sort(rng.random((20, 2), dtype=np.float32))[:, ::-1].copy()
    return HardNegativeIndex(rng.integers(-1, 20, (20, 2)).astype(np.int32), similarity, METADATA)


def test_saved_index_comes_back_and_is_private(index, tmp_path):
    path = tmp_path / "new" / "negatives.safetensors"
    index.save(path)
    loaded = HardNegativeIndex.load(path)
    np.testing.assert_array_equal(loaded.neighbours, index.neighbours)
    np.testing.assert_array_equal(loaded.similarity, index.similarity)
    assert loaded.metadata == METADATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_damaged_files_are_named(index, tmp_path):
    path = tmp_path / "negatives.safetensors"
    index.save(path)
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match="negatives.safetensors: .*(damaged|not a hard-negative index)"):
            HardNegativeIndex.load(path)
    rng = np.random.default_rng(1)
    for bit in rng.integers(0, 8 * len(content), 200):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(InputError, match="mine it again|damaged"):
            HardNegativeIndex.load(path)


@pytest.mark.parametrize("rows", [[[20, 0]] * 20, [[-2, 0]] * 20, [[1]] * 20])
def test_rows_that_do_not_exist_are_refused(index, tmp_path, rows):
    path = tmp_path / "negatives.safetensors"
    HardNegativeIndex(np.array(rows, dtype=np.int32), index.similarity, METADATA).save(path)
    with pytest.raises(InputError, match="damaged"):
        HardNegativeIndex.load(path)


@pytest.mark.parametrize(
    "metadata",
    ["[" * 100_000, '["train_sha256", "flags", "ann_path"]', '{"train_sha256": "y", "flags": "abc", "ann_path": "p"}'],
)
def test_metadata_of_another_kind_are_refused(index, tmp_path, monkeypatch, metadata):
    monkeypatch.setattr("modules.mining.index.json.dumps", lambda _: metadata)  # with a checksum that is right
    index.save(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="damaged"):
        HardNegativeIndex.load(tmp_path / "x.safetensors")


def test_an_index_without_columns_is_refused(index, tmp_path):
    none = np.zeros((len(index.neighbours), 0), np.int32)
    HardNegativeIndex(none, none.astype(np.float32), index.metadata).save(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="damaged"):
        HardNegativeIndex.load(tmp_path / "x.safetensors")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(InputError, match="no such hard-negative index"):
        HardNegativeIndex.load(path)
    with pytest.raises(InputError, match="no such hard-negative index"):
        HardNegativeIndex.load(tmp_path)
    save_file({"neighbours": np.zeros((2, 1), dtype=np.int32)}, path)
    with pytest.raises(InputError, match="not a hard-negative index of this version"):
        HardNegativeIndex.load(path)
    path.write_text("id,report\n")
    with pytest.raises(InputError, match="damaged"):
        HardNegativeIndex.load(path)


def test_an_index_that_cannot_be_written_leaves_nothing_behind(index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder .*file' cannot be made"):
        index.save(tmp_path / "file" / "negatives.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken.*cannot be written"):
        index.save(tmp_path / "taken")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "taken"]


# ---- the script

REPORTS = ["Lungs are clear.", "lungs are clear", "Large left effusion.", "Small left effusion.", "Heart is large."]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """``mine(reports, flags...)`` runs the script with tf-idf and returns (index, annotation)."""

    def run(reports, *flags):
        path, out = tmp_path / "annotation.json", tmp_path / "negatives.safetensors"
        train = [
            {"id": f"s{i}", "report": report, "image_path": ["a.png"], "split": "train"}
            for i, report in enumerate(reports)
        ]
        path.write_text(json.dumps({"train": train}))
        argv = ["mine", "--ann_path", path, "--out", out, "--text_encoder", "tfidf", "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", [str(part) for part in argv])
        main()
        return HardNegativeIndex.load(out), read_annotation(path, required_splits=("train",))

    return run


def test_script_excludes_identical_cleaned_text(mine, capsys):
    index, annotation = mine(REPORTS, "--top_k", 2)
    index.check(annotation)
    assert index.neighbours[2, 0] == 3 and index.neighbours[3, 0] == 2
    assert 1 not in index.neighbours[0] and 0 not in index.neighbours[1]
    printed = capsys.readouterr().out
    assert "2 of 5 training records share their cleaned text" in printed
    assert "5 have an admissible neighbour" in printed
    assert "Small left effusion." in printed


def test_script_says_that_nothing_is_pooled(mine, capsys):
    mine(REPORTS, "--top_k", 1)
    assert "--pooling" not in capsys.readouterr().out
    mine(REPORTS, "--top_k", 1, "--pooling", "first")
    assert "--pooling first has no effect with --text_encoder tfidf" in capsys.readouterr().out


def test_script_restores_the_literal_rule(mine):
    index, _ = mine(REPORTS, "--top_k", 1, "--include_identical_text", "--include_same_study", "true")
    assert index.neighbours[:2, 0].tolist() == [1, 0]
    np.testing.assert_allclose(index.similarity[:2, 0], 1, atol=1e-6)


LABELLED = [
    "No pleural effusion.",
    "Lungs are clear.",
    "Large left effusion.",
    "Small left effusion.",
    "Cardiomegaly and a small effusion.",
    "The heart is enlarged.",
    "Normal chest.",
]
UNCLASSED = ["Scoliosis of the spine.", "A calcified granuloma."]


def test_script_asks_for_another_label_on_request(mine, capsys):
    index, _ = mine(LABELLED, "--top_k", 6)
    assert index.neighbours[2, 0] == 3, "another size of the same finding"
    index, _ = mine(LABELLED, "--top_k", 6, "--exclude_same_labels")
    # Labels: no finding 0, 1, 6; effusion 2, 3; both 4; cardiomegaly 5.
    for rows in ((0, 1, 6), (2, 3), (4,), (5,)):
        for row in rows:
            assert set(index.neighbours[row].tolist()) - {-1} == set(range(7)) - set(rows)
    assert "5 of 7 training records share their labels" in capsys.readouterr().out


@pytest.mark.parametrize("seed", [0, 1])
def test_script_goes_by_the_overlap_of_labels(mine, seed):
    index, _ = mine(LABELLED + UNCLASSED, "--top_k", 6, "--text_encoder", "labels", "--seed", seed)
    assert index.neighbours[7:, 0].tolist() == [8, 7]
    assert set(index.neighbours[0, :2]) == {1, 6} and index.neighbours[2, 0] == 3
    # {effusion} against {effusion, cardiomegaly}: 1 / sqrt 2.
    assert index.neighbours[2, 1] == 4 and index.similarity[2, 1] == pytest.approx(2**-0.5, abs=1e-3)
    assert set(index.neighbours[4, :3]) == {2, 3, 5}


def test_script_draws_neighbours_at_random_by_seed(mine):
    def drawn(*flags):
        return mine([f"report number {i}" for i in range(60)], "--top_k", 3, "--text_encoder", "random", *flags)[0]

    first = drawn("--seed", 4)
    np.testing.assert_array_equal(first.neighbours, drawn("--seed", 4).neighbours)
    assert (first.neighbours != drawn("--seed", 5).neighbours).mean() > 0.8
    assert not (first.neighbours == np.arange(60)[:, None]).any()
    assert first.metadata["flags"]["seed"] == 4


def test_script_keeps_report_text_to_itself_on_request(mine, capsys):
    mine(REPORTS, "--examples", 0)
    printed = capsys.readouterr()
    assert not any(report in printed.out + printed.err for report in REPORTS)


@pytest.mark.parametrize("reports", [["No effusion."], ["No effusion."] * 4, ["...", "...", "!"]])
def test_script_survives_a_data_set_of_one_text(mine, capsys, reports):
    index, annotation = mine(reports, "--top_k", 3)
    index.check(annotation)
    assert (index.neighbours == -1).all() and index.neighbours.shape == (len(reports), 3)
    assert "no record has an admissible neighbour" in capsys.readouterr().out


def test_index_of_other_reports_is_refused_with_the_command(mine):
    index, _ = mine(REPORTS, "--top_k", 2)
    _, other = mine(REPORTS[::-1], "--top_k", 2)
    with pytest.raises(
        InputError, match="mine again: python scripts/mine_hard_negatives.py --ann_path .*--top_k 2"
    ) as e:
        dataclasses.replace(index, path="my index.safetensors").check(other)
    words = shlex.split(str(e.value).split("mine again: python scripts/mine_hard_negatives.py ")[1])
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert (given["--out"], given["--report_sections"]) == ("my index.safetensors", "")


def test_the_command_for_an_index_of_other_samples_mines_those_of_the_run(tmp_path, monkeypatch):
    """It had the flags of the old index, and made an index again that the run refused."""
    records = [
        {"id": f"s{n}", "report": report, "sections": {"impression": f"{report} {n}"}, "image_path": ["a.png"]}
        for n, report in enumerate(REPORTS)
    ]
    path, first, again = tmp_path / "annotation.json", tmp_path / "first.safetensors", tmp_path / "again.safetensors"
    path.write_text(json.dumps({"train": records}))  # mining needs no other split

    def mined(*argv):
        monkeypatch.setattr(sys, "argv", ["mine", *map(str, argv)])
        main()
        return HardNegativeIndex.load(argv[argv.index("--out") + 1])

    index = mined("--ann_path", path, "--out", first, "--text_encoder", "tfidf", "--device", "cpu", "--examples", 0)
    config = Config(report_sections="impression", captions=True, cleaner="any")
    samples = split_captions(with_sections(read_annotation(path, required_splits=("train",)), "impression")[0])
    with pytest.raises(InputError, match="mine again: ") as e:
        dataclasses.replace(index, path=str(again)).check(samples, config.mining_flags)
    words = shlex.split(str(e.value).split("mine_hard_negatives.py ")[1])
    mined(*words, "--device", "cpu", "--examples", 0).check(samples)


@pytest.mark.parametrize(
    "flags",
    [
        ("--top_k", 0),
        ("--batch_size", 0),
        ("--examples", -1),
        ("--memory_mb", 0),
        ("--device", "tpu"),
        ("--text_encoder", "./nowhere"),
        ("--seed", -1),
    ],
)
def test_script_names_the_flag_that_is_wrong(mine, flags):
    with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}"):
        mine(REPORTS, *flags)


def test_script_finds_out_early_that_it_cannot_write(mine, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder .*file' cannot be made"):
        mine(REPORTS, "--out", tmp_path / "file" / "below" / "negatives.safetensors")
    with pytest.raises(InputError, match="--out .*: is a folder"):
        mine(REPORTS, "--out", tmp_path)


def test_neighbours_are_of_other_patients_unless_a_flag_says_otherwise(tmp_path, capsys):
    """Two studies of one patient with nearly the same report; the program takes the data flags of a training."""
    from modules.data.annotations import read_annotation
    from scripts import mine_hard_negatives

    texts = ["the heart is large today", "the heart is large again", "clear lungs", "left rib fracture"]
    patients = ["a", "a", "b", None]
    rows = [
        {"id": str(n), "study_id": n, "report": text, "image_path": [f"{n}.png"]} | ({"subject_id": p} if p else {})
        for n, (text, p) in enumerate(zip(texts, patients, strict=True))
    ]
    path = tmp_path / "annotation.json"
    path.write_text(json.dumps({"train": rows, "val": [], "test": []}))

    def neighbours(*flags):
        argv = [
            "--ann_path",
            path,
            "--out",
            tmp_path / "index.safetensors",
            "--text_encoder",
            "tfidf",
            "--device",
            "cpu",
        ]
        argv += ["--image_dir", "images", "--max_views", 3, "--threshold", 1, *flags]
        arguments = mine_hard_negatives.build_parser().parse_args(list(map(str, argv)))
        index = mine_hard_negatives.mine(arguments, read_annotation(path, required_splits=("train",)))
        mine_hard_negatives.print_statistics(index)
        return index.neighbours[0].tolist()

    assert 1 not in neighbours()
    assert "2 of 4 training records share their patient with another: excluded" in capsys.readouterr().out
    assert neighbours("--include_same_patient")[0] == 1


def test_every_data_flag_is_taken_by_the_programs_that_read_the_data(demo, tmp_path, monkeypatch, capsys):
    """One variable of a shell script holds them: main_train.py, check_data.py and mining parse each with its value."""
    flags, items = [], [item for item in dataclasses.fields(Config) if item.metadata["group"] == "data"]
    items += [item for item in dataclasses.fields(Config) if item.name in ("tokenizer", "subword_vocabulary")]
    assert {"max_seq_length", "max_views", "threshold"} < {item.name for item in items}
    for item in items:
        default = {bool: "true", int: "1", float: "1.5"}.get(item.type, "x")
        choices = [choice for choice in item.metadata["choices"] or () if choice]
        flags += [f"--{item.name}", str(choices[0]) if choices else "true" if item.name == "captions" else default]
    train = build_parser("main_train.py", "").parse_args(flags)
    check = check_data.build_arguments().parse_args(flags)
    mined = mine_hard_negatives.build_parser().parse_args([*flags, "--out", str(tmp_path / "x")])
    for item in items:
        assert getattr(train, item.name) == getattr(check, item.name) and hasattr(mined, item.name)
    # What decides the texts is followed, not only taken: another cleaner finds other texts identical.
    (tmp_path / "annotation.json").write_text(
        json.dumps({"train": [{"id": str(n), "report": text, "image_path": ["x.png"]} for n, text in enumerate(TEXTS)]})
    )
    found = {}
    for cleaner in ("iu_xray", "any"):
        argv = f"mine --ann_path {tmp_path}/annotation.json --out {tmp_path}/{cleaner} --text_encoder tfidf"
        monkeypatch.setattr(sys, "argv", [*argv.split(), "--cleaner", cleaner])
        main()
        found[cleaner] = "2 of 3 training records share their cleaned text with another" in capsys.readouterr().out
    assert found == {"iu_xray": True, "any": False}


TEXTS = ("A, b: normal [x].", "A b normal x.", "Heart small.")
