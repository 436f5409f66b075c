"""The command line: every Config field is a flag; flags of the public codes that did nothing are accepted too."""

import argparse
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from models import MODELS, SYSTEMS, backbone_class, settings_class
from modules.config import (
    BACKBONE_SETTINGS,
    PRESETS,
    REMOTE,
    TRAIN_ONLY,
    TYPED_ONLY,
    Config,
    preset,
    settings_of,
    settings_with,
)
from modules.data.dataset_specs import DATASETS, FACTS, OTHER, DataSpec, read_description, require_known
from modules.decoding.options import DecodingOptions
from modules.ithn.settings import ITHNSettings
from modules.runtime.errors import InputError, did_you_mean
from modules.runtime.run_log import in_lines
from modules.runtime.settings import note_origin, part_of
from modules.training.settings import OptimSettings, SelfCriticalSettings

# Flags of R2Gen, R2GenCMN, XProNet, VisualGPT or the released ITHN that had no effect on results there, or are decided
# in another way here. The number of values that each takes: 0 (a switch) or 1.
_WITH_A_VALUE = (
    "logit_layers bos_idx eos_idx pad_idx output_logsoftmax decoding_constraint noamopt_warmup noamopt_factor d_vf "
    "sample local_rank img_num_protype text_num_protype gbl_num_protype weight_img_bce_loss weight_txt_bce_loss "
    "img_init_protypes_path text_init_protypes_path trained_model_path output log_file logs_folder"
)
IGNORED = dict.fromkeys(_WITH_A_VALUE.split(), 1) | {"test_after": 0, "split_train_data": 0}
WHY_IGNORED = {"d_vf": "inferred from the visual extractor"}
# VisualGPT's names for settings that have another name here.
ALIASES = {
    "workers": "num_workers",
    "random_seed": "seed",
    "gradient_accumulation_steps": "grad_accumulation",
    "num_train_epochs": "epochs",
    "max_grad_norm": "clip_norm",
    "optimizer_type": "optim",
    "head": "num_heads",
    "lr": "lr_ed",
}
# What --self_critical sets unless the flag is given, also over the settings of the weights that it starts from.
SELF_CRITICAL = {"lr_ve": 1e-5, "lr_ed": 1e-5, "lr_scheduler": "constant", "monitor_metric": "CIDEr"}

ASKING_FOR_ITHN = ("strategy", "ithn_variant")  # flags that ask for ITHN by being given, whatever their value
# Settings of ITHN that the plain backbone uses too, or that say whether ITHN is on.
WITHOUT_ITHN = ("ithn", "ce_weight")
_DESCRIBED = ("visual_extractor_config",)
_OF_EXTRACTOR = (
    *("visual_extractor", "visual_extractor_pretrained", "visual_extractor_weights", "freeze_visual_extractor"),
    *("unfreeze", "batch_norm", "image_feature", "lr_ve"),
)
LABEL_FILES = ("label_path", "label_columns")
_WITH_CHOICES = (OptimSettings, SelfCriticalSettings, DecodingOptions)
KINDS_OF_ITHN = ("ithn_variant", "contrastive_features")  # that contradict --ithn off


