"""Time and memory of hard-negative search, beside the rate of a matrix product in the same run.

The search needs the similarity of every pair of rows: 2 N N D operations as one matrix product. It computes each pair
once, so its rate over those operations can pass 100 % of the product's. "row blocks + topk" is the plain way.

  python benchmarks/mine.py                                     20,000 x 768, the size of the published figures
  python benchmarks/mine.py --rows 227835 --repeats 1 --plain false           MIMIC-CXR's reports
  python benchmarks/mine.py --text_encoder minilm --ann_path data/iu_xray/annotation.json       embedding rate as well
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.annotations import read_annotation
from modules.environment import choose_device, provenance
from modules.errors import InputError, run_entry_point
from modules.flags import boolean


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[20_000], help="numbers of reports; default 20000")
    add("--width", type=int, default=768, help="default %(default)s")
    add("--top_k", type=int, default=5, help="default %(default)s")
    add("--memory_mb", type=int, default=256, help="as in mine_hard_negatives.py; default %(default)s")
    add("--repeats", type=int, default=5, help="default %(default)s")
    add("--plain", type=boolean, default=True, help="also time the plain way; default true")
    add("--threads", type=int, help="of torch; default: all")
    add("--device", default="cpu", help="cpu, cuda or cuda:N; default %(default)s")
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: seconds of this process, for machines that other work shares; default %(default)s")
    add("--text_encoder", help="also time embedding with this encoder (needs --ann_path)")
    add("--ann_path", help="annotation.json whose training reports are embedded")
    add("--sample", type=int, default=256, help="reports embedded; default %(default)s")
    add("--out", type=Path, help="JSON file to write")
    return parser


def timed(work: Callable[[], object], repeats: int, clock: str, device: str) -> list[float]:
    """Seconds of each of ``repeats`` runs."""
    import torch

    read = time.process_time if clock == "cpu" else time.perf_counter
    seconds = []
    for _ in range(repeats):
        start = read()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(read() - start)
    return seconds


def product_rate(vectors, repeats: int, clock: str, device: str) -> float:
    """Best operations per second of a matrix product over several shapes, the search's own tiles among them."""
    import torch

    matrix, square = torch.from_numpy(vectors).to(device), torch.rand(2048, 2048, device=device)
    products = {2 * 2048**3: lambda: square @ square}
    for side in (2048, 4096):
        rows, columns = matrix[:side], matrix[-side:]
        operations = 2 * len(rows) * len(columns) * matrix.shape[1]
        products[operations] = lambda rows=rows, columns=columns: rows @ columns.T
    for product in products.values():
        product()
    return max(count / min(timed(product, repeats, clock, device)) for count, product in products.items())


def plain_search(vectors, k: int, device: str, block: int = 1024) -> None:
    """All similarities of a block of rows, then torch.topk over each row."""
    import torch

    matrix = torch.from_numpy(vectors).to(device)
    for start in range(0, len(matrix), block):
        similarity = matrix[start : start + block] @ matrix.T
        similarity[torch.arange(len(similarity)), start + torch.arange(len(similarity))] = -torch.inf
        similarity.topk(k, dim=1)


