"""Time and memory of hard-negative search, beside the rate of a matrix product in the same run.

The search needs the similarity of every pair of rows: 2 N N D operations as one matrix product. It computes each pair
once, so its rate over those operations can pass 100 % of the product's. "row blocks + topk" is the plain way.

  python benchmarks/mine.py                                     20,000 x 768, the size of the published figures
  python benchmarks/mine.py --rows 227835 --rounds 1 --plain false           MIMIC-CXR's reports
  python benchmarks/mine.py --text_encoder minilm --ann_path data/iu_xray/annotation.json       embedding rate as well
"""

import argparse
import random
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measurement import (
    in_rounds,
    parser_of,
    peak_memory,
    prepare,
    print_header,
    print_row,
    product_rate,
    save,
)
from modules.data.annotations import read_annotation
from modules.flags import boolean
from modules.runtime.errors import InputError, run_entry_point


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = parser_of(__doc__, rounds=5)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[20_000], help="numbers of reports; default 20000")
    add("--width", type=int, default=768, help="default %(default)s")
    add("--top_k", type=int, default=5, help="default %(default)s")
    add("--memory_mb", type=int, default=256, help="as in mine_hard_negatives.py; default %(default)s")
    add("--plain", type=boolean, default=True, help="also time the plain way; default true")
    add("--text_encoder", help="also time embedding with this encoder (needs --ann_path)")
    add("--ann_path", help="annotation.json whose training reports are embedded")
    add("--sample", type=int, default=256, help="reports embedded; default %(default)s")
    return parser


def plain_search(vectors, k: int, device: str, block: int = 1024) -> None:
    """All similarities of a block of rows, then torch.topk over each row."""
    import torch

    matrix = torch.from_numpy(vectors).to(device)
    for start in range(0, len(matrix), block):
        similarity = matrix[start : start + block] @ matrix.T
        similarity[torch.arange(len(similarity)), start + torch.arange(len(similarity))] = -torch.inf
        similarity.topk(k, dim=1)


def measure_search(count: int, arguments: argparse.Namespace, device: str) -> dict:
    """Seconds, rates and memory at one number of rows; the product's rate is taken before and after."""
    import numpy as np

    from modules.mining.cosine_search import top_k_cosine

    vectors = np.random.default_rng(0).standard_normal((count, arguments.width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def search() -> None:
        top_k_cosine(
            vectors,
            arguments.top_k,
            [np.arange(count)],
            device=device,
            memory_mb=arguments.memory_mb,
            progress=count > 50_000,
        )

    clock, rounds = arguments.clock, arguments.rounds
    # The search's own tiles are among the products, which are timed before and after it.
    tiles = [(side, arguments.width, side) for side in (2048, 4096)]
    before = product_rate(device, clock, shapes=tiles)
    works = {"search": search}
    if arguments.plain:
        works["plain"] = lambda: plain_search(vectors, arguments.top_k, device)
    memory, _ = peak_memory(search, device)
    seconds = in_rounds(works, rounds, clock, device)
    rate = max(before, product_rate(device, clock, shapes=tiles))
    return {
        "rows": count,
        "width": arguments.width,
        "top_k": arguments.top_k,
        "product_flops": rate,
        "search_seconds": seconds["search"],
        "plain_seconds": seconds.get("plain", []),
        "search_peak_mib": memory,
        "embeddings_mib": vectors.nbytes / 2**20,
    }


def measure_embedding(arguments: argparse.Namespace, device: str) -> dict:
    """Texts per second of the text encoder on a random sample of distinct training reports."""
    from modules.mining.text_encoders import EncoderOptions, build_text_encoder
    from modules.mining.transformer_encoder import TransformerEncoder

    annotation = read_annotation(arguments.ann_path, required_splits=("train",))
    texts = sorted({study.report for study in annotation.splits["train"]})
    sample = random.Random(0).sample(texts, min(arguments.sample, len(texts)))
    encoder = build_text_encoder(arguments.text_encoder, EncoderOptions(device=device))
    if isinstance(encoder, TransformerEncoder):
        encoder.encode(sample[:32])
    seconds = in_rounds({"embed": lambda: encoder.encode(sample)}, arguments.rounds, arguments.clock, device)["embed"]
    return {
        "text_encoder": arguments.text_encoder,
        "texts": len(sample),
        "embed_seconds": seconds,
        "words_per_text": statistics.mean(len(text.split()) for text in sample),
        "distinct_texts": len(texts),
    }


def print_search(result: dict) -> None:
    """One table per number of rows."""
    operations, peak = 2 * result["rows"] ** 2 * result["width"], result["product_flops"]
    print_header(
        f"{result['rows']:,} x {result['width']}, the {result['top_k']} nearest of each row", "GFLOP/s", "of product"
    )
    for name, seconds in (
        ("matrix product alone", [operations / peak]),
        ("tiled search", result["search_seconds"]),
        ("row blocks + topk", result["plain_seconds"]),
    ):
        if seconds:
            rate = operations / statistics.median(seconds)
            print_row(name, seconds, f"{rate / 1e9:.1f}", f"{rate / peak:.0%}")
    print(
        f"peak memory of the search beyond the embeddings ({result['embeddings_mib']:,.0f} MiB): "
        f"{result['search_peak_mib']:,.0f} MiB"
    )


def print_embedding(result: dict) -> None:
    """The rate, and what it means for the whole data set."""
    rate = result["texts"] / statistics.median(result["embed_seconds"])
    print(
        f"\n{result['text_encoder']}: {rate:,.1f} texts per second, {result['words_per_text']:.0f} words each; "
        f"the {result['distinct_texts']:,} distinct training reports take {result['distinct_texts'] / rate:,.0f} s"
    )


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    arguments = build_parser().parse_args()
    if (arguments.text_encoder is None) != (arguments.ann_path is None):
        raise InputError("--text_encoder and --ann_path go together: the encoder, and the reports it embeds")

    device, made_by = prepare(arguments, ("rows", "width", "top_k", "memory_mb", "sample"))
    result = {"benchmark": "mine", **made_by, "memory_mb": arguments.memory_mb, "search": []}
    for count in arguments.rows:
        result["search"].append(measure_search(count, arguments, device))
        print_search(result["search"][-1])
    if arguments.text_encoder:
        result["embedding"] = measure_embedding(arguments, device)
        print_embedding(result["embedding"])
    save(arguments.out, result)


if __name__ == "__main__":
    run_entry_point(main)
