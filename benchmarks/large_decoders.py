"""What training a decoder of billions of parameters holds in each GPU's memory: counted, then calculated.

Counted without a byte of the model, on torch's meta device: parameters, and what the backward pass keeps of a batch in
float32, with and without --activation_checkpointing. Calculated from them: weights, gradients and Adam's two moments,
4 bytes each, as DistributedDataParallel copies them and as --shard_parameters shares them out; with --lora_rank
gradients and moments are of the adapters alone. During validation every GPU has the weights whole, in the precision of
the run.

  python benchmarks/large_decoders.py
  python benchmarks/large_decoders.py --decoders llama-3.2-1b --gpus 2 --batch_size 4
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import parser_of, prepare, save
from modules.runtime.errors import run_entry_point

LAYERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
# The sizes in the models' published configurations: those above, and the vocabulary.
DECODERS = {
    "llama-3.2-1b": ("llama", (2048, 16, 32, 8, 8192), 128256, True),
    "qwen2.5-1.5b": ("qwen2", (1536, 28, 12, 2, 8960), 151936, True),
    "llama-3.2-3b": ("llama", (3072, 28, 24, 8, 8192), 128256, True),
    "llama-2-7b": ("llama", (4096, 32, 32, 32, 11008), 32000, False),
    "llama-3.1-8b": ("llama", (4096, 32, 32, 8, 14336), 128256, False),
    "tiny": ("llama", (16, 2, 2, 1, 32), 40, False),
}
WIDTH = 768  # of the visual tokens


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=1)
    add = parser.add_argument
    known = [name for name in DECODERS if name != "tiny"]
    add("--decoders", nargs="+", default=known, choices=DECODERS, metavar="NAME", help="default: " + " ".join(known))
    add("--gpus", type=int, default=8, help="default %(default)s")
    add("--batch_size", type=int, default=8, help="of each GPU; default %(default)s")
    add("--patches", type=int, default=196, help="visual tokens; default %(default)s")
    add("--max_seq_length", type=int, default=100, help="default %(default)s")
    add("--lora_rank", type=int, default=16, help="default %(default)s")
    return parser


def count(name: str, arguments: argparse.Namespace, *, lora_rank: int = 0, recompute: bool = False) -> dict[str, int]:
    """Parameters, those of them that learn, and bytes kept for the backward pass of a batch."""
    import torch
    from torch import nn

    from models.base import VisualFeatures
    from models.encoder_decoder import EncoderDecoder, Settings

    kind, sizes, vocabulary, tied = DECODERS[name]
    config = {"model_type": kind, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    config |= dict(zip(LAYERS, sizes, strict=True)) | {"head_dim": sizes[0] // sizes[2]}
    batch, kept = arguments.batch_size, {}
    with torch.device("meta"):
        extractor: Any = nn.Module()
        extractor.width = WIDTH
        settings = Settings(decoder_config=json.dumps(config), lora_rank=lora_rank)
        model = EncoderDecoder(
            visual_extractor=extractor, num_ids=vocabulary, settings=settings, end_id=2, keeps_vocabulary=True
        )
        if recompute:
            model.recompute_activations()
        patches = torch.zeros(batch, arguments.patches, WIDTH)
        tokens = torch.zeros(batch, arguments.max_seq_length, dtype=torch.int64)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage, storage.nbytes())  # a storage that is freed would leave its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(None, tokens, features=VisualFeatures(patches, None, patches.mean(1))).log_probs.mean()
    parameters = list(model.parameters())
    return {
        "parameters": sum(value.numel() for value in parameters),
        "learning": sum(value.numel() for value in parameters if value.requires_grad),
        "largest layer": max(sum(value.numel() for value in block.parameters()) for block in model.blocks()),
        "kept": sum(size for _, size in kept.values()),
    }


def memory(found: dict[str, int], gpus: int) -> dict[str, float]:
    """GiB on each of ``gpus``, weights, gradients and moments in float32."""
    whole, learning = (4 * found[name] / 2**30 for name in ("parameters", "learning"))
    return {
        "copied": whole + 3 * learning,
        "shared out": (whole + 3 * learning) / gpus,
        "validation": whole / 2,  # in bfloat16, beside what is shared out
    }


def main() -> None:
    """Count, print and write the tables."""
    arguments = build_parser().parse_args()
    _, result = prepare(arguments, ("gpus", "batch_size", "patches", "max_seq_length", "lora_rank"))
    rows = []
    for name in arguments.decoders:
        for rank in (0, arguments.lora_rank):
            found = count(name, arguments, lora_rank=rank)
            recomputed = count(name, arguments, lora_rank=rank, recompute=True)["kept"]
            rows.append({"decoder": name, "lora_rank": rank, **found, "recomputed": recomputed})
            rows[-1]["gib"] = sizes = memory(found, arguments.gpus)
            print(
                f"{name}{f', adapters of rank {rank}' if rank else ''}: {found['parameters'] / 1e9:.2f} billion, "
                f"{found['learning'] / 1e6:.1f} million learn; "
                + "; ".join(f"{part} {value:.1f}" for part, value in sizes.items())
                + f"; kept {found['kept'] / 2**30:.1f}, with --activation_checkpointing {recomputed / 2**30:.1f} GiB"
            )
    save(arguments.out, {"benchmark": "large_decoders", **result, "rows": rows})


if __name__ == "__main__":
    run_entry_point(main)
