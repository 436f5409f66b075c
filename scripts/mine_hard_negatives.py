"""Find the hard negatives of every training report: its nearest other training reports by cosine similarity.

Writes an index for main_train.py --negative_index. The negative image is chosen when training reads it: the view with
the anchor image's number where the neighbour has one, else the neighbour's first image.

Left out as false negatives, unless a flag says otherwise: records of the same study or, where the annotation knows
patients, of the same patient, and reports whose cleaned text is the same. RadBERT, the default encoder, is a masked-LM
checkpoint without a trained pooler, so reports are embedded by the mean of the last hidden states over all tokens
(--pooling mean) or by the first token's (--pooling first). The data flags of main_train.py and --tokenizer are taken
too; those that mining has no use for change nothing.

  python scripts/mine_hard_negatives.py --ann_path data/iu_xray/annotation.json --out data/iu_xray/negatives.safetensors
  python scripts/mine_hard_negatives.py ... --text_encoder tfidf          needs no weights and nothing downloaded
  python scripts/mine_hard_negatives.py ... --exclude_same_labels         and any label by rules must differ
  python scripts/mine_hard_negatives.py ... --n_gpu 8                     or under torchrun: embedding and search shared
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.config import Config
from modules.data.annotations import Annotation, read_annotation
from modules.data.captions import split_captions
from modules.data.dataset_specs import SECTIONS, DataSpec
from modules.data.tokenizers import clean_report
from modules.flags import Parser, add_flags, boolean, data_set, given_flags
from modules.runtime.errors import InputError, one_line, run_entry_point
from modules.runtime.launch import launched, process_device, start_processes
from modules.runtime.output_files import Output, check_outputs, contains
from modules.runtime.records import private_folder
from modules.runtime.settings import part_of

RECORDED = (
    "text_encoder",
    "pooling",
    "max_length",
    "top_k",
    "dataset_name",
    "report_sections",
    "include_same_study",
    "include_same_patient",
    "include_identical_text",
    "exclude_same_labels",
    "seed",
)
# Flags of main_train.py that decide which texts are identical, and what a record is.
OF_THE_DATA = ("cleaner", "captions")
OF_THE_VOCABULARY = ("tokenizer", "subword_vocabulary")
SHOWN_LETTERS = 180
ALIKE = 0.999


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from modules.mining.text_encoders import ENCODER_HELP, RADBERT

    parser = Parser(usage="%(prog)s --out FILE [--flag value ...]", description=__doc__)
    add = parser.add_argument
    add("--ann_path", default="data/iu_xray/annotation.json", metavar="FILE", help="default %(default)s")
    add(
        "--out",
        required=True,
        type=Path,
        metavar="FILE",
        help="index to write (.safetensors), readable by you alone; of what may be there it replaces an index only",
    )
    add("--text_encoder", default=RADBERT, metavar="NAME", help=f"{ENCODER_HELP}; default %(default)s")
    add("--pooling", default="mean", choices=("mean", "first"), help="of the encoder's tokens; default %(default)s")
    add("--top_k", type=int, default=5, metavar="K", help="neighbours kept per report; default %(default)s")
    add(
        "--dataset_name",
        help="decides the cleaning rules by which texts count as identical, and whether every caption is a record; "
        f"default: as the dataset.json beside --ann_path says, or {Config.dataset_name}",
    )
    add(
        "--report_sections",
        default="",
        choices=("", *SECTIONS, "both"),
        help="as main_train.py's: sections of the annotation that are the report; default: the field report",
    )
    add_flags(parser, OF_THE_DATA)
    _add_exclusions(parser)
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of --text_encoder random, and of the ties of labels; default %(default)s",
    )
    _add_resources(parser)
    taken = {name.removeprefix("--") for name in parser._option_string_actions}
    for item in dataclasses.fields(Config):  # one variable of a shell script serves every program
        if item.name not in taken and (item.metadata["group"] == "data" or item.name in OF_THE_VOCABULARY):
            add(f"--{item.name}", help=argparse.SUPPRESS)
    add(
        "--examples",
        type=int,
        default=3,
        metavar="E",
        help="pairs to show: this prints report text to the terminal, 0 does not; default %(default)s",
    )
    return parser


def described(arguments: argparse.Namespace) -> tuple[str, DataSpec]:
    """Name and particulars of the data set, as main_train.py with the same flags reads it."""
    return data_set(arguments.ann_path, arguments.dataset_name, **given_flags(arguments, OF_THE_DATA))


def _add_exclusions(parser: argparse.ArgumentParser) -> None:
    """Flags for which reports may be each other's negatives."""
    add = parser.add_argument
    either = {"type": boolean, "nargs": "?", "const": True, "default": False, "metavar": "{true,false}"}
    add("--include_same_study", **either, help="allow records of the same study as negatives")
    add(
        "--include_same_patient",
        **either,
        help="allow other studies of the same patient as negatives, where the annotation knows patients",
    )
    add(
        "--include_identical_text",
        **either,
        help="allow reports with the same cleaned text; both flags together are the literal rule: any other record",
    )
    add("--exclude_same_labels", **either, help="a negative must differ in one of the 14 labels by rules at least")


