"""The benchmarks at tiny sizes: they run, write what was measured with the machine, and refuse sizes that cannot be."""

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
torch.set_num_threads(1)
STEP = "--visual_extractor resnet18 --image_size 32 --batch_size 2 --max_seq_length 6 --vocab_size 20"
GIVEN = "--visual_extractor none --patches 3 --vocab_size 20"
SEARCH = "--patches 3 --vocab_size 20 --batch_size 2"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(name, "--flags")`` is the JSON file that benchmarks/<name>.py writes."""
    monkeypatch.setattr("benchmarks.measurement.PRODUCT_SIDE", 64)

    def measured(name, flags):
        out = tmp_path / f"{name}.json"
        monkeypatch.setattr(
            sys, "argv", ["benchmark", *flags.split(), "--threads", "1", "--rounds", "2", "--out", str(out)]
        )
        importlib.import_module(f"benchmarks.{name}").main()
        result = json.loads(out.read_text())
        assert result["benchmark"] == name and result["threads"] == 1 and result["clock"] in ("wall", "cpu")
        assert result["device_name"] and result["packages"]["torch"] and result["settings"]["rounds"] == 2
        return result

    return measured


@pytest.mark.thorough
def test_training_step(run, capsys):
    plain, ithn = run("train_step", STEP + " --clock cpu")["results"]
    assert set(plain["seconds"]) == {"step", "forward", "backward", "optimiser", "visual extractor alone"}
    assert set(ithn["seconds"]) == {*plain["seconds"], "loss module alone"}
    assert all(len(values) == 2 and min(values) > 0 for values in ithn["seconds"].values())
    # Twice the images and words; the memory is projected once, and the negatives have no logits.
    assert plain["flops"] < ithn["flops"] < 2 * plain["flops"]
    for step, *parts in zip(
        *(plain["seconds"][name] for name in ("step", "forward", "backward", "optimiser")), strict=True
    ):
        assert step == pytest.approx(sum(parts), rel=0.05)
    shown = capsys.readouterr().out
    assert "loss module's share of the step" in shown and "ANOTHER machine" in shown and "images/s" in shown


@pytest.mark.parametrize("name", ["train_step", "fault_campaign"])
def test_a_file_of_another_kind_stays(tmp_path, monkeypatch, name):
    out = tmp_path / "annotation.json"
    out.write_text('{"train": []}')
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out)])
    with pytest.raises(InputError, match=r"annotation\.json: already exists and is not a result of a"):
        importlib.import_module(f"benchmarks.{name}").main()
    assert out.read_text() == '{"train": []}'


@pytest.mark.thorough
def test_memory_and_scaling(run, capsys):
    found = run("cluster", STEP.replace("--batch_size 2", "--batch_size 6") + " --gpus 1 8 64 --views 1")
    one, eight, many = found["scaling"]
    parameters = found["counted"]["2"]["visual extractor"] + found["counted"]["2"]["everything else"]
    assert found["memory_gib"]["gradients"] * 2**30 == 4 * parameters
    assert one["sent"] == 0 and eight["sent"] == 7 / 4 * 4 * parameters
    assert 1 == one["without overlap"] > eight["without overlap"] > many["without overlap"]
    # On the line through 2 and 3 samples: 6 samples take 4 steps more.
    low, high = (found["counted"][size]["operations"] for size in ("2", "3"))
    assert found["operations"] == low + 4 * (high - low) and "FSDP over 8 GPUs would save" in capsys.readouterr().out
    half = run("cluster", STEP + " --views 1 --precision bfloat16")
    whole, half = (case["counted"]["3"]["kept"] - case["counted"]["2"]["kept"] for case in (found, half))
    assert whole / 2 < half < 0.8 * whole  # of a sample more


@pytest.mark.slow  # three processes start
def test_step_in_two_processes(run, capsys):
    found = run("processes", STEP + " --views 1")
    assert set(found["several"]) == {"step", "step without all-reduce", "all-reduce alone"}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in (found["one"], *found["several"].values()))
    assert found["sent"] > 4 * 11e6  # ResNet-18 and more
    assert 0 < found["calculated"]["no overlap"] < found["calculated"]["overlap"] <= 1
    assert "2 processes: all-reduce alone" in capsys.readouterr().out


@pytest.mark.thorough
def test_training_step_in_all_combinations(run):
    found = run("train_step", GIVEN + " --strategy off contrastive --batch_size 1 --max_seq_length 5 9")["results"]
    sizes = [(one["max_seq_length"], one["strategy"]) for one in found]
    assert sizes == [(5, "off"), (5, "contrastive"), (9, "off"), (9, "contrastive")]
    assert found[0]["flops"] < found[2]["flops"] and found[1]["flops"] < found[3]["flops"]


@pytest.mark.thorough
@pytest.mark.parametrize("model", ["r2gen", "r2gencmn"])
def test_generation(run, model):
    (found,) = run("generate", f"{SEARCH} --model_name {model} --beam_size 2 --max_seq_length 7")["results"]
    assert len(found["step_seconds"]) == 7 and sum(found["step_seconds"]) < 2 * max(found["seconds"])
    assert found["flops"] > 0 and found["peak_mib"] > 0


def test_images(run, capsys):
    (found,) = run("images", "--size 40 --images 3 --format jpeg --channels RGB")["results"]
    assert found["bit_equal"] and "give the same bits" in capsys.readouterr().out
    assert {"torchvision", "ours, decoding", "image cache", "image cache, as bytes"} < set(found["seconds"])


def test_mining(run):
    (found,) = run("mine", "--rows 64 --width 16 --plain true")["search"]
    assert len(found["search_seconds"]) == len(found["plain_seconds"]) == 2 and found["product_flops"] > 0


def test_two_backbones(run):
    found = run(
        "r2gen_step",
        "--batch_size 2 --patches 4 --image_dim 8 --d_model 16 --num_layers 1 --vocab_size 20 --max_seq_length 6",
    )
    assert {"r2gen step", "r2gencmn generation", "memory by hand step"} <= set(found["seconds"])


@pytest.mark.thorough
def test_what_is_trained_of_the_extractor(run):
    found = run("unfreeze", f"{STEP} --views 1")
    assert set(found["seconds"]) == set(found["full_over"]) == {"all", "last:1", "last:1, stored"}


def test_backbone_and_baseline(run):
    sizes = "--batch_size 2 --regions 2 3 --max_seq_length 5 --vocab_size 20 --memory 4"
    found = run("decoder_baseline", sizes)
    assert set(found["ratios"]) == {"2", "3"} and len(found["seconds"]) == 4


@pytest.mark.thorough
def test_start_up(run):
    found = run("startup", "--programs main_train.py --clock cpu")
    assert set(found["seconds"]) == {"main_train.py --help", "python alone", "import torch"}
    with pytest.raises(InputError, match="absent.py --help ended with 2"):
        run("startup", "--programs absent.py")


@pytest.mark.slow  # Java takes some seconds to start
def test_evaluation(run):
    (found,) = run("evaluate", "--reports 20 --clock cpu")["results"]
    assert found["java_starts"] == 1
    assert found["seconds"]["METEOR"][0] > 0.5 * found["seconds"]["all"][0]


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train_step", "--batch_size 4 0", "--batch_size 0: must be 1 or more"),
        ("generate", "--threads 0", "--threads 0: must be 1 or more"),
        ("mine", "--rows 5 --text_encoder tfidf", "--text_encoder and --ann_path go together"),
        ("evaluate", "--reports 0", "--reports 0: must be 1 or more"),
        ("processes", "--processes 1", "--processes 1: must be 2 or more"),
        ("images", "--device tpu", "--device tpu: must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_cannot_be_measured_is_one_line(name, flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags.split()])
    with pytest.raises(InputError, match=message):
        importlib.import_module(f"benchmarks.{name}").main()


def test_plots(tmp_path):
    from benchmarks.plot import PANELS, draw

    with pytest.raises(InputError, match="train_step_batches.json cannot be read"):
        draw(tmp_path)
    head = {"device_name": "a processor", "threads": 1, "clock": "wall", "packages": {"torch": "2"}}
    for name, size, *_ in PANELS:
        rows = [
            {
                size: value,
                "seconds": {"step": [value, value + 1.0]},
                "search_seconds": [float(value)],
                "step_seconds": [0.1] * 5,
            }
            for value in (1, 2, 4)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(head | {"search" if name == "mine" else "results": rows}))
    (tmp_path / "generate.json").write_text(json.dumps(head | {"results": rows}))
    assert draw(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_tables(run, tmp_path):
    """The page names the public code and an epoch of MIMIC-CXR only beside a step of the published sizes."""
    from benchmarks.tables import write

    with pytest.raises(InputError, match="holds none of the JSON files"):
        write(tmp_path)
    run("train_step", GIVEN + " --strategy off --batch_size 1 --max_seq_length 5")
    page = write(tmp_path).read_text()
    assert "features given" in page and "MIMIC-CXR" not in page
    result = json.loads((tmp_path / "train_step.json").read_text())
    published = {"batch_size": 16, "max_seq_length": 60, "seconds": {"step": [8.0]}, "flops": 32e9}
    result["results"] = [result["results"][0] | published]
    (tmp_path / "train_step.json").write_text(json.dumps(result))
    page = write(tmp_path).read_text()
    assert "270,790 images x 0.250 s = 18.8 hours" in page and "1.0 GFLOP per image x 270,790 = 0.27 PFLOP" in page
    assert "| public code, another machine | 27.7 | 150 |" in page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_that_the_page_shows_is_made_by_one_command(tmp_path):
    subprocess.run(
        ["bash", "benchmarks/run_all.sh", str(tmp_path), "--clock", "cpu"],
        cwd=ROOT,
        check=True,
        timeout=880,
        env=os.environ | {"QUICK": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )
    assert len(list(tmp_path.glob("*.json"))) == 15 and (tmp_path / "growth.png").is_file()
    page = (tmp_path / "tables.md").read_text()
    assert "## Beam search" in page and "1 Java process: METEOR" in page and "DIFFERENT" not in page


def test_feature_cache(tmp_path, monkeypatch, capsys):
    from benchmarks import feature_cache

    monkeypatch.setattr(feature_cache, "get_context", lambda kind: multiprocessing.get_context("fork"))
    argv = "--visual_extractor resnet18 --image_size 32 --batch_size 2 --count 6 --rounds 1 --out".split()
    monkeypatch.setattr(sys, "argv", ["benchmark", *argv, str(tmp_path / "out.json")])
    feature_cache.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["images"] == 6 and result["resumed"]["equal"] and result["settings"]["images"] == "synthetic"
    kinds = result["kinds"]
    assert [row["seen"] for rows in kinds.values() for row in rows] == [6, 6, 6]
    assert "equal to the bit" in capsys.readouterr().out


def test_memory_of_large_decoders(run):
    whole, adapted = run("large_decoders", "--decoders tiny --gpus 4 --batch_size 2 --lora_rank 2")["rows"]
    assert whole["learning"] == whole["parameters"] < adapted["parameters"] and adapted["recomputed"] < adapted["kept"]
    # Weights and, of what learns, gradients and two moments.
    for row in (whole, adapted):
        copied = 4 * (row["parameters"] + 3 * row["learning"]) / 2**30
        assert row["gib"]["copied"] == pytest.approx(copied) == pytest.approx(4 * row["gib"]["shared out"])
    # Queries and values of two layers of width 16, the latter with one of two heads; and the projection.
    assert adapted["learning"] == 2 * 2 * (16 + 16 + 16 + 8) + (768 + 1) * 16 + 2 * 16
