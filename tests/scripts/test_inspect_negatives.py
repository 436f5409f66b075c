"""Where synthesised negatives lie: hand-made banks, moved hidden states, and the script on a trained model."""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.ithn.losses import normalise
from modules.ithn.synthesis import SYNTHESISED
from modules.runtime.errors import InputError
from scripts.research import inspect_negatives
from scripts.research.negative_positions import Bank, harder_negatives, moves, nearest, positions, similarities
from scripts.research.negative_readings import agreement, changed, read
from scripts.research.negative_tables import to_markdown
from tests.tiny_backbone import make_objective, tiny_batch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "research" / "inspect_negatives.py"


def at(*degrees):
    """Unit vectors (N, 2) at these angles."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def chord(degrees):
    """Distance between unit vectors this far apart."""
    return 2 * math.sin(math.radians(degrees) / 2)


@pytest.fixture
def bank():
    """Reports at 0, 10, 40 and 90 degrees, the last two of one text; 0 has the negative 90, and 90 has 10."""
    return Bank(
        image=at(20, 0, 0, 60),
        report=at(0, 10, 40, 90),
        key=torch.tensor([5, 6, 7, 7]),
        anchor=torch.tensor([0, 3]),
        negative=torch.tensor([3, 1]),
    )


def embedded(seed=0):
    """A model with embedding 5 of width 7, its batch, and the bank in which each sample's negative is the next one."""
    objective = make_objective(seed).eval()
    batch = tiny_batch([5, 9, 4, 7], None)
    with torch.no_grad():
        found = objective.embed(batch.positive)
    rows = torch.arange(4)
    return objective, batch, found, Bank(found.image, found.report, rows, rows, rows.roll(1))


def test_numbers_of_a_bank_made_by_hand(bank):
    found = similarities(bank)
    # To the nearest of another text: 0-10, 10-0, 40-10, 90-10.
    assert found["distance_between_real"]["median"] == pytest.approx((chord(10) + chord(30)) / 2)
    assert found["distance_between_real"]["mean"] == pytest.approx(np.mean([chord(x) for x in (10, 10, 30, 80)]))
    assert found["distance_to_negative"]["mean"] == pytest.approx((chord(90) + chord(80)) / 2)
    cosines = [math.cos(math.radians(x)) for x in (20, 30, 70, 50)]
    assert found["cos_positive"]["mean"] == pytest.approx((cosines[0] + cosines[1]) / 2)
    assert found["cos_negative"]["mean"] == pytest.approx((cosines[2] + cosines[3]) / 2)
    # The image at 20 is nearest to the report at 10; that at 60 to 40, which is of the same text as its own at 90.
    assert found["retrieval_accuracy"] == 0.5

    where = positions(bank, at(5.5, 60))
    assert where["distance"]["mean"] == pytest.approx((chord(4.5) + chord(20)) / 2)
    assert where["nearest"] == {"u": 0.5, "negative": 0.0, "other": 0.5}
    assert where["cos_harder"]["mean"] == pytest.approx((math.cos(math.radians(14.5)) + 1) / 2)
    # 39 degrees is nearest to the report at 40: the text of the first anchor's negative.
    assert positions(bank, at(39, 11))["nearest"] == {"u": 0.0, "negative": 1.0, "other": 0.0}


def test_a_bank_of_one_text_has_no_other_report(bank):
    one = replace(bank, key=torch.zeros(4, dtype=torch.int64))
    assert nearest(one.report, one.key, one)[0].isinf().all()


@pytest.mark.parametrize("strategy", SYNTHESISED)
def test_without_hardness_every_negative_is_the_prior_one(strategy):
    objective, batch, found, bank = embedded()
    harder = harder_negatives(bank, strategy, 0.0)
    where = positions(bank, harder)
    assert where["nearest"] == {"u": 0.0, "negative": 1.0, "other": 0.0}
    assert where["distance"]["q3"] < 1e-12
    states = [found.hidden[row][batch.positive.token_mask[row, 1:]] for row in bank.negative]
    shift = moves(
        harder - bank.report[bank.negative],
        found.mean[bank.negative],
        objective.text_projection.linear1.weight.detach(),
    )
    layer = objective.backbone.log_probs
    assert changed(read(layer, states), read(layer, states, shift)) == 0


def test_mochi_with_full_hardness_is_the_report_itself():
    *_, bank = embedded()
    where = positions(bank, harder_negatives(bank, "mochi", 1.0))
    assert where["nearest"]["u"] == 1 and where["distance"]["q3"] < 1e-12