def stage_settings(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the flags ``given``: the ``settings`` of the weights, and over them the self-critical stage's.

    Which way a metric should go is taken over together with the metric only.
    """
    stage = SELF_CRITICAL if given.get("self_critical") else {}
    found = {**settings, **stage}
    if "monitor_metric" in given or "monitor_metric" in stage:
        found.pop("monitor_mode", None)
    return found


def boolean(text: str) -> bool:
    """A truth value in the usual spellings; argparse's type=bool would take any text as true.

    ArgumentTypeError for other text.
    """
    lowered = text.lower()
    if lowered in ("true", "t", "yes", "y", "1", "on"):
        return True
    if lowered in ("false", "f", "no", "n", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


_LAYOUT = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110)
_NAMED = {".pth": "--load", ".json": "--ann_path"}  # the flags of files that people give without one


class Parser(argparse.ArgumentParser):
    """argparse's parser, which reports a mistake as InputError and takes no abbreviated flags.

    An abbreviation would change its meaning, or lose it, with the next flag that begins alike.
    """

    def __init__(self, *, formatter_class: Any = _LAYOUT, allow_abbrev: bool = False, **options: Any):
        super().__init__(formatter_class=formatter_class, allow_abbrev=allow_abbrev, **options)

    def error(self, message: str) -> typing.NoReturn:
        """InputError with argparse's message and, where a name was mistyped, the nearest right one."""
        raise InputError(f"{message}{self._nearest(message)} (see {self.prog} --help)")

    def _nearest(self, message: str) -> str:
        """What the mistyped flags, or the mistyped choice, in argparse's ``message`` were most likely meant to be."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        if message.startswith("unrecognized arguments:"):
            flags = [flag for action in shown for flag in action.option_strings]
            named = [flag for end, flag in _NAMED.items() if message.endswith(end) and flag in flags]
            if named and "--" not in message:
                return f"; name it with {named[0]}"
            return did_you_mean((word.partition("=")[0] for word in message.split() if word[:2] == "--"), flags)
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            return did_you_mean(found[1], re.split(r"[\s,']+", found[2]))
        return ""


def build_parser(prog: str, description: str, *, testing: bool = False) -> argparse.ArgumentParser:
    """The parser of main_train.py and main_test.py; flags that were not given are absent from its result.

    Help for ``testing`` has what only training depends on in one group, the last.
    """
    parser = Parser(
        prog=prog, usage=f"{prog} [--flag value ...]", description=description, argument_default=argparse.SUPPRESS
    )
    groups: dict[str, Any] = {}
    idle = TRAIN_ONLY if testing else ()
    for item in sorted(dataclasses.fields(Config), key=lambda item: item.name in idle):
        group = "only training depends on these" if item.name in idle else item.metadata["group"]
        groups.setdefault(group, parser.add_argument_group(group))
        groups[group].add_argument(f"--{item.name}", **_argument(item))
    for name, count in IGNORED.items():
        how = {"nargs": "?"} if count else {"action": "store_true"}
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **how)
    for name in ALIASES:
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--use_amp", action="store_true", help=argparse.SUPPRESS)
    # torchrun takes both spellings.
    parser.add_argument("--max-restarts", type=int, dest="max_restarts", help=argparse.SUPPRESS)
    groups["backbone"].add_argument(
        "--backbone",
        choices=(*MODELS, *SYSTEMS),
        metavar="{" + ",".join((*MODELS, *SYSTEMS)) + "}",
        help="like --model_name, with that paper's published settings for --dataset_name as defaults; "
        + ", ".join(f"{name}: {model}" for name, model in SYSTEMS.items()),
    )
    what = "other defaults; small: for some hundred to some thousand reports, on a CPU (docs/YOUR_DATA.md)"
    groups["run"].add_argument("--preset", choices=PRESETS, metavar="{" + ",".join(PRESETS) + "}", help=what)
    return parser


def add_flags(
    parser: argparse.ArgumentParser, names: Collection[str], *, defaults: bool = False, shown: bool = False
) -> None:
    """Add the flags ``names`` of main_train.py to the parser of another program.

    With ``defaults`` they have main_train.py's. Otherwise a flag that is not given is absent from the result, because
    its default is stored in a checkpoint, and help shows none unless ``shown``.
    """
    for item in dataclasses.fields(Config):
        if item.name in names:
            parser.add_argument(
                f"--{item.name}",
                default=item.default if defaults else argparse.SUPPRESS,
                **_argument(item, show_default=defaults or shown),
            )


def given_flags(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the flags ``names`` that were given, by name."""
    return {name: vars(arguments)[name] for name in names if name in arguments}


def _argument(item: dataclasses.Field, *, show_default: bool = True) -> dict[str, Any]:
    kind, choices, default = _kind(item.type), item.metadata["choices"], item.default
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = item.metadata["help"]
    if show_default and shown not in ("", None):
        text += f" (default: {str(shown).replace('%', '%%')})"
    argument: dict[str, Any] = {"help": text, "metavar": "{" + ",".join(map(str, choices)) + "}" if choices else None}
    if typing.get_origin(item.type) is tuple:
        return argument | {"nargs": "+", "metavar": "X"}
    if kind is bool:
        return argument | {"type": boolean, "metavar": "{true,false}"}
    if "auto" in item.metadata:
        kind, argument["metavar"] = functools.partial(_number_or_auto, item.metadata["auto"]), "INT|auto"
    return argument | {"type": kind, "metavar": argument["metavar"] or kind.__name__.upper()}


def _number_or_auto(auto: int, text: str) -> int:
    if text != "auto" and not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number")
    return auto if text == "auto" else int(text)


def _kind(annotation: Any) -> type:
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _pair(name: str, parts: Sequence[Any]) -> tuple[float, float]:
    text = " ".join(map(str, parts)).replace("(", " ").replace(")", " ").replace(",", " ")
    try:
        values = tuple(float(part) for part in text.split())
    except ValueError:
        values = ()
    if len(values) != 2:
        raise InputError(f"--{name} {text.strip()}: must be two numbers, as in --{name} 0.9 0.98")
    return values


def parse_flags(
    argv: Sequence[str], prog: str, description: str, *, testing: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The flags that were given (``backbone`` included) by name, and lines for the log; InputError for a mistake.

    The lines name given flags that are ignored, and the values that --backbone sets.
    """
    return settle_flags(vars(build_parser(prog, description, testing=testing).parse_args(list(argv))))


def settle_flags(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same as ``parse_flags``, for flags that a parser of ``build_parser`` has read.

    InputError where two flags disagree.
    """
    ignored = [
        f"--{name} is accepted and ignored" + (f": {WHY_IGNORED[name]}" if name in WHY_IGNORED else "")
        for name in IGNORED
        if name in given
    ]
    given = {name: value for name, value in given.items() if name not in IGNORED}
    given = _apply_aliases(given)
    if given.pop("use_amp", False) and given.setdefault("precision", "float16") == "float32":
        raise InputError("--use_amp and --precision float32 disagree: give one of them")
    if "adam_betas" in given:
        given["adam_betas"] = _pair("adam_betas", given["adam_betas"])
    if "model_name" in given:
        given["model_name"] = given["model_name"].lower()
    backbone = given.get("backbone", "")
    model = SYSTEMS.get(backbone, backbone)
    if backbone and given.setdefault("model_name", model) != model:
        raise InputError(f"--backbone {backbone} and --model_name {given['model_name']} disagree: give one of them")
    return given, ignored + _preset_notes(given)


def flags_of_training(words: Sequence[str]) -> list[str]:
    """The flags among the ``words`` of a command line that have no effect when a model is only tested."""
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    return [f"--{name}" for name in names if ALIASES.get(name, name.replace("-", "_")) in TRAIN_ONLY]


def _preset_notes(given: Mapping[str, Any]) -> list[str]:
    backbone, name = given.get("backbone"), given.get("preset")
    dataset_name = (_description(given) | given).get("dataset_name", Config.dataset_name) if backbone else ""
    sources = [f"the published settings of {backbone} on {dataset_name}"] * bool(backbone)
    sources += [f"--preset {name}"] * bool(name)
    added = {flag: value for flag, value in preset(backbone, dataset_name, name).items() if flag not in given}
    shown = [f"--{flag} {' '.join(map(str, v)) if isinstance(v, tuple) else v}" for flag, v in added.items()]
    notes = in_lines(f"from {' and '.join(sources)}: ", shown, indent=2) if added else []
    published = preset(backbone, dataset_name) if backbone and name else {}
    replaced = [f"--{flag} {value}" for flag, value in published.items() if added.get(flag, value) != value]
    notes += in_lines(f"--preset {name} takes the place of the published ", replaced, indent=2) if replaced else []
    stored = ["settings stored in the checkpoint, if it has any, override this preset"]
    return notes + (stored if sources and (given.get("resume") or given.get("load")) else [])


def _apply_aliases(given: dict[str, Any]) -> dict[str, Any]:
    """Translate VisualGPT's names; InputError for a value that the target flag would not take."""
    kinds = {item.name: _kind(item.type) for item in dataclasses.fields(Config)}
    spelled = {name.lower(): name for name in Config.__dataclass_fields__["optim"].metadata["choices"]}
    for alias in [name for name in ALIASES if name in given]:
        target, text = ALIASES[alias], given.pop(alias)
        try:
            # VisualGPT's --num_train_epochs 3.0 is a float.
            value = spelled[text.lower()] if target == "optim" else kinds[target](float(text))
            if target != "optim" and value != float(text):
                raise ValueError(f"{text} is no whole number")
        except (ValueError, KeyError, OverflowError) as error:
            raise InputError(f"--{alias} {text}: not a value for --{target}") from error
        if given.setdefault(target, value) != value:
            raise InputError(f"--{alias} {text} and --{target} {given[target]} disagree: give one of them")
    return given


def resolve_config(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None, *, note: bool = True) -> Config:
    """Config from the flags ``given``, else those ``saved`` in a checkpoint, else presets', else defaults.

    A program that is named by a file is not run, and what a file names is not downloaded; without ``note``, of a
    Config to compare with, nothing is remembered of that. InputError where they are invalid.
    """
    names = {item.name for item in dataclasses.fields(Config)}
    values = {name: value for name, value in (saved or {}).items() if name in names - TYPED_ONLY}
    _require_kinds(values)
    if "adam_betas" in values:
        values["adam_betas"] = tuple(values["adam_betas"])
    given = dict(given)
    backbone, name = given.pop("backbone", None), given.pop("preset", None)
    trained_on = values.get("dataset_name")
    if trained_on is None:
        values = _description(given) | values
    elif "ann_path" in given or "dataset_name" in given:
        # A model is given images and texts as in its training; what data they are is a matter of the data.
        values |= {name: value for name, value in _description(given, saved).items() if name in FACTS}
    dataset_name = (values | given).get("dataset_name", Config.dataset_name)
    if trained_on not in (None, dataset_name) and not values.get("max_views"):
        values["max_views"] = DATASETS.get(trained_on, OTHER).max_views
    if given.get("ithn") == "off":  # what a checkpoint says of ITHN's kind is settled with it
        values = {flag: value for flag, value in values.items() if flag not in KINDS_OF_ITHN}
    values = preset(backbone, dataset_name, name) | values | given
    if values.get("model_name") == "r2gen":  # its memory is as wide as the decoder
        values.setdefault("rm_d_model", values.get("d_model", Config.d_model))
    config = Config(**values)
    from_file = not SELF_CRITICAL.keys() >= (saved or {}).keys()
    for flag in REMOTE if note else ():
        note_origin(getattr(config, flag), typed=not from_file or flag in given)
    return config


def data_set(ann_path: str | Path, dataset_name: str | None, **given: Any) -> tuple[str, DataSpec]:
    """Name and particulars of an annotation's data set, for programs with these and a few ``given`` flags alone.

    ``dataset_name`` None: as the dataset.json beside the annotation says, or the default.
    """
    named = {} if dataset_name is None else {"dataset_name": dataset_name}
    config = resolve_config({"ann_path": str(ann_path), **named, **given})
    return config.dataset_name, config.dataset


def _description(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The dataset.json beside the annotation of the flags ``given``; {} where they name another known data set.

    InputError where they name one that is not known, also not from the ``saved`` settings of a checkpoint.
    """
    path = given.get("ann_path", (saved or {}).get("ann_path", Config.ann_path))
    found = read_description(path)
    named = given.get("dataset_name")
    if named is None:
        return found
    if (saved or {}).get("dataset_name") != named:
        require_known(named, found, path)
    return found if found.get("dataset_name") == named else {}


def _require_kinds(saved: Mapping[str, Any]) -> None:
    """InputError for a setting stored in a checkpoint whose type is not its flag's."""
    for item in dataclasses.fields(Config):
        if item.name not in saved:
            continue
        value, kind = saved[item.name], _kind(item.type)
        if typing.get_origin(item.type) is tuple:
            fits = isinstance(value, (list, tuple)) and len(value) == 2 and all(_is(float, part) for part in value)
        else:
            fits = _is(kind, value) or (value is None and kind is not item.type)
        if not fits:
            raise InputError(
                f"the checkpoint's setting {item.name} is {str(value)[:60]!r}, not a value of --{item.name}: "
                "the file was edited, or written by another version"
            )


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) is kind


# ---- flags without effect on a run


def flags_in_effect(
    given: Mapping[str, Any],
    config: Config,
    *,
    testing: bool = False,
    loaded: bool = False,
    own_vocabulary: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """The flags ``given`` that this run depends on, and lines for the log that name the others and why.

    ``config`` is what all of them resolve to; ``loaded`` says that weights come from a checkpoint, and
    ``own_vocabulary`` that the vocabulary does too.
    """
    name = config.model_name
    own = part_of(config, settings_class(name))
    stored = settings_with("initial")
    stored = stored | settings_with("vocabulary") if own_vocabulary else stored - settings_with("vocabulary")
    ithn = part_of(config, ITHNSettings)
    labels = () if backbone_class(name).needs_labels or ithn.needs_labels else (*LABEL_FILES, "cluster_order")
    read = {backbone_class(name).tokenizer_files} if config.tokenizer == "bpe" else set()
    reasons: dict[str, Collection[str]] = {
        "only training depends on them": TRAIN_ONLY if testing else (),
        "stored in the checkpoint": stored if loaded else (),
        f"not settings of --model_name {name}": settings_of(*BACKBONE_SETTINGS) - settings_of(own) - read,
        f"--model_name {name} needs no labels": labels,
        "only an hf: visual extractor has one": () if config.visual_extractor.startswith("hf:") else _DESCRIBED,
        **ithn.idle_options,
        **own.idle_options,
        **dict(item for part in _WITH_CHOICES for item in part_of(config, part).idle_options.items()),
        "--detection_features take the place of a visual extractor": _OF_EXTRACTOR if config.detection_features else (),
        "the visual extractor is not trained": ("lr_ve",) if config.freeze_visual_extractor else (),
        "without --feature_cache no features are stored": () if config.feature_cache else ("feature_dtype",),
        "only --tokenizer subword depends on it": () if config.tokenizer == "subword" else ("subword_vocabulary",),
        "labels are predicted from the image": LABEL_FILES if testing and not own.reads_reference_labels else (),
    }
    left, lines = dict(given), []
    for reason, names in reasons.items():
        idle = [item.name for item in dataclasses.fields(Config) if item.name in left and item.name in names]
        if idle:
            lines.append(f"no effect here ({reason}): {', '.join(f'--{flag}' for flag in idle)}")
        left = {flag: value for flag, value in left.items() if flag not in idle}
    return left, lines


def asks_for_ithn(given: Collection[str]) -> bool:
    """Whether one of the flags ``given`` asks for ITHN; a Config cannot tell a default that was typed out."""
    return not set(ASKING_FOR_ITHN).isdisjoint(given)


def idle_without_ithn(given: Collection[str]) -> str | None:
    """A line for the log of a run without ITHN that names the flags ``given`` without effect there, if any."""
    idle = [
        f"--{item.name}"
        for item in dataclasses.fields(Config)
        if item.name in given and item.metadata["group"] in ("ITHN", "beyond ITHN") and item.name not in WITHOUT_ITHN
    ]
    return f"no effect here (ITHN is off): {', '.join(idle)}" if idle else None
