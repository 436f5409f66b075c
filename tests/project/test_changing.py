"""What a researcher changes, done in a copy of the project by the places that the README names, and nothing else."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

from modules.mining.index import HardNegativeIndex
from tests.project.test_settings_are_read import unread_settings

ROOT = Path(__file__).resolve().parents[2]
# Runs commands of the project one after the other in one process, as importing torch takes longer than they do.
RUN_ALL = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
"""


class Project:
    """A copy of the project that a test may change."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("modules", "models", "scripts"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ROOT.glob("*.py"):
            shutil.copy(file, root)

    def insert(self, file: str, text: str, *, after: str) -> None:
        """Put ``text`` behind the one place of ``file`` where ``after`` stands."""
        path = self.root / file
        before = path.read_text(encoding="utf-8")
        assert before.count(after) == 1, f"{file}: {after!r} stands there {before.count(after)} times"
        path.write_text(before.replace(after, after + text), encoding="utf-8")

    def changed(self) -> list[str]:
        """The files that were changed or added."""
        names = sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*.py"))
        return [
            name
            for name in names
            if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != (self.root / name).read_bytes()
        ]

    def run(self, *commands: list) -> str:
        """What the commands (program, flag, value, ...) print; all of them must succeed."""
        words = json.dumps([[str(word) for word in command] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", RUN_ALL, words], capture_output=True, text=True, cwd=self.root, timeout=280
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def refusals(self, *commands: list) -> list[str]:
        """The one line with which each of the commands (program, flag, value, ...) refuses its flags."""
        words = json.dumps([[str(word) for word in command] for command in commands])
        catching = RUN_ALL.replace("if ended.code:", "if ended.code != 2:")
        done = subprocess.run(
            [sys.executable, "-c", catching, words], capture_output=True, text=True, cwd=self.root, timeout=280
        )
        lines = done.stderr.splitlines()
        assert done.returncode == 0 and len(lines) == len(commands), done.stdout + done.stderr
        return lines


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")


@pytest.mark.thorough
def test_a_text_encoder(project, demo):
    """One entry: known to the flags, and mined with."""
    project.insert(
        "modules/mining/text_encoders.py",
        '    "unlike": EncoderKind("directions of another seed", lambda options: RandomEncoder(options.seed + 1)),\n',
        after="TEXT_ENCODERS: dict[str, EncoderKind] = {\n",
    )
    mine = ["scripts/mine_hard_negatives.py", "--ann_path", demo / "annotation.json", "--device", "cpu"]
    shown = project.run(
        [*mine, "--text_encoder", "unlike", "--out", "unlike.safetensors"],
        [*mine, "--text_encoder", "random", "--seed", 1, "--out", "random.safetensors"],
        ["scripts/mine_hard_negatives.py", "--help"],
    )
    assert "unlike (directions of another seed)" in " ".join(shown.split())
    one, other = (HardNegativeIndex.load(project.root / f"{name}.safetensors") for name in ("unlike", "random"))
    assert one.metadata["flags"]["text_encoder"] == "unlike" and (one.neighbours == other.neighbours).all()


@pytest.mark.thorough
def test_a_data_set(project, demo):
    """One entry: known to the flags, checked, mined, trained on and scored, and named by the page and the record."""
    project.insert(
        "modules/data/dataset_specs.py",
        '    "chest": DataSpec("mimic_cxr", max_views=1, preset={"max_seq_length": 17}),\n',
        after="DATASETS: dict[str, DataSpec] = {\n",
    )
    data = ["--dataset_name", "chest", "--ann_path", demo / "annotation.json"]
    images = ["--image_dir", demo / "images"]
    mine = ["scripts/mine_hard_negatives.py", *data, "--text_encoder", "tfidf", "--out", "index.safetensors"]
    train = ["main_train.py", *data, *images, *TINY, "--backbone", "r2gencmn", "--epochs", 1]
    shown = project.run(
        ["main_train.py", "--help"],
        ["scripts/check_data.py", *data, *images, "--json", "check.json"],
        mine,
        [*train, "--save_dir", "run", "--negative_index", "index.safetensors"],
    )
    assert "chest, iu_xray" in " ".join(shown.split())
    assert json.loads((project.root / "check.json").read_text())["config"]["dataset_name"] == "chest"
    results = json.loads((project.root / "run" / "results.json").read_text())
    assert results["config"]["dataset_name"] == "chest" and results["test"]["model"]["BLEU_4"] is not None
    assert "ce_rule_f1_micro_14_uncertain_negative" in results["test"]["model"]
    assert "on chest" in (project.root / "run" / "report.html").read_text(encoding="utf-8")
    with open(project.root / "records" / "chest.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 2


WORDS = '''"""How many words a report has."""

import numpy as np


def per_report(references, hypotheses):
    """(N, 1) words of each of N reports."""
    return np.array([[len(text.split())] for text in hypotheses])
'''


@pytest.mark.thorough
def test_a_sentence_metric(project, demo):
    """A file and an entry: scored with its interval, monitored, on the page, plotted, recorded, tabled."""
    (project.root / "modules" / "evaluation" / "words.py").write_text(WORDS)
    project.insert(
        "modules/evaluation/metric_table.py",
        '    SentenceMetric("words", "words", (Score("words", "Words a report", "W", smaller_is_better=True),)),\n',
        after="SENTENCE_METRICS = (\n",
    )
    flags = [*TINY, "--monitor_metric", "words", "--ann_path", demo / "annotation.json"]
    flags = " ".join(map(str, [*flags, "--image_dir", demo / "images"]))
    (project.root / "sets.json").write_text(json.dumps({"drawn": {"flags": flags}}))
    row = {"name": "base", "flags": "--ithn off --epochs 1", "dataset": "drawn"}
    (project.root / "table.json").write_text(json.dumps({"seeds": [1], "rows": [row]}))
    shown = project.run(["scripts/run_experiments.py", "table.json", "--datasets", "sets.json", "--out", "runs"])
    assert "| W |" in shown and "| B-4 |" in shown
    run = project.root / "runs" / "base" / "seed1"
    results = json.loads((run / "results.json").read_text())
    scores, low_high = results["test"]["model"], results["intervals"]["model"]["words"]
    assert low_high[0] <= scores["words"] <= low_high[1] and scores["words"] == scores["words_full"] > 0
    assert scores["words"] == pytest.approx(results["variety"]["model"]["mean_length"])
    [epoch] = json.loads((run / "history.json").read_text())
    assert epoch["val_words"] > 0 and results["best_epoch"] == 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Words a report" in page
    assert 'aria-label="Words a report, METEOR, ROUGE-L and CIDEr on validation, by epoch"' in page
    with open(project.root / "runs" / "records" / "iu_xray.csv", newline="") as file:
        [line] = csv.DictReader(file)
    assert float(line["test_words"]) == pytest.approx(scores["words"])


@pytest.mark.thorough
def test_a_backbone_with_its_own_setting(project, demo):
    """Its file and the table: its flag, default, preset and shape are known to all programs."""
    own = (
        '    bag_width: int = setting(24, "Tiny", "width of the hidden state", low=1, shapes=True)\n'
        '    bag_path: str = setting("", "Tiny", "a file of this machine", file=True)\n'
    )
    text = (ROOT / "tests" / "bag_of_patches.py").read_text(encoding="utf-8")
    before, after = text.split(
        '    """Those that all backbones have; fields of its own would be flags of its own."""\n'
    )
    text = before + own + after.replace("settings.d_model", "settings.bag_width")
    text = text.replace(
        "\n\n\n@dataclass",
        '\nfrom modules.runtime.settings import setting\n\nPRESETS = {"*": {"bag_width": 12}}\n\n\n@dataclass',
        1,
    )
    (project.root / "models" / "tiny.py").write_text(text, encoding="utf-8")
    project.insert("models/__init__.py", '    "tiny": "models.tiny.BagOfPatches",\n', after="MODELS = {\n")

    data = ["--ann_path", demo / "annotation.json", "--image_dir", demo / "images"]
    train = ["main_train.py", *data, *TINY, "--epochs", 1, "--backbone", "tiny", "--save_dir"]
    best = "run/model_best.pth"
    shown = project.run(
        ["main_train.py", "--help"],
        [*train, "run", "--bag_path", "/nowhere"],
        ["main_test.py", "--load", best, *data, "--save_dir", "tested"],
        ["scripts/export.py", best, "--out", "shared"],
        ["scripts/export.py", "shared", "--out", "back.pth"],
        ["scripts/predict.py", "--load", "back.pth", "--json", "reports.json", demo / "images"],
    )
    assert "--bag_width INT" in shown and "width of the hidden state (default: 24)" in shown
    assert json.loads((project.root / "run" / "results.json").read_text())["config"]["bag_width"] == 12
    exported = json.loads((project.root / "shared" / "config.json").read_text())
    assert exported["bag_width"] == 12 and "bag_path" not in exported
    tested, trained = ((project.root / folder / "res.csv").read_text() for folder in ("tested", "run"))
    assert tested == trained
    lines = project.refusals(
        ["main_train.py", "--bag_width", 0],
        ["main_test.py", "--load", best, *data, "--bag_width", 10],
        [*train, "again", "--load", best, "--bag_width", 10],
    )
    assert "--bag_width 0: must be at least 1" in lines[0]
    contradiction = "error: --bag_width 10: contradicts checkpoint run/model_best.pth, which holds"
    assert all(line.startswith(contradiction) for line in lines[1:]), lines


UNIFORMITY = '''

def uniformity_loss(report: Tensor) -> Tensor:
    """log mean exp(-2 |u_i - u_j|^2) of the reports u (B, D), a scalar (Wang and Isola, 2020)."""
    return torch.pdist(report).square().mul(-2).exp().mean().log()
'''
UNIFORMITY_WEIGHT = """    uniformity_weight: float = setting(0.0, "ITHN", "weight of the uniformity", low=0.0)
"""


@pytest.mark.thorough
def test_a_weighted_loss_term(project, demo, demo_index):
    """Settings, losses and objective: in the help text, the loss, the log and the history; unused it is found."""
    project.insert(
        "modules/ithn/settings.py",
        UNIFORMITY_WEIGHT,
        after='"ITHN", "leave out off-diagonal pairs of the same study or the same text")\n',
    )
    assert unread_settings(project.root) == ["uniformity_weight"]
    losses = project.root / "modules" / "ithn" / "losses.py"
    losses.write_text(losses.read_text() + UNIFORMITY)
    for text, after in (
        ("    uniformity_loss,\n", "    token_nll,\n"),
        (', "uniformity": self.settings.uniformity_weight', '"cosine": self.settings.cosine_weight'),
        (
            '\n        terms["uniformity"] = uniformity_loss(u)',
            'terms["hardness"] = torch.zeros_like(scale) + hardness',
        ),
    ):
        project.insert("modules/ithn/objective.py", text, after=after)
    assert len(project.changed()) == 3 and not unread_settings(project.root)

    train = ["main_train.py", "--ann_path", demo / "annotation.json", "--image_dir", demo / "images", *TINY]
    # One step of all samples: its loss is the sum of the logged terms.
    train += ["--negative_index", demo_index, "--batch_size", 32, "--epochs", 1, "--save_dir", "run"]
    shown = project.run(["main_train.py", "--help"], [*train, "--uniformity_weight", 3])
    assert "--uniformity_weight FLOAT" in shown and "weight of the uniformity (default: 0.0)" in shown
    [row] = json.loads((project.root / "run" / "history.json").read_text())
    assert row["train_uniformity"] < 0 and "  uniformity " in (project.root / "run" / "train.log").read_text()
    weights = {"nll": 1, "contrastive": 0.1, "cosine": 0.2, "uniformity": 3}
    expected = sum(weight * row[f"train_{name}"] for name, weight in weights.items())
    assert row["train_loss"] == pytest.approx(expected, rel=1e-5)


MIDPOINT = '''def midpoint(image: Tensor, report: Tensor, negative: Tensor, hardness: float) -> Tensor:
    """The mean of u~ and u, (B, D)."""
    return (report + negative) / 2


'''


@pytest.mark.thorough
def test_a_synthesis_strategy(project, demo, demo_index):
    """A function and a line of the table, in one file: --strategy, its help text and the probes know it."""
    path = project.root / "modules" / "ithn" / "synthesis.py"
    text = path.read_text()
    table, first = "@dataclass(frozen=True)\nclass Strategy:", "STRATEGIES: dict[str, Strategy] = {\n"
    line = '    "midpoint": Strategy(midpoint, "halfway to the report"),\n'
    path.write_text(text.replace(table, MIDPOINT + table).replace(first, first + line))
    assert len(project.changed()) == 1

    train = ["main_train.py", "--ann_path", demo / "annotation.json", "--image_dir", demo / "images", *TINY]
    train += ["--negative_index", demo_index, "--epochs", 1, "--keep_epochs", "true", "--save_dir", "run"]
    probe = ["scripts/research/inspect_negatives.py", "--load", "run/epoch_0001.pth", "--out", "negatives"]
    shown = project.run(
        ["main_train.py", "--help"], [*train, "--strategy", "midpoint"], [*probe, "--lambdas", 0.5, "--device", "cpu"]
    )
    assert "{midpoint,ithn," in shown and "midpoint: halfway to the report;" in " ".join(shown.split())
    assert json.loads((project.root / "run" / "results.json").read_text())["config"]["strategy"] == "midpoint"
    [row] = json.loads((project.root / "run" / "history.json").read_text())
    # Other strategies take no step in the first epoch, whose hardness is 0.
    assert row["train_cos_harder"] != pytest.approx(row["train_cos_negative"], rel=1e-3)
    assert "midpoint" in (project.root / "negatives" / "negatives.md").read_text()