def _add_resources(parser: argparse.ArgumentParser) -> None:
    """Flags for how the work is done, which change no result."""
    add = parser.add_argument
    add(
        "--cache",
        metavar="DIR",
        help="folder of embeddings, for interrupted runs to resume from, or none; default embeddings/ next to --out",
    )
    add("--batch_size", type=int, default=32, metavar="B", help="reports embedded at once; default %(default)s")
    add("--max_length", type=int, default=512, metavar="T", help="tokens read of a report; default %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; default %(default)s")
    add(
        "--n_gpu",
        type=int,
        default=1,
        metavar="N",
        help="GPUs, each with a process of its own; with --device cpu, processes; default %(default)s",
    )
    add(
        "--memory_mb",
        type=int,
        default=256,
        metavar="M",
        help="MiB that the search takes beyond embeddings and result; default %(default)s",
    )


def check(arguments: argparse.Namespace) -> None:
    """InputError for values out of range, and for an --out that could not be written after hours of work."""
    from modules.mining.text_encoders import TEXT_ENCODERS

    for flag, low in (
        ("top_k", 1),
        ("batch_size", 1),
        ("max_length", 3),
        ("memory_mb", 1),
        ("examples", 0),
        ("n_gpu", 0),
        ("seed", 0),
    ):
        if getattr(arguments, flag) < low:
            raise InputError(f"--{flag} {getattr(arguments, flag)}: must be {low} or more")
    arguments.dataset_name, data = described(arguments)
    kind = TEXT_ENCODERS.get(arguments.text_encoder)
    labelled = arguments.exclude_same_labels or (kind is not None and kind.clinical)
    if labelled and not data.clinical:
        wrong = "--exclude_same_labels" if arguments.exclude_same_labels else f"--text_encoder {arguments.text_encoder}"
        raise InputError(f"{wrong}: there are no clinical labels on {arguments.dataset_name}")
    if arguments.out.is_dir():
        raise InputError(f"--out {arguments.out}: is a folder; give a file name, such as negatives.safetensors")
    check_outputs(
        [Output("--out", arguments.out, "a hard-negative index", contains("ithn-hard-negatives"))],
        [("--ann_path", arguments.ann_path), ("--text_encoder", arguments.text_encoder)],
    )
    folder = private_folder(arguments.out.parent)
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out {arguments.out}: no permission to write in {folder}")


def embed(arguments: argparse.Namespace, texts: list[str], device: str) -> tuple:
    """Embeddings of the texts, one row each, and the encoder's description."""
    from modules.mining.text_encoders import EncoderOptions, build_text_encoder
    from modules.mining.transformer_encoder import TransformerEncoder
    from modules.runtime import distributed

    options = dataclasses.replace(part_of(arguments, EncoderOptions), device=device)
    with distributed.main_process_first():
        encoder = build_text_encoder(arguments.text_encoder, options)
    shown = distributed.is_main_process()
    if shown and options.pooling != "mean" and not isinstance(encoder, TransformerEncoder):
        print(f"note: --pooling {options.pooling} has no effect with --text_encoder {arguments.text_encoder}")
    cache = None if arguments.cache == "none" else Path(arguments.cache or arguments.out.parent / "embeddings")
    return encoder.encode(texts, cache_dir=cache, progress=shown), encoder.describe()


def mine(arguments: argparse.Namespace, annotation: Annotation):
    """The index of the annotation's training reports."""
    from modules.labels.study_labels import labels_by_rules
    from modules.mining.index import HardNegativeIndex, group_ids, mine_neighbours
    from modules.runtime import distributed
    from modules.runtime.environment import choose_device, provenance

    device = str(choose_device("cpu" if arguments.n_gpu == 0 else process_device(arguments.device)))
    train = annotation.splits["train"]
    reports = [" ".join(study.report.split()) for study in train]
    arguments.dataset_name, data = described(arguments)
    cleaned = group_ids(clean_report(study.report, data.cleaner) for study in train)
    studies = group_ids(study.study_id for study in train)
    # What a record's negatives are never of: its patient, or else its study.
    owners = studies
    if not arguments.include_same_patient:
        owners = group_ids(f"p{study.subject_id}" if study.subject_id else f"s{study.study_id}" for study in train)
    labels = None
    if arguments.exclude_same_labels:
        labels = group_ids(row.tobytes() for row in labels_by_rules(reports, progress=distributed.is_main_process()))
    vectors, encoder = embed(arguments, list(dict.fromkeys(reports)), device)
    neighbours, similarity = mine_neighbours(
        vectors,
        group_ids(reports),
        arguments.top_k,
        text_group=None if arguments.include_identical_text else cleaned,
        study_group=None if arguments.include_same_study else owners,
        label_group=labels,
        device=device,
        memory_mb=arguments.memory_mb,
        progress=distributed.is_main_process(),
    )
    metadata = {
        "ann_path": annotation.path,
        "annotation_sha256": annotation.sha256,
        "train_sha256": annotation.train_sha256,
        "flags": {name: getattr(arguments, name) for name in RECORDED},
        "encoder": encoder,
        "sharing_text": _sharing(cleaned),
        "sharing_study": _sharing(studies),
        "sharing_patient": None if arguments.include_same_patient else _sharing(owners),
        "sharing_labels": None if labels is None else _sharing(labels),
        **provenance(device),
    }
    return HardNegativeIndex(neighbours, similarity, metadata, path=str(arguments.out))