def test_the_segment_keeps_the_projection_between_the_reports():
    # z lies beyond u = 0 degrees as seen from u- = 90: on the line p overshoots u, on the segment it is u.
    bank = Bank(at(-60, 0), at(0, 90), torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([1]))
    torch.testing.assert_close(harder_negatives(bank, "ithn", 1.0, clamp_segment=True), at(0))
    assert harder_negatives(bank, "ithn", 1.0)[0, 1] < -0.1


@pytest.mark.parametrize("strategy", SYNTHESISED)
def test_moved_states_project_to_the_harder_negative(strategy):
    objective, batch, found, bank = embedded()
    harder = harder_negatives(bank, strategy, 0.7)
    weight = objective.text_projection.linear1.weight.detach()
    mean = found.mean[bank.negative]
    shift = moves(harder - bank.report[bank.negative], mean, weight)
    for row, negative in enumerate(bank.negative):
        states = found.hidden[negative][batch.positive.token_mask[negative, 1:]] + shift[row]
        torch.testing.assert_close(normalise(weight @ states.mean(0)), harder[row], rtol=0, atol=1e-10)
    # The shortest such shift: it has no part that the projection does not see.
    unseen = torch.linalg.svd(weight).Vh[len(weight) :]
    assert (shift @ unseen.T).abs().max() < 1e-10 and shift.abs().max() > 1e-2


def test_embedding_is_what_the_loss_sees():
    _, batch, found, _ = embedded()
    terms = make_objective(0, strategy="contrastive").eval()(batch, 1)
    torch.testing.assert_close(terms["cos_positive"], (found.image * found.report).sum(1).mean())


def test_reading_takes_every_position_once():
    table = torch.tensor([[0.0, 0, 5], [0, 5, 0]], dtype=torch.float64)  # state (1, 0) says word 2, (0, 1) word 1
    layer = lambda hidden: (hidden @ table).log_softmax(-1)  # noqa: E731
    hidden = [torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[:1]]
    before = read(layer, hidden)
    assert [words.tolist() for words in before.words] == [[2, 1], [2]]
    assert before.probability == pytest.approx(math.exp(5) / (math.exp(5) + 2))
    after = read(layer, hidden, torch.tensor([[0.0, 0], [-1, 1]], dtype=torch.float64))
    assert [words.tolist() for words in after.words] == [[2, 1], [1]]
    assert changed(before, after) == pytest.approx(1 / 3)


def test_agreement_counts_positive_labels():
    from modules.labels.labeler import label_reports

    reference = label_reports(["there is a left pneumothorax .", "the heart is enlarged .", "the lungs are clear ."])
    assert agreement(reference, ["left pneumothorax .", "the heart is enlarged .", "normal ."]) == (1, 1)
    # Three and two true labels. Of senseless words each report gets No Finding, right once.
    whole, findings = agreement(reference, ["the of the", "the of the", "the of the"])
    assert whole == pytest.approx(1 / 3) and findings == 0
    whole, findings = agreement(reference, ["left pneumothorax .", "the of the", "the of the"])
    assert whole == pytest.approx(2 / 3) and findings == pytest.approx(2 / 3)


# ---- the script


def inspect(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        timeout=600,
    )


@pytest.fixture(scope="module")
def run(demo, demo_index, tmp_path_factory):
    """Results folder of two epochs, a checkpoint of each."""
    from modules.flags import parse_flags
    from modules.run.training import run_training
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("manifold")
    argv = [
        "--ann_path",
        demo / "annotation.json",
        "--image_dir",
        demo / "images",
        "--negative_index",
        demo_index,
        "--epochs",
        2,
        "--alpha",
        0.5,
        "--keep_epochs",
        "true",
        "--save_dir",
        folder / "run",
        "--record_dir",
        folder / "records",
        *TINY,
        "--beam_size",
        1,
    ]
    run_training(*parse_flags([str(part) for part in argv], "main_train.py", ""))
    return folder / "run"


