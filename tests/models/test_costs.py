"""What must not become slower, pinned by counts that no machine changes: operations, passes, bytes, waits, starts."""

import json
import os
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measurement import operations as counted
from models.r2gencmn import R2GenCMN, Settings
from modules.data.batches import Batch, Pair
from modules.decoding.options import DecodingOptions
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.layers.cross_modal_memory import SCORES_AT_ONCE, topk_attention
from modules.layers.visual_extractor import VisualExtractor
from modules.training.optimizers import build_optimizer
from modules.training.settings import OptimSettings

torch.set_num_threads(1)
B, N, T, WORDS = 3, 2, 9, 11
SIZES = {"d_model": 16, "d_ff": 24, "num_heads": 2, "num_layers": 2, "topk": 4, "cmm_size": 64, "cmm_dim": 16}


class GivenFeatures(nn.Module):
    """Stands for an extractor of 5 patches a view, 12 wide."""

    width = 12

    def forward(self, features, view_mask):
        return features.flatten(1, 2), None, features.flatten(1, 2).mean(1)


class Counted(nn.Module):
    """A trunk that notes how many images each of its passes sees."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 12, 8, stride=8)
        self.images = []

    def forward(self, images):
        self.images.append(len(images))
        return self.convolution(images)


class Watch(TorchDispatchMode):
    """Notes every operation's name and the bytes of its largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for value in result if isinstance(result, (tuple, list)) else [result]:
            # A view holds nothing of its own.
            if isinstance(value, torch.Tensor) and value._base is None:
                self.largest = max(self.largest, value.untyped_storage().nbytes())
        return result


def pair(shape, views=N):
    tokens = torch.randint(1, WORDS, (B, T))
    tokens[:, 0] = tokens[:, -1] = 0
    return Pair(
        torch.randn(B, views, *shape),
        torch.ones(B, views, dtype=torch.bool),
        tokens,
        torch.ones(B, T, dtype=torch.bool),
    )


def batch(shape, negatives):
    rows = torch.arange(B)
    return Batch(
        pair(shape), pair(shape) if negatives else None, torch.ones(B, dtype=torch.bool), rows, rows, [""] * B, [""] * B
    )


def objective(extractor, strategy):
    torch.manual_seed(0)
    model = R2GenCMN(visual_extractor=extractor, num_ids=WORDS, settings=Settings(**SIZES))
    return Objective(model, ITHNSettings(strategy=strategy, embedding_dim=8)).train()


def linear_operations(rows, patches):
    """Multiplications and additions of R2GenCMN's forward pass for reports of T - 1 inputs, written out by hand."""
    d, ff, layers, slots = SIZES["d_model"], SIZES["d_ff"], SIZES["num_layers"], SIZES["cmm_size"]
    seen, words = rows * patches, rows * (T - 1)
    memory = 2 * slots * d * d + (seen + words) * (2 * d * d + slots * d)  # keys and values; query, output, all scores
    encoder = layers * seen * (4 * d * d + 2 * patches * d + 2 * d * ff)
    decoder = layers * words * (4 * d * d + 2 * (T - 1) * d + 2 * d * d + 2 * patches * d + 2 * d * ff)
    sources = layers * seen * 2 * d * d
    return 2 * (seen * 12 * d + memory + encoder + decoder + sources + words * d * WORDS)


def test_a_forward_pass_computes_what_the_equations_need_and_no_more():
    own, given = objective(GivenFeatures(), "off").eval(), batch((5, 12), False)
    with torch.no_grad():
        assert counted(lambda: own(given, 1)) == linear_operations(B, N * 5)


def test_a_backward_pass_costs_at_most_twice_the_forward_pass():
    own, given = objective(GivenFeatures(), "off"), batch((5, 12), False)
    forward = counted(lambda: own(given, 1))
    both = counted(lambda: own(given, 1)["loss"].backward())
    # Neither the scores against the whole memory nor the given features need a gradient.
    scores = 2 * B * (N * 5 + T - 1) * SIZES["cmm_size"] * SIZES["d_model"]
    embedding = 2 * B * N * 5 * 12 * SIZES["d_model"]
    assert both <= 3 * forward - 2 * scores - embedding