def peak_memory(work: Callable[[], object], device: str) -> float:
    """MiB that ``work`` takes at most beyond what is there before: of the GPU, or resident in this process."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # makes the high-water mark the present size
    before = _high_water_mark()
    work()
    return _high_water_mark() - before


def _high_water_mark() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_search(count: int, arguments: argparse.Namespace, device: str) -> dict:
    """Seconds, rates and memory at one number of rows; the product's rate is taken before and after."""
    import numpy as np

    from modules.cosine_search import top_k_cosine

    vectors = np.random.default_rng(0).standard_normal((count, arguments.width), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def search() -> None:
        top_k_cosine(vectors, arguments.top_k, [np.arange(count)], device=device, memory_mb=arguments.memory_mb,
                     progress=count > 50_000)

    clock, repeats = arguments.clock, arguments.repeats
    seconds: list[float] = []
    before = product_rate(vectors, 5, clock, device)
    memory = peak_memory(lambda: seconds.extend(timed(search, repeats, clock, device)), device)
    plain = []
    if arguments.plain:
        plain = timed(lambda: plain_search(vectors, arguments.top_k, device), repeats, clock, device)
    rate = max(before, product_rate(vectors, 5, clock, device))
    return {"rows": count, "width": arguments.width, "top_k": arguments.top_k, "product_flops": rate,
            "search_seconds": seconds, "plain_seconds": plain, "search_peak_mib": memory,
            "embeddings_mib": vectors.nbytes / 2**20}


def measure_embedding(arguments: argparse.Namespace, device: str) -> dict:
    """Texts per second of the text encoder on a random sample of distinct training reports."""
    from modules.text_encoders import TransformerEncoder, build_text_encoder

    annotation = read_annotation(arguments.ann_path, required_splits=("train",))
    texts = sorted({study.report for study in annotation.splits["train"]})
    sample = random.Random(0).sample(texts, min(arguments.sample, len(texts)))
    encoder = build_text_encoder(arguments.text_encoder, pooling="mean", max_length=512, device=device, batch_size=32)
    if isinstance(encoder, TransformerEncoder):
        encoder.encode(sample[:32])
    seconds = timed(lambda: encoder.encode(sample), arguments.repeats, arguments.clock, device)
    return {"text_encoder": arguments.text_encoder, "texts": len(sample), "embed_seconds": seconds,
            "words_per_text": statistics.mean(len(text.split()) for text in sample), "distinct_texts": len(texts)}


def print_search(result: dict, clock: str) -> None:
    """One table per number of rows."""
    operations = 2 * result["rows"] ** 2 * result["width"]
    print(f"\n{result['rows']:,} x {result['width']}, the {result['top_k']} nearest of each row ({clock} seconds)")
    print(f"{'':<24}{'median':>9}{'fastest':>9}{'slowest':>9}{'GFLOP/s':>9}{'share':>8}")
    peak = result["product_flops"]
    rate = f"{peak / 1e9:9.1f}{1:8.0%}"
    print(f"{'matrix product alone':<24}{operations / peak:9.2f}{'':>18}{rate}")
    for name, seconds in (("tiled search", result["search_seconds"]), ("row blocks + topk", result["plain_seconds"])):
        if seconds:
            median = statistics.median(seconds)
            print(f"{name:<24}{median:9.2f}{min(seconds):9.2f}{max(seconds):9.2f}{operations / median / 1e9:9.1f}"
                  f"{operations / median / peak:8.0%}")
    print(f"peak memory of the search beyond the embeddings ({result['embeddings_mib']:,.0f} MiB): "
          f"{result['search_peak_mib']:,.0f} MiB")


def print_embedding(result: dict) -> None:
    """The rate, and what it means for the whole data set."""
    rate = result["texts"] / statistics.median(result["embed_seconds"])
    print(f"\n{result['text_encoder']}: {rate:,.1f} texts per second, {result['words_per_text']:.0f} words each; "
          f"the {result['distinct_texts']:,} distinct training reports take {result['distinct_texts'] / rate:,.0f} s")


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    arguments = build_parser().parse_args()
    for flag in ("width", "top_k", "memory_mb", "repeats", "sample"):
        if getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} {getattr(arguments, flag)}: must be 1 or more")
    if min(arguments.rows) < 1:
        raise InputError(f"--rows {min(arguments.rows)}: must be 1 or more")
    if (arguments.text_encoder is None) != (arguments.ann_path is None):
        raise InputError("--text_encoder and --ann_path go together: the encoder, and the reports it embeds")

    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = str(choose_device(arguments.device))
    result = {**provenance(device), "threads": torch.get_num_threads(), "clock": arguments.clock,
              "memory_mb": arguments.memory_mb, "search": []}
    print(f"{result['device_name']}, {result['threads']} thread(s), torch {torch.__version__}")
    for count in arguments.rows:
        result["search"].append(measure_search(count, arguments, device))
        print_search(result["search"][-1], arguments.clock)
    if arguments.text_encoder:
        result["embedding"] = measure_embedding(arguments, device)
        print_embedding(result["embedding"])
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    run_entry_point(main)