def _sharing(groups) -> int:
    """How many records have another record in their group."""
    import numpy as np

    sizes = np.bincount(groups)
    return int(sizes[sizes > 1].sum())


def print_statistics(index) -> None:
    """What was excluded, what was found, and how similar it is."""
    import numpy as np

    (count, k), metadata = index.neighbours.shape, index.metadata
    for what, sharing, admitted in (
        ("cleaned text", metadata["sharing_text"], metadata["flags"]["include_identical_text"]),
        ("study", metadata["sharing_study"], metadata["flags"]["include_same_study"]),
    ):
        rule = "admitted as each other's negatives" if admitted else "excluded as each other's negatives"
        print(f"{sharing:,} of {count:,} training records share their {what} with another: {rule}")
    if (metadata.get("sharing_patient") or 0) > metadata["sharing_study"]:
        print(
            f"{metadata['sharing_patient']:,} of {count:,} training records share their patient with another: excluded "
            "as each other's negatives"
        )
    if metadata["sharing_labels"] is not None:
        print(
            f"{metadata['sharing_labels']:,} of {count:,} training records share their labels with another: excluded "
            "as each other's negatives"
        )
    found = (index.neighbours >= 0).sum(axis=1)
    some, all_k = (found > 0).sum(), (found == k).sum()
    print(f"{some:,} have an admissible neighbour ({all_k:,} have {k}), {count - some:,} have none")
    if not found.any():
        print("no record has an admissible neighbour: training with this index goes without hard negatives")
        return
    print("cosine, quantiles     0 %    5 %   25 %   50 %   75 %   95 %  100 %")
    for rank in sorted({0, found.max() - 1}):
        values = np.quantile(index.similarity[found > rank, rank], (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1))
        print(f"  neighbour {rank + 1:<8}" + "".join(f"{value:7.3f}" for value in values))
    alike = (index.similarity[:, 0] >= ALIKE).sum()
    print(f"{alike:,} have a nearest neighbour of cosine {ALIKE} or more: nearly the same words, an unsure negative")


def print_examples(index, reports: list[str], wanted: int) -> None:
    """Pairs of report and hard negative, spread evenly from the most to the least similar."""
    import numpy as np

    rows = np.flatnonzero(index.neighbours[:, 0] >= 0)
    rows = rows[np.argsort(-index.similarity[rows, 0], kind="stable")]
    for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(wanted, len(rows))).astype(int))]:
        print(f"\ncosine {index.similarity[row, 0]:.3f}")
        for name, report in (("report", reports[row]), ("negative", reports[index.neighbours[row, 0]])):
            shown = report if len(report) <= SHOWN_LETTERS else report[: SHOWN_LETTERS - 3] + "..."
            print(f"  {name:<9} {one_line(shown)}")


def mine_and_write(arguments: argparse.Namespace) -> None:
    """Read, embed and search, in every process; write and report, in the first."""
    from modules.runtime.distributed import is_main_process

    start = time.monotonic()
    annotation = read_annotation(arguments.ann_path, required_splits=("train",))
    if arguments.report_sections:
        from modules.data.study_context import with_sections

        annotation, _ = with_sections(annotation, arguments.report_sections)
    if described(arguments)[1].captions:
        annotation = split_captions(annotation)
    index = mine(arguments, annotation)
    if not is_main_process():
        return
    index.save(arguments.out)
    print_statistics(index)
    reports = [" ".join(study.report.split()) for study in annotation.splits["train"]]
    print_examples(index, reports, arguments.examples)
    print(f"\nwrote {arguments.out} in {time.monotonic() - start:.1f} s")


def main() -> int:
    """Start the processes that --n_gpu asks for, or do the work of one."""
    arguments = build_parser().parse_args()
    check(arguments)
    if arguments.n_gpu > 1 and not launched():
        return start_processes(arguments.n_gpu, device=arguments.device)
    from modules.runtime.distributed import processes

    with processes(arguments.device):
        mine_and_write(arguments)
    return 0


if __name__ == "__main__":
    run_entry_point(main)