@pytest.mark.thorough
def test_script_writes_numbers_for_every_epoch_and_hardness(run, demo, tmp_path):
    done = inspect(
        "--load", run / "epoch_0002.pth", run / "epoch_0001.pth", "--out", tmp_path / "out", "--lambdas", 0, 1
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "negatives.json").read_text())
    assert [epoch["epoch"] for epoch in found["epochs"]] == [1, 2]
    assert [epoch["hardness"] for epoch in found["epochs"]] == pytest.approx([0, 1 - math.exp(-0.5)])
    assert found["synthetic"] and found["bank"] >= found["anchors"] > 0
    assert {"created", "git", "packages"} <= set(found["provenance"])
    for epoch in found["epochs"]:
        assert len(epoch["synthesised"]) == 3 * 3
        for entry in epoch["synthesised"]:
            assert sum(entry["nearest"].values()) == pytest.approx(1)
            assert entry["decoder"]["reached"]["q1"] == pytest.approx(1, abs=1e-5)
            if entry["hardness"] == 0:
                assert entry["nearest"]["negative"] == 1 and entry["decoder"]["words_changed"] == 0
                assert entry["decoder"]["f1_u"] == epoch["reading_of_negative"]["f1_u"]
        full = next(e for e in epoch["synthesised"] if e["strategy"] == "mochi" and e["hardness"] == 1)
        assert full["nearest"]["u"] == 1 and full["distance"]["median"] < 1e-9
    text = (tmp_path / "out" / "negatives.md").read_text()
    assert text == to_markdown(
        found["epochs"],
        title=text.splitlines()[0].removeprefix("# "),
        notes=[line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")],
    )
    reports = [study["report"] for study in json.loads((demo / "annotation.json").read_text())["train"]]
    for name in ("negatives.json", "negatives.md", "negatives.png"):
        path = tmp_path / "out" / name
        assert path.stat().st_mode & 0o777 == 0o600
        assert not any(report[:30].encode() in path.read_bytes() for report in reports)
    inspect_negatives.check(argparse.Namespace(out=str(tmp_path / "out")))  # they may be replaced by a second run
    (tmp_path / "out" / "negatives.json").write_text("{}")
    with pytest.raises(InputError, match=r"negatives\.json: already exists and is not an output of this program"):
        inspect_negatives.check(argparse.Namespace(out=str(tmp_path / "out")))


def test_chosen_records_bring_their_negatives():
    from modules.mining.index import HardNegativeIndex
    from scripts.research.negative_bank import choose_records

    neighbours = np.array([[3, 1], [4, 0], [-1, -1], [0, 4], [0, 1]], dtype=np.int32)
    index = HardNegativeIndex(neighbours, neighbours.astype(np.float32), {})
    rows, negatives = choose_records(index, None, 0)
    assert rows == [0, 1, 2, 3, 4] and negatives.tolist() == [3, 4, -1, 0, 0]
    sizes = set()
    for seed in range(20):
        drawn = np.random.default_rng(seed).permutation(5)[:2].tolist()
        rows, negatives = choose_records(index, 2, seed)
        found = {rows[i]: rows[negative] for i, negative in enumerate(negatives) if negative >= 0}
        assert found == {row: neighbours[row, 0] for row in drawn if row != 2}  # record 2 has no neighbour
        assert set(rows) == set(drawn) | set(found.values())
        sizes.add(len(rows))
    assert sizes == {2, 3, 4}


@pytest.mark.thorough
def test_wrong_checkpoints_are_named_in_a_line(run, tmp_path):
    from modules.runtime.errors import InputError
    from scripts.research.negative_bank import Inspection

    content = torch.load(run / "epoch_0001.pth", weights_only=True)

    def saved(name, **changes):
        torch.save(content | changes, tmp_path / name)
        return str(tmp_path / name)

    first = str(run / "epoch_0001.pth")
    contrastive = saved(
        "c.pth", strategy="contrastive", config=content["config"] | {"strategy": "contrastive", "negative_index": ""}
    )
    plain = saved(
        "p.pth",
        state_dict={
            name: value for name, value in content["state_dict"].items() if not name.startswith("img_projection.")
        },
    )
    encoder = saved(
        "e.pth",
        strategy="contrastive",
        config=content["config"] | {"strategy": "contrastive", "contrastive_features": "encoder"},
    )
    other = saved("o.pth", epoch=2, config=content["config"] | {"alpha": 0.1})
    for paths, words in (
        ([contrastive], "strategy contrastive); give --negative_index"),
        ([plain], "--ithn off"),
        ([encoder], "no negative is synthesised"),
        ([first, other], "alpha is 0.1, that of"),
        ([first, saved("same.pth")], "of epoch 1, as"),
    ):
        with pytest.raises(InputError, match="^--load ") as caught:
            Inspection(paths, {}, None)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    # With an index a run that was trained without one can be looked at.
    index = content["config"]["negative_index"]
    assert len(Inspection([contrastive], {"negative_index": index}, None).anchor)