def test_ithn_adds_its_projections_and_similarities_to_the_pass_over_both_pairs():
    negatives = batch((5, 12), True)
    own = objective(GivenFeatures(), "ithn")
    d, embedding = SIZES["d_model"], 8
    projections = 2 * 2 * B * (12 + d) * embedding
    similarities = 4 * 2 * B * B * embedding  # S1, S2, S3, and the nearest report that is logged
    words = 2 * B * (T - 1) * d * WORDS  # of the negatives, which are not supervised
    memory = 2 * 2 * SIZES["cmm_size"] * d * d  # projected once, however many rows there are
    with torch.no_grad():
        own.eval()
        network = linear_operations(2 * B, N * 5) - words
        assert counted(lambda: own(negatives, 1)) == network + projections + similarities
        assert network < 2 * linear_operations(B, N * 5) - memory / 2


@pytest.mark.parametrize(("strategy", "images"), [("off", B * N), ("contrastive", B * N), ("ithn", 2 * B * N)])
def test_every_image_passes_the_extractor_once_and_all_together(strategy, images, monkeypatch):
    trunk = Counted()
    extractor = VisualExtractor("resnet18", image_size=32)
    extractor.model = trunk
    extractor.width, extractor.patches_per_view = 12, 16
    own = objective(extractor, strategy)
    own(batch((3, 32, 32), strategy == "ithn"), 1)["loss"].backward()
    assert trunk.images == [images]
    trunk.images.clear()
    with torch.no_grad():
        features = own.backbone.extract(torch.randn(B, N, 3, 32, 32), torch.ones(B, N, dtype=torch.bool))
        own.backbone.generate(None, features=features, decoding=DecodingOptions(max_seq_length=5))
    assert trunk.images == [B * N]


@pytest.mark.parametrize("training", [False, True])
def test_the_memory_is_read_without_a_copy_of_the_slots_for_every_query(training):
    queries, slots, heads, width, k = 640, 256, 2, 64, 32
    query, keys, values = (torch.randn(rows, heads, width, requires_grad=True) for rows in (queries, slots, slots))
    with Watch() as watch:
        answer = topk_attention(query, keys, values, k, 0.1 if training else 0.0)
        if training:
            answer.sum().backward()
    copied = queries * heads * k * width * 4  # what gathering the chosen rows would hold
    scores = queries * heads * slots * 4
    assert queries * heads * slots <= SCORES_AT_ONCE["cpu"]
    assert watch.largest <= scores < copied / 4


def test_scores_against_the_memory_are_held_a_block_at_a_time(monkeypatch):
    monkeypatch.setitem(SCORES_AT_ONCE, "cpu", 2**12)
    query, keys, values = (torch.randn(rows, 2, 8) for rows in (640, 256, 256))
    with Watch() as watch:
        topk_attention(query, keys, values, 4)
    assert watch.largest < 640 * 2 * 256 * 4 / 10


@pytest.mark.parametrize("strategy", ["off", "ithn"])
def test_a_step_waits_for_the_device_never(strategy):
    """Reading a number out of a tensor stalls a GPU. The mask of views is read too, but stays on the CPU."""
    own, given = objective(GivenFeatures(), strategy), batch((5, 12), strategy == "ithn")
    optimizer = build_optimizer(own, OptimSettings(lr_ve=1e-3, lr_ed=1e-3, weight_decay=0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with Watch() as watch:
        scaler.scale(own(given, 1, token_count=torch.tensor(20))["loss"]).backward()
        scaler.step(optimizer)
        own.after_step()
    waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "masked_select"}
    assert waits.isdisjoint(watch.names)


@pytest.mark.thorough
def test_a_whole_run_starts_java_once(train, tmp_path, monkeypatch):
    """Validation of every epoch, then the test of the model and of both baselines, against both forms of references."""
    java, log = tmp_path / "bin" / "java", tmp_path / "starts"
    java.parent.mkdir()
    java.write_text(
        f"#!{sys.executable} -IS\nimport sys\nprint('started', file=open({str(log)!r}, 'a'))\n"
        "for line in sys.stdin:\n"
        "    print('2 3 0 0 2 2', '0 ' * 14, '1 2 2', flush=True)\n"
    )
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{java.parent}{os.pathsep}{os.environ['PATH']}")
    folder = train("--meteor", "true", "--epochs", 2)
    assert log.read_text() == "started\n"
    assert all(
        scores["METEOR"] == pytest.approx(0.3352, abs=1e-4)
        for scores in json.loads((folder / "results.json").read_text())["test"].values()
    )
