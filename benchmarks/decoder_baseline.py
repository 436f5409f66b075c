"""A training step of R2GenCMN beside one of experiments/decoder_baseline.py, from the same stored features.

Both have width 256 and one decoder layer; R2GenCMN an encoder layer and its cross-modal memory besides. CPU only.

  python benchmarks/decoder_baseline.py --clock cpu --threads 1 --regions 16 49 --out decoder_baseline.json
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import in_rounds, parser_of, prepare, print_header, print_row, save
from modules.runtime.errors import run_entry_point

SIZES = ("batch_size", "regions", "max_seq_length", "vocab_size", "memory")
WIDTH, FEATURES = 256, 1280  # of the models; of EfficientNet-Lite0's patches


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=5)
    add = parser.add_argument
    add("--batch_size", type=int, default=64, help="default %(default)s")
    add("--regions", type=int, nargs="+", default=[16], help="patches of an image; default 16")
    add("--max_seq_length", type=int, default=20, help="default %(default)s")
    add("--vocab_size", type=int, default=3500, help="default %(default)s")
    add("--memory", type=int, default=512, help="rows of R2GenCMN's memory; default %(default)s")
    return parser


def baseline_step(arguments: argparse.Namespace, regions: int) -> Callable[[], None]:
    """Forward, backward and optimiser of the baseline on random features and words."""
    import torch

    from experiments.decoder_baseline import Captioner, update

    model = Captioner(arguments.vocab_size, WIDTH, arguments.max_seq_length)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    features = torch.randn(arguments.batch_size, regions, FEATURES)
    tokens = torch.randint(4, arguments.vocab_size, (arguments.batch_size, arguments.max_seq_length))
    return lambda: update(model, optimizer, features, tokens)


def backbone_step(arguments: argparse.Namespace, regions: int) -> Callable[[], None]:
    """The same of R2GenCMN, as main_train.py takes a step."""
    import torch

    from models.r2gencmn import R2GenCMN, Settings
    from modules.data.batches import Batch, Pair
    from modules.ithn.objective import Objective
    from modules.layers.visual_extractor import VisualExtractor
    from modules.training.optimizers import build_optimizer
    from modules.training.settings import OptimSettings

    sizes = {"d_model": WIDTH, "d_ff": 2 * WIDTH, "num_heads": 8, "num_layers": 1, "cmm_dim": WIDTH}
    settings = Settings(**sizes, cmm_size=arguments.memory, topk=min(16, arguments.memory))
    extractor = VisualExtractor("tf_efficientnet_lite0", frozen=True, image_size=32)
    model = R2GenCMN(visual_extractor=extractor, num_ids=arguments.vocab_size + 1, settings=settings)
    objective = Objective(model).train()
    optimizer = build_optimizer(objective, OptimSettings())
    rows, length = arguments.batch_size, arguments.max_seq_length
    tokens = torch.randint(1, arguments.vocab_size, (rows, length))
    tokens[:, 0] = tokens[:, -1] = 0
    features = torch.randn(rows, 1, regions, FEATURES)
    there = torch.ones(rows, 1, dtype=torch.bool)
    pair, numbers = Pair(features, there, tokens, torch.ones_like(tokens, dtype=torch.bool)), torch.arange(rows)
    batch = Batch(pair, None, there.squeeze(1), numbers, numbers, [""] * rows, [""] * rows)

    def step() -> None:
        objective(batch, 1)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    """Measure, print the table and the ratios, write the JSON file."""
    arguments = build_parser().parse_args()
    device, made_by = prepare(arguments, SIZES)
    makers = {"torch's decoder layer": baseline_step, "R2GenCMN": backbone_step}
    works = {f"{name}, {n} regions": make(arguments, n) for n in arguments.regions for name, make in makers.items()}
    seconds = in_rounds(works, arguments.rounds, arguments.clock, device)
    print_header("a training step")
    for name, values in seconds.items():
        print_row(name, values)
    ratios = {}
    for n in arguments.regions:
        own, other = (seconds[f"{name}, {n} regions"] for name in ("R2GenCMN", "torch's decoder layer"))
        ratios[n] = statistics.median(a / b for a, b in zip(own, other, strict=True))
        print(f"R2GenCMN over the baseline, {n} regions: {ratios[n]:.2f}")
    save(arguments.out, {"benchmark": "decoder_baseline", **made_by, "seconds": seconds, "ratios": ratios})


if __name__ == "__main__":
    run_entry_point(main)
