"""Time of R2Gen's encoder-decoder beside R2GenCMN's at the same sizes, side by side in one run.

A training step is forward and backward from given patch features, in training mode: the visual extractor is the same
for both. A generation is a whole beam search; weights are untrained, so it runs to its longest length. The memory is
timed alone as well, without dropout, beside the same recurrence left to autograd. Each round times everything once and
ratios are within rounds, so that other work on the machine weighs on both.

  python benchmarks/r2gen_step.py                                           the sizes of run_iu_xray.sh
  python benchmarks/r2gen_step.py --threads 1 --clock cpu --out step.json   one thread, on a machine with other work
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import in_rounds, parser_of, prepare, save
from modules.runtime.errors import run_entry_point

NAMES = ("r2gen", "r2gencmn")
SIZES = ("batch_size", "patches", "image_dim", "d_model", "num_layers", "vocab_size", "max_seq_length", "beam_size")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=5)
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="default %(default)s")
    add("--patches", type=int, default=98, help="visual tokens, both views; default %(default)s")
    add("--image_dim", type=int, default=2048, help="width of a patch feature; default %(default)s")
    add("--d_model", type=int, default=512, help="default %(default)s")
    add("--num_layers", type=int, default=3, help="default %(default)s")
    add("--vocab_size", type=int, default=760, help="default %(default)s")
    add("--max_seq_length", type=int, default=60, help="default %(default)s")
    add("--beam_size", type=int, default=3, help="default %(default)s")
    return parser


def build_works(arguments: argparse.Namespace, device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name; a backward pass follows its forward pass."""
    import torch
    from torch import nn

    from models import backbone_class, settings_class
    from models.base import VisualFeatures
    from models.r2gen import R2Gen, Settings
    from modules.decoding.options import DecodingOptions

    class NoExtractor(nn.Module):
        width = arguments.image_dim

    patches = torch.randn(arguments.batch_size, arguments.patches, arguments.image_dim, device=device)
    features = VisualFeatures(patches, None, patches.mean(dim=1))
    shape = (arguments.batch_size, arguments.max_seq_length - 1)
    tokens = torch.randint(1, arguments.vocab_size + 1, shape, device=device)
    tokens[:, 0] = 0
    decoding = DecodingOptions(beam_size=arguments.beam_size, max_seq_length=arguments.max_seq_length)
    works: dict[str, Callable[[], object]] = {}
    for name in NAMES:
        sizes = {"d_model": arguments.d_model, "d_ff": arguments.d_model, "num_layers": arguments.num_layers}
        own = {"rm_d_model": arguments.d_model} if name == "r2gen" else {"cmm_dim": arguments.d_model}
        settings = settings_class(name)(**sizes | own)
        kind = backbone_class(name)
        model = kind(visual_extractor=NoExtractor(), num_ids=arguments.vocab_size + 1, settings=settings)
        add_model_works(works, name, model.to(device), features, tokens, decoding)
    settings = Settings(d_model=arguments.d_model, rm_d_model=arguments.d_model, num_layers=1)
    small = R2Gen(visual_extractor=NoExtractor(), num_ids=1, settings=settings)
    memory = small.encoder_decoder.model.rm.to(device).eval()
    x = torch.randn(*shape, arguments.d_model, device=device, requires_grad=True)
    add_passes(works, "memory by hand", lambda: memory(x))
    add_passes(works, "memory by autograd", lambda: memory_by_autograd(memory, x))
    return works


def add_model_works(works, name, model, features, tokens, decoding) -> None:
    """Forward, backward and generation of one backbone."""

    def forward():
        return model.train()(None, tokens, features=features).log_probs[:, :, 0]

    def generate():
        return model.eval().generate(None, features=features, decoding=decoding)

    add_passes(works, name, forward)
    works[f"{name} generation"] = generate


def add_passes(works, name, forward) -> None:
    """``forward`` and the backward pass of the mean of what it returned last."""
    last = []

    def keep():
        last[:] = [forward().mean()]

    works[f"{name} forward"] = keep
    works[f"{name} backward"] = lambda: last.pop().backward()


def memory_by_autograd(memory, x):
    """The relational memory in evaluation mode by a plain loop that autograd records; (B, T, d) -> (B, T, s*d)."""
    import torch
    import torch.nn.functional as F

    tokens, weights, slots = x.transpose(0, 1), memory.weights().transposed(), memory.num_slots
    token_gates, state = memory.token_gates(tokens), memory.initial(x)
    token_keys_values = (tokens @ weights.qkv + weights.qkv_bias).unsqueeze(1)
    after = []
    for t in range(len(tokens)):
        qkv = torch.cat([state @ weights.qkv + weights.qkv_bias, token_keys_values[t]])
        q, k, v = qkv.unflatten(-1, (3, memory.num_heads, -1)).unbind(2)
        scores = (q[:slots].unsqueeze(1) * k).sum(-1) * k.size(-1) ** -0.5
        attended = (scores.softmax(dim=1).unsqueeze(-1) * v).sum(1).flatten(2)
        new = state + (attended @ weights.output + weights.output_bias)
        hidden = F.relu(new @ weights.mlp_in + weights.mlp_in_bias)
        new = new + F.relu(hidden @ weights.mlp_out + weights.mlp_out_bias)
        write, keep = (torch.tanh(state) @ weights.gates + token_gates[t]).sigmoid().chunk(2, dim=-1)
        state = write * torch.tanh(new) + keep * state
        after.append(state)
    return torch.stack(after).permute(2, 0, 1, 3).flatten(2)


def measure(works: dict[str, Callable[[], object]], arguments: argparse.Namespace, device: str) -> dict[str, list]:
    """Seconds of every work in every round, with sums of forward and backward as "step"."""
    seconds = in_rounds(works, arguments.rounds, arguments.clock, device)
    for name in [name for name in works if name.endswith(" forward")]:
        base = name.removesuffix(" forward")
        seconds[f"{base} step"] = [a + b for a, b in zip(seconds[name], seconds[f"{base} backward"], strict=True)]
    return seconds


def table(seconds: dict[str, list[float]], rows: tuple[str, str], batch_size: int) -> None:
    """Medians of two works, and the median of their ratios within a round."""
    print(f"\n{'':<26}{rows[0]:>18}{rows[1]:>20}{'ratio':>8}")
    for part in ("forward", "backward", "step", "generation"):
        if f"{rows[0]} {part}" not in seconds:
            continue
        first, second = (seconds[f"{row} {part}"] for row in rows)
        scale, unit = (batch_size, "s per study") if part == "generation" else (1, "s per batch")
        ratio = statistics.median(a / b for a, b in zip(first, second, strict=True))
        print(
            f"{part + ', ' + unit:<26}{statistics.median(first) / scale:18.3f}"
            f"{statistics.median(second) / scale:20.3f}{ratio:8.2f}"
        )


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    arguments = build_parser().parse_args()
    device, made_by = prepare(arguments, SIZES)
    seconds = measure(build_works(arguments, device), arguments, device)
    table(seconds, NAMES, arguments.batch_size)
    table(seconds, ("memory by hand", "memory by autograd"), arguments.batch_size)
    save(arguments.out, {"benchmark": "r2gen_step", **made_by, "seconds": seconds})


if __name__ == "__main__":
    run_entry_point(main)
