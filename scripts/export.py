"""A trained model as a folder in the layout of the Hugging Face hub, and back; nothing is uploaded.

  python scripts/export.py results/iu_xray/model_best.pth --out shared/iu_xray
  python scripts/export.py shared/iu_xray --out model.pth
  python scripts/export.py results/iu_xray/model_best.pth --program programs/iu_xray

The folder has model.safetensors, config.json, vocabulary.json and README.md (the model card, with the scores, intervals
and baselines of the results.json next to the checkpoint); every --load takes it. It holds no paths, ids or reports, but
weights and vocabulary come from patients' reports: ask your data use agreement before you share them.

Low-rank adapters (--lora_rank, --unfreeze lora:RANK) stay apart from the layers that they belong to, and those of a
decoder are also written as peft reads them, into adapter/; with --lora merged they become part of the weights.

--program writes encoder.pt2 and step.pt2 instead, programs of torch.export that need none of this project's code, and
compares them with the model at once (docs/SHARING.md).
"""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.config import EXPORTED
from modules.data.dataset_specs import ENGLISH, data_title, is_english
from modules.flags import Parser
from modules.runtime.environment import check_python, file_sha256
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.input_files import read_json

if TYPE_CHECKING:
    from modules.config import Config
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
        "--lora",
        choices=("separate", "merged"),
        default="separate",
        help="what becomes of low-rank adapters: see above (default %(default)s)",
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
    from modules.inference.hub_format import (
        ADAPTERS,
        hub_tensors,
        read_hub_folder,
        same_weights,
        write_adapters,
        write_hub_folder,
    )
    from modules.inference.model_card import model_card
    from modules.layers.low_rank import adapter_files
    from modules.run.resuming import own_settings
    from modules.training.checkpoint import FORMAT, load_checkpoint

    content = load_checkpoint(source)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{source}: not a checkpoint of this project; convert it with scripts/convert_checkpoint.py --to ours"
        )
    own_settings(content, str(source))
    results = results_of(content, source)
    card = model_card(content, results, facts_of(content, results, given))
    backbone = built(content, source)[1] if has_adapters(content) else None
    if given.lora == "merged":
        content = merged(content, backbone, source)
    write_hub_folder(out, content, card, EXPORTED)
    if given.lora == "separate" and content["config"].get("lora_rank"):
        write_adapters(out / ADAPTERS, *adapter_files(backbone.decoder.model))
    if not same_weights(hub_tensors(read_hub_folder(out, EXPORTED)), hub_tensors(content)):
        raise InputError(f"{out}: the weights do not read back as they were written; is the disk whole?")


def has_adapters(content: dict) -> bool:
    """Whether a checkpoint's model has low-rank adapters."""
    config = content["config"]
    return bool(config.get("lora_rank")) or config.get("unfreeze", "").startswith("lora:")


def built(content: dict, path: Path) -> tuple["Config", Any]:
    """Settings and backbone, with its weights, of what a checkpoint or a folder holds.

    InputError where its weights do not fit its settings.
    """
    from modules.flags import resolve_config
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

    tokenizer = tokenizer_from_state(content["vocabulary"])
    config = resolve_config({"device": "cpu"}, content["config"])
    if config.detection_features:
        raise InputError(f"{path}: its model reads --detection_features, whose width neither says; keep the checkpoint")
    device = prepare_device(config)
    require_fitting(config, tokenizer, StoredWeights(content["state_dict"], str(path)))
    extractor = build_extractor(config, device, pretrained=False)
    backbone = build_backbone(config, extractor, tokenizer, pretrained=False)
    load_weights(Objective(backbone), content["state_dict"], str(path))
    return config, backbone


def merged(content: dict, backbone: Any, path: Path) -> dict:
    """A checkpoint's ``content`` with the adapters of its ``backbone`` added to the weights, and none left.

    InputError where it has none.
    """
    from modules.ithn.weights import HEADS
    from modules.layers.low_rank import merge_adapters

    if backbone is None:
        raise InputError(f"--lora merged: {path} has no low-rank adapters; leave it out")
    merge_adapters(backbone)
    heads = {name: value for name, value in content["state_dict"].items() if name.startswith(HEADS)}
    none = {"lora_rank": 0, "lora_targets": "", "unfreeze": ""}
    return content | {"state_dict": heads | backbone.state_dict(), "config": content["config"] | none}


def to_checkpoint(source: Path, out: Path) -> None:
    """Folder -> checkpoint; InputError where its weights do not fit its settings."""
    import dataclasses

    from modules.config import Config
    from modules.inference.hub_format import read_hub_folder
    from modules.run.vocabulary import tokenizer_from_state
    from modules.training.checkpoint import FORMAT
    from scripts.convert_checkpoint import write

    shared = read_hub_folder(source, EXPORTED)
    config, _ = built(shared, source)
    write(
        out,
        {
            **shared,
            "format": FORMAT,
            "config": dataclasses.asdict(config) | {"device": Config.device},
            "history": [],
            "vocabulary_sha256": tokenizer_from_state(shared["vocabulary"]).sha256,
        },
    )


def to_programs(source: Path, folder: Path, tolerance: float, lora: str) -> None:
    """Checkpoint -> programs of torch.export, read back and compared with the model; ``lora`` merged or separate.

    InputError where they differ by more than ``tolerance``.
    """
    import torch

    from modules.inference.torch_export import export_programs, largest_difference, write_programs
    from modules.layers.low_rank import merge_adapters
    from modules.run.predictor import load_predictor

    predictor = load_predictor(str(source), {"device": "cpu", "precision": "float32", "guidance": 0.0})
    if predictor.backbone.study_context is not None:
        raise InputError(f"--program: {source} reads --context, for which programs have no input; use --out")
    if lora == "merged":
        merge_adapters(predictor.backbone)
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
    return "" if is_english(config.get("language", ENGLISH)) else config["language"]


def results_of(content: dict, path: Path) -> dict:
    """The results.json next to the checkpoint ``path``; of other weights, data or settings of a test only whether data
    are synthetic.
    """
    from modules.config import NO_EFFECT_ON_RESULTS

    results = read_results(path.parent)
    made_from, tested = results.get("provenance", {}), results.get("config", {})
    known = content | {"checkpoint_sha256": file_sha256(path)}
    same = results.get("best_epoch") == content["epoch"] and all(
        name not in own or name not in other or own[name] == other[name]
        for own, other, names in (
            (made_from, known, ("annotation_sha256", "checkpoint_sha256")),
            (tested, content["config"], EXPORTED - NO_EFFECT_ON_RESULTS),
        )
        for name in names
    )
    return results if same else {"synthetic": results.get("synthetic")}


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
        to_programs(arguments.source, out, arguments.tolerance, arguments.lora)
    elif arguments.source.is_dir():
        to_checkpoint(arguments.source, out)
    else:
        to_folder(arguments.source, out, arguments)
    print(f"written: {out}")


if __name__ == "__main__":
    run_entry_point(main)
