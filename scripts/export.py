"""A trained model as a folder in the layout of the Hugging Face hub, and back; nothing is uploaded.

  python scripts/export.py results/iu_xray/model_best.pth --out shared/iu_xray
  python scripts/export.py shared/iu_xray --out model.pth
  python scripts/export.py results/iu_xray/model_best.pth --program programs/iu_xray

The folder has model.safetensors, config.json, vocabulary.json and README.md (the model card, with the scores, intervals
and baselines of the results.json next to the checkpoint); every --load takes it. It holds no paths, ids or reports, but
weights and vocabulary come from patients' reports: ask your data use agreement before you share them.

--program writes encoder.pt2 and step.pt2 instead, programs of torch.export that need none of this project's code, and
compares them with the model at once (docs/SHARING.md).
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.config import EXPORTED
from modules.data.dataset_specs import ENGLISH, data_title
from modules.flags import Parser
from modules.runtime.environment import check_python
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.input_files import read_json

if TYPE_CHECKING:
    from modules.inference.model_card import CardFacts


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("source", type=Path, metavar="PATH", help="a checkpoint of main_train.py, or such a folder")
    written = parser.add_mutually_exclusive_group(required=True)
    written.add_argument("--out", type=Path, metavar="PATH", help="the new folder, or the new .pth file")
    written.add_argument("--program", type=Path, metavar="FOLDER", help="a new folder for encoder.pt2 and step.pt2")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        default=1e-4,
        metavar="FLOAT",
        help="with --program: by how much a log-probability may differ (default %(default)s)",
    )
    parser.add_argument(
        "--licence",
        default="other",
        metavar="NAME",
        help="licence named in the model card, as the hub spells it (default %(default)s)",
    )
    parser.add_argument(
        "--dataset",
        default="",
        metavar="NAME",
        help="name of the data set in the model card (default: that of a known data set in its usual folder)",
    )
    parser.add_argument(
        "--language",
        default="",
        metavar="CODE",
        help="language of the reports in the model card, such as en (default: en where clinical labels by rules apply)",
    )
    return parser


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number from 0 on")
    return value


def to_folder(source: Path, out: Path, given: argparse.Namespace) -> None:
    """Checkpoint -> folder, read back and compared with the checkpoint. InputError where they differ."""
    from modules.inference.hub_format import hub_tensors, read_hub_folder, same_weights, write_hub_folder
    from modules.inference.model_card import model_card
    from modules.run.resuming import own_settings
    from modules.training.checkpoint import FORMAT, load_checkpoint

    content = load_checkpoint(source)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{source}: not a checkpoint of this project; convert it with scripts/convert_checkpoint.py --to ours"
        )
    own_settings(content, str(source))
    results = results_of(content, source.parent)
    write_hub_folder(out, content, model_card(content, results, facts_of(content, results, given)), EXPORTED)
    if not same_weights(hub_tensors(read_hub_folder(out, EXPORTED)), hub_tensors(content)):
        raise InputError(f"{out}: the weights do not read back as they were written; is the disk whole?")


def to_checkpoint(source: Path, out: Path) -> None:
    """Folder -> checkpoint; InputError where its weights do not fit its settings."""
    import dataclasses

    from modules.flags import resolve_config
    from modules.inference.hub_format import read_hub_folder
    from modules.ithn.objective import Objective
    from modules.run.build import (
        StoredWeights,
        build_backbone,
        build_extractor,
        load_weights,
        prepare_device,
        require_fitting,
    )
    from modules.run.vocabulary import tokenizer_from_state
    from modules.training.checkpoint import FORMAT
    from scripts.convert_checkpoint import write

    shared = read_hub_folder(source, EXPORTED)
    tokenizer = tokenizer_from_state(shared["vocabulary"])
    config = resolve_config({}, shared["config"])
    device = prepare_device(config)
    require_fitting(config, tokenizer, StoredWeights(shared["state_dict"], str(source)))
    extractor = build_extractor(config, device, pretrained=False)
    backbone = build_backbone(config, extractor, tokenizer, pretrained=False)
    load_weights(Objective(backbone), shared["state_dict"], str(source))
    write(
        out,
        {
            **shared,
            "format": FORMAT,
            "config": dataclasses.asdict(config),
            "history": [],
            "vocabulary_sha256": tokenizer.sha256,
        },
    )


def to_programs(source: Path, folder: Path, tolerance: float) -> None:
    """Checkpoint -> programs of torch.export, read back and compared with the model.

    InputError where they differ by more than ``tolerance``.
    """
    import torch

    from modules.inference.torch_export import export_programs, largest_difference, write_programs
    from modules.run.predictor import load_predictor

    predictor = load_predictor(str(source), {"device": "cpu", "precision": "float32", "guidance": 0.0})
    if predictor.backbone.study_context is not None:
        raise InputError(f"--program: {source} reads --context, for which programs have no input; use --out")
    tokenizer, length = predictor.tokenizer, predictor.decoding.max_seq_length
    sizes = {"num_views": predictor.num_views, "length": length, "num_ids": tokenizer.num_ids}
    model = (predictor.backbone, predictor.transform)
    about = {
        "torch": torch.__version__,
        "image_size": predictor.transform.size,
        "num_views": predictor.num_views,
        "max_seq_length": length,
        "any_length": predictor.backbone.any_length,
    }
    write_programs(folder, export_programs(*model, **sizes), about, tokenizer.state())
    difference = largest_difference(folder, *model, **sizes)
    print(f"largest difference of a log-probability between programs and model: {difference:.1e}")
    if difference > tolerance:
        raise InputError(
            f"--program {folder}: they differ from the model by {difference:.1e}, more than --tolerance "
            f"{tolerance:.1e}; do not use them"
        )


def facts_of(content: dict, results: dict, given: argparse.Namespace) -> "CardFacts":
    """What the card says of data, licence and language: as given, or as far as the run itself says it."""
    from modules.inference.model_card import CardFacts

    config = content["config"]
    name = data_title(config["dataset_name"], config.get("ann_path", ""), bool(results.get("synthetic")))
    scored = results.get("test", {}).get("model", {})
    # Labels by rules are null wherever the reports are not in English.
    english = any(name.startswith("ce_rule_") and value is not None for name, value in scored.items())
    return CardFacts(
        dataset=given.dataset or name or "radiographs with reports (unnamed)",
        licence=given.licence,
        data_licence=config.get("data_licence", ""),
        language=given.language or _foreign(config) or ("en" if english else ""),
    )


def _foreign(config: dict) -> str:
    """The language that the data set's description says, where it is not the default."""
    return config["language"] if config.get("language", ENGLISH) != ENGLISH else ""


def results_of(content: dict, folder: Path) -> dict:
    """The results.json next to a checkpoint; of another checkpoint only whether its data are synthetic."""
    results = read_results(folder)
    if results.get("best_epoch") != content["epoch"]:
        return {"synthetic": results.get("synthetic")}
    return results


def read_results(folder: Path) -> dict:
    """The results.json of a run, empty where there is none. InputError for a damaged file."""
    try:
        return read_json(folder / "results.json")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'results.json'}: cannot be read: {error}") from error


def main() -> None:
    """Write the folder, the checkpoint, or the programs."""
    check_python()
    arguments = build_parser().parse_args()
    out, flag = (arguments.program, "--program") if arguments.program else (arguments.out, "--out")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{flag} {out}: is there already; name a new one")
    if arguments.program:
        to_programs(arguments.source, out, arguments.tolerance)
    elif arguments.source.is_dir():
        to_checkpoint(arguments.source, out)
    else:
        to_folder(arguments.source, out, arguments)
    print(f"written: {out}")


if __name__ == "__main__":
    run_entry_point(main)
