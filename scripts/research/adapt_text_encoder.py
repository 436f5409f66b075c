"""Adapt a text encoder to the reports of an annotation, for mining where RadBERT cannot be downloaded.

Masked-language-model training (BERT, Devlin et al. 2019) is continued on the training reports, as RadBERT (Yan et al.
2022) was trained from RoBERTa on radiology reports. Validation and test reports are never used. The result is a folder
for mine_hard_negatives.py --text_encoder and build_prototypes.py --text_encoder.

The weights can memorise their training texts word for word, so the folder is patient data like the reports: only you
can read it; keep it where the reports may be kept, and do not share it.

  python scripts/research/adapt_text_encoder.py --ann_path data/iu_xray/annotation.json --out data/iu_xray/encoder
  python scripts/mine_hard_negatives.py --ann_path data/iu_xray/annotation.json --text_encoder data/iu_xray/encoder \\
      --out data/iu_xray/negatives.safetensors
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.config import Config
from modules.data.annotations import Annotation, read_annotation
from modules.data.captions import split_captions
from modules.data.tokenizers import clean_report
from modules.flags import Parser, data_set
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.hub import respelled
from modules.runtime.records import new_folder, require_empty, write_results

if TYPE_CHECKING:
    from scripts.research.masked_language_model import MaskedLanguageModel

RECORD = "adaptation.json"
RECORDED = ("epochs", "batch_size", "lr", "max_length", "mask_share", "seed", "dataset_name")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--ann_path", default="data/iu_xray/annotation.json", metavar="FILE", help="default %(default)s")
    add("--out", required=True, type=Path, metavar="DIR", help="new folder, readable by you alone")
    add(
        "--text_encoder",
        default="minilm",
        metavar="NAME",
        help="encoder to start from: minilm (a pip package), a local folder with a transformers encoder, or a hub id "
        "(downloaded once); default %(default)s",
    )
    add(
        "--dataset_name",
        help="decides the cleaning rules by which texts count as identical, each is read once, and whether every "
        f"caption is a record; default: as the dataset.json beside --ann_path says, or {Config.dataset_name}",
    )
    add("--epochs", type=int, default=3, metavar="N", help="default %(default)s")
    add("--batch_size", type=int, default=32, metavar="B", help="reports per step; default %(default)s")
    add(
        "--lr",
        type=float,
        default=5e-5,
        metavar="R",
        help="peak learning rate, reached after 10 %% of the steps; default %(default)s",
    )
    add("--max_length", type=int, default=512, metavar="T", help="tokens read of a report; default %(default)s")
    add("--mask_share", type=float, default=0.15, metavar="P", help="words to be predicted; default %(default)s")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="for order, masks, dropout, a new head and the 5 %% of reports held out; default %(default)s",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; default %(default)s")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """InputError for values out of range, and for an --out that cannot be written: now, not after hours of training."""
    for flag, low in (("epochs", 1), ("batch_size", 1), ("max_length", 3), ("seed", 0)):
        if getattr(arguments, flag) < low:
            raise InputError(f"--{flag} {getattr(arguments, flag)}: must be {low} or more")
    if not 0 < arguments.lr < math.inf:
        raise InputError(f"--lr {arguments.lr}: must be a finite number above 0")
    if not 0 < arguments.mask_share < 1:
        raise InputError(f"--mask_share {arguments.mask_share}: must lie between 0 and 1")
    from modules.mining.text_encoders import TEXT_ENCODERS, WITH_WEIGHTS

    without_weights = TEXT_ENCODERS.keys() - set(WITH_WEIGHTS)
    if respelled(arguments.text_encoder) in without_weights and not Path(arguments.text_encoder).is_dir():
        raise InputError(f"--text_encoder {arguments.text_encoder}: has no weights to adapt")
    require_empty(arguments.out)
    parent = next(folder for folder in arguments.out.resolve().parents if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise InputError(f"--out {arguments.out}: no permission to write in {parent}")


def distinct_reports(annotation: Annotation, cleaner: str) -> list[str]:
    """The training reports; of those with the same cleaned text, the first.

    So no held-out text is trained on, and none is memorised because it occurs a hundred times.
    """
    reports = (" ".join(study.report.split()) for study in annotation.splits["train"])
    first: dict[str, str] = {}
    for report in reports:
        first.setdefault(clean_report(report, cleaner), report)
    return list(first.values())


def record_of(arguments: argparse.Namespace, annotation: Annotation, model: "MaskedLanguageModel", device: str) -> dict:
    """What the weights are made from: no text, id or path, and so no command line."""
    from modules.mining.transformer_encoder import weights_sha256
    from modules.runtime.environment import provenance

    base = arguments.text_encoder
    return {
        "base": Path(base).resolve().name if Path(base).is_dir() else base,
        "base_weights_sha256": weights_sha256(model.encoder),
        "new_head": model.new_head,
        "settings": {name: getattr(arguments, name) for name in RECORDED} | {"tokens_read": model.max_length},
        "annotation_sha256": annotation.sha256,
        "train_sha256": annotation.train_sha256,
        "provenance": {name: value for name, value in provenance(device).items() if name != "argv"},
    }


def adapt(arguments: argparse.Namespace, annotation: Annotation) -> None:
    """Train the encoder, and write it with its tokeniser and record."""
    from modules.mining.text_encoders import encoder_folder
    from modules.mining.transformer_encoder import weights_sha256
    from modules.runtime.environment import choose_device
    from modules.runtime.run_log import Bar
    from scripts.research.masked_language_model import hold_out, load_masked_lm, pretrain

    device, seed = str(choose_device(arguments.device)), arguments.seed
    folder = encoder_folder(arguments.text_encoder)
    model = load_masked_lm(folder, max_length=arguments.max_length, device=device, seed=seed)
    arguments.dataset_name, data = data_set(arguments.ann_path, arguments.dataset_name)
    reports = distinct_reports(annotation, data.cleaner)
    texts, held_out = hold_out(model.tokenize(reports), seed)
    print(
        f"{len(annotation.splits['train']):,} training reports, {len(texts) + len(held_out):,} different ones with "
        f"known words: {len(texts):,} to train on, {len(held_out):,} held out"
    )
    if model.new_head:
        print(f"{arguments.text_encoder} has no complete masked-LM head: what it lacks starts from scratch")
    record = record_of(arguments, annotation, model, device)
    sizes = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "lr", "mask_share", "seed")}
    scores = []
    for score in pretrain(model, texts, held_out, **sizes, progress=Bar):
        print(
            f"epoch {score.epoch}: {score.words:,} masked held-out words: loss {score.loss:.3f}, accuracy "
            f"{score.accuracy:.3f}",
            flush=True,
        )
        scores.append(vars(score))
    record |= {
        "weights_sha256": weights_sha256(model.encoder),
        "texts": {"trained": len(texts), "held_out": len(held_out)},
        "held_out_scores": scores,
    }
    with new_folder(arguments.out) as out:
        model.save(out)
        write_results(out / RECORD, record)


def main() -> None:
    """Check, read, adapt."""
    from modules.runtime.memory import explain_out_of_memory

    arguments = build_parser().parse_args()
    check(arguments)
    start = time.monotonic()
    annotation = read_annotation(arguments.ann_path, required_splits=("train",))
    if data_set(arguments.ann_path, arguments.dataset_name)[1].captions:
        annotation = split_captions(annotation)
    with explain_out_of_memory("lower --batch_size or --max_length"):
        adapt(arguments, annotation)
    print(f"wrote {arguments.out} in {time.monotonic() - start:.0f} s: as private as the reports, do not share it")


if __name__ == "__main__":
    run_entry_point(main)
