"""Every setting of a run as one typed, validated object; the command line is derived from it (modules/flags.py).

Config is put together from small frozen dataclasses, one for each concern. They are declared in the rooms that use them
and are built from a Config with ``part_of(config, OptimSettings)``; what belongs to no room is declared here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from models import MODELS, location
from models.settings import declared_presets, declared_settings
from modules.data.dataset_specs import DATASETS, OTHER, PRIOR_IMAGE, DataSpec, check_name, is_english, parse_contexts
from modules.data.settings import DataSettings
from modules.decoding.options import DecodingOptions
from modules.evaluation.metric_table import NEED_JAVA, XPRONET_SUM
from modules.evaluation.settings import ScoringSettings
from modules.ithn.settings import ITHNSettings
from modules.runtime.errors import InputError
from modules.runtime.settings import check_value, part_of, setting
from modules.training.settings import LoopSettings, OptimSettings, SelfCriticalSettings

BACKBONE_SETTINGS = tuple(declared_settings(name) for name in MODELS)
# Values of --preset: flags for a kind of data, whatever the backbone.
PRESETS: dict[str, dict[str, Any]] = {
    # Some hundred to some thousand reports, on a CPU; what each does for them is in docs/YOUR_DATA.md.
    "small": {
        "visual_extractor": "tf_efficientnet_lite0",
        "freeze_visual_extractor": True,
        "feature_cache": "results/features",
        "feature_grid": 3,
        "threshold": 1,
        "use_bn": 1,
        "d_model": 256,
        "d_ff": 512,
        "num_heads": 4,
        "num_layers": 1,
        "drop_prob_lm": 0.1,
        "cmm_size": 128,
        "cmm_dim": 256,
        "topk": 16,
        "embedding_dim": 128,
        "batch_size": 16,
        "length_bucketing": True,
        "epochs": 20,
        "lr_ed": 1.5e-3,
        "lr_scheduler": "CosineAnnealingLR",
        "monitor_metric": "nll",
        "guidance": 0.5,
        "num_workers": 0,
    }
}


def preset(backbone: str | None, dataset_name: str, name: str | None = None) -> dict[str, Any]:
    """Flag values by name: those of ``backbone``'s published run scripts for a data set, and over them PRESETS's.

    What a pretrained decoder of the published settings fixes stays.
    """
    own, spec = declared_presets(backbone) if backbone else {}, DATASETS.get(dataset_name)
    published = {**own.get("*", {}), **(spec.preset if spec else {}), **own.get(dataset_name, {})} if backbone else {}
    fixed = ("d_model", "num_heads") if published.get("gpt2_path") else ()
    return published | {flag: value for flag, value in PRESETS.get(name or "", {}).items() if flag not in fixed}


@dataclass(frozen=True)
class NetworkSettings:
    """The backbone, its visual extractor, its vocabulary and its labels."""

    model_name: str = setting("r2gencmn", "backbone", f"the backbone: {', '.join(MODELS)}", exported=True)
    visual_extractor: str = setting(
        "resnet101",
        "backbone",
        "torchvision or timm model that gives patch features; hf:FOLDER or hf:OWNER/NAME: a vision model of "
        "transformers, timm or open_clip; xrv:densenet121: torchxrayvision's, from --visual_extractor_weights",
        exported=True,
        remote=True,
    )
    visual_extractor_config: str = setting(
        "",
        "backbone",
        "architecture, mean, std and image size of an hf: visual extractor, as JSON; a run takes it from the folder "
        "and keeps it in its checkpoints",
        exported=True,
    )
    image_feature: str = setting(
        "mean",
        "backbone",
        "the image feature that ITHN contrasts: mean of the patches, or the class token of a visual extractor that has "
        "one",
        choices=("mean", "class"),
        exported=True,
    )
    visual_extractor_pretrained: bool = setting(
        True, "backbone", "start from ImageNet weights", train_only=True, initial=True
    )
    visual_extractor_weights: str = setting(
        "", "backbone", "start the visual extractor from this file instead", train_only=True, initial=True
    )
    freeze_visual_extractor: bool = setting(False, "backbone", "do not train the visual extractor")
    unfreeze: str = setting(
        "",
        "backbone",
        "train only a part of the visual extractor: last:N, its last N stages (blocks of a transformer) and what "
        "follows them; norm, its normalisation layers; bias, its biases; lora:RANK, low-rank adapters on the attention "
        "of a transformer; default: all of it",
        train_only=True,
        exported=True,
    )
    feature_grid: int = setting(
        0,
        "backbone",
        "average the patches of an image to a grid of N x N, which makes what follows, and --feature_cache, smaller; "
        "0: as the visual extractor gives them",
        low=0,
        high=64,
        exported=True,
    )
    feature_cache: str = setting(
        "",
        "backbone",
        "with a frozen visual extractor, or --unfreeze last:N: folder for the features of what is frozen, computed "
        "once without augmentation; training then takes minutes on a CPU",
    )
    feature_dtype: str = setting(
        "float32", "backbone", "type of the numbers in --feature_cache", choices=("float32", "float16")
    )
    batch_norm: str = setting(
        "joint",
        "backbone",
        "joint: one call for all views; per_view: each view normalised by its "
        "own statistics, as the published code does",
        choices=("joint", "per_view"),
        exported=True,
        train_only=True,
    )
    tokenizer: str = setting(
        "auto",
        "backbone",
        "word: words of the training reports; subword: pieces of words, learnt from the training reports, for any "
        "language; character: the characters of the training reports; bpe: GPT-2's byte pairs, from the files in "
        "--gpt2_path, or the tokenizer of --decoder; auto: bpe for VisualGPT and hf where these have one, else word",
        choices=("auto", "word", "subword", "character", "bpe"),
        exported=True,
        vocabulary=True,
    )
    subword_vocabulary: int = setting(
        2000,
        "backbone",
        "--tokenizer subword: most tokens; a pair of pieces seen less often than --threshold is not merged",
        low=1,
        exported=True,
        vocabulary=True,
    )
    label_path: str = setting(
        "data/iu_xray/labels.pickle",
        "labels",
        "labels of every study, for XProNet: a CSV file with columns "
        "id and the 14 classes (scripts/label_reports.py), or a pickled dictionary of arrays",
    )
    label_columns: str = setting(
        "",
        "labels",
        "order of a pickle's columns, which have no names: chexpert, chexbert "
        "(XProNet's IU X-Ray file), mimic_cxr (its MIMIC-CXR file) or 14 names separated by "
        "commas; a CSV file needs none",
    )
    cluster_order: str = setting(
        "chexpert",
        "labels",
        "order of the classes in a batch's labels and in XProNet's prototype matrix, named as for --label_columns: "
        "published prototypes and checkpoints have the order of the labels that they were made with",
        exported=True,
    )


# Dataclasses take up their bases from the last to the first: read upwards, this is the order of --help.
@dataclass(frozen=True)
class Config(
    ScoringSettings,
    LoopSettings,
    SelfCriticalSettings,
    OptimSettings,
    DecodingOptions,
    ITHNSettings,
    *BACKBONE_SETTINGS[::-1],
    NetworkSettings,
    DataSettings,
):
    """The resolved settings of one run; InputError names the flag and the value of a mistake."""

    # ---- run
    n_gpu: int = setting(
        1,
        "run",
        "number of GPUs, each with its own process; with --device cpu, number of processes; 0: the CPU. "
        "Ignored under torchrun, which has its own number",
        low=0,
        high=1024,
        typed_only=True,
    )
    max_restarts: int = setting(
        0,
        "run",
        "with several processes: how often all are restarted from the last checkpoint when one fails",
        low=0,
        effect=False,
        train_only=True,
    )
    sync_bn: bool = setting(
        False, "run", "batch normalisation with the statistics of all processes' samples", train_only=True
    )
    shard_parameters: bool = setting(
        False,
        "run",
        "with several processes: share weights, gradients and optimiser state out over them (torch's fully_shard), for "
        "decoders that do not fit on one card (docs/CLUSTER.md)",
        train_only=True,
    )
    activation_checkpointing: bool = setting(
        False,
        "run",
        "with --model_name hf: the decoder's layers compute again in the backward pass what they would keep",
        train_only=True,
        effect=False,
    )
    device: str = setting("auto", "run", "auto, cpu, cuda or cuda:N", effect=False)
    precision: str = setting(
        "float32",
        "run",
        "autocast type; auto: bfloat16 on GPUs that support it, otherwise float16 (Volta, Turing), float32 on the CPU",
        choices=("float32", "float16", "bfloat16", "auto"),
    )
    tf32: bool = setting(False, "run", "allow TF32 (10-bit mantissa) in float32 products of Ampere and later GPUs")
    compile: bool = setting(False, "run", "compile the objective with torch.compile", train_only=True)
    cuda_graph: bool = setting(
        False,
        "run",
        "on a GPU, record each training step once for every shape of its batches and replay it: for small batches",
        train_only=True,
    )
    deterministic: bool = setting(False, "run", "deterministic kernels only: runs on one machine are equal, but slower")
    seed: int = setting(
        9233,
        "run",
        "seed of weights, order and augmentation, and of --sample_method sample",
        low=0,
        high=2**63 - 1,
        exported=True,
    )
    resume: str = setting(
        "",
        "run",
        "continue the training of this checkpoint; auto: of the latest valid one in --save_dir, or start from scratch "
        "where there is none",
        effect=False,
        train_only=True,
    )
    load: str = setting(
        "",
        "run",
        "main_test.py: the checkpoint to test, or a folder of scripts/export.py (hf://OWNER/NAME on the hub); "
        "main_train.py: the checkpoint with the initial weights of a new run. The settings stored in it are defaults",
        effect=False,
    )

    # ---- results
    save_dir: str = setting("results/iu_xray", "results", "folder of checkpoints and results", effect=False)
    record_dir: str = setting("records/", "results", "folder of <dataset>.csv, with a line for each run", effect=False)
    exp_name: str = setting("", "results", "name of the run in records and report", effect=False)
    tensorboard: bool = setting(
        True, "results", "write TensorBoard curves (numbers only) into --save_dir", effect=False, train_only=True
    )
    report_samples: int = setting(40, "results", "studies shown in report.html", low=0, effect=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            check_value(item.name, getattr(self, item.name), item.metadata)
        check_name(self.dataset_name)
        location(self.model_name)  # InputError for an unknown one
        for part in type(self).__bases__:
            part_of(self, part)  # each checks its own settings together
        _check_together(self)

    @property
    def dataset(self) -> DataSpec:
        """What is particular to the data set: its entry in the table of data sets, and the flags over it."""
        spec = DATASETS.get(self.dataset_name, OTHER)
        captions = spec.captions if self.captions is None else self.captions
        return replace(
            spec,
            cleaner=self.cleaner or spec.cleaner,
            max_views=self.max_views or spec.max_views,
            captions=captions,
            clinical=spec.clinical and is_english(self.language) and not captions,  # the labels are of one report
        )

    @property
    def contexts(self) -> tuple[str, ...]:
        """The kinds of --context."""
        return parse_contexts(self.context)

    @property
    def captioning(self) -> bool:
        """Whether an image has several captions, each a training sample and all of them references."""
        return self.dataset.captions

    @property
    def labels_by_rules(self) -> bool:
        """Whether reports get labels by rules and clinical scores of them."""
        return self.clinical and self.dataset.clinical


def _check_together(config: Config) -> None:
    """InputError for flags that exclude one another."""
    _check_network(config)
    _check_inputs(config)
    _check_scores(config)
    _check_stage(config)
    for name in ("save_dir", "record_dir"):
        if not getattr(config, name):
            raise InputError(f"--{name} is empty: name a folder")
    if config.sync_bn and config.batch_norm == "per_view":
        # A process without a second view in its batch would leave the others waiting.
        raise InputError("--sync_bn true: needs --batch_norm joint, as processes may differ in the views they have")


def _check_network(config: Config) -> None:
    for name in ("compile", "self_critical", "sync_bn"):
        if config.shard_parameters and getattr(config, name):
            raise InputError(f"--shard_parameters true: does not go with --{name}; leave one of them out")
    if config.unfreeze and not re.fullmatch(r"(last|lora):[1-9]\d{0,3}|norm|bias", config.unfreeze):
        raise InputError(f"--unfreeze {config.unfreeze}: must be last:N (as last:1), lora:RANK, norm or bias")
    if config.unfreeze and config.freeze_visual_extractor:
        raise InputError(
            f"--unfreeze {config.unfreeze}: --freeze_visual_extractor true trains no part; leave --unfreeze out, or "
            "add --freeze_visual_extractor false where a preset or a checkpoint says true"
        )
    if config.d_model % config.num_heads:
        raise InputError(f"--d_model {config.d_model} cannot be divided by --num_heads {config.num_heads}")
    if config.d_model % 2:
        raise InputError(f"--d_model {config.d_model}: must be even (sinusoidal positions come in pairs)")
    for name in ("feature_cache", "image_cache", "length_bucketing", "detection_features"):
        if config.shards and getattr(config, name):
            off = "false" if name == "length_bucketing" else '""'
            raise InputError(f"--shards {config.shards}: does not go with --{name}; add --{name} {off}")


def _check_inputs(config: Config) -> None:
    if config.feature_cache and not config.freeze_visual_extractor and not config.unfreeze.startswith("last:"):
        raise InputError(
            f"--feature_cache {config.feature_cache}: only features of a frozen visual extractor can be cached; add "
            '--freeze_visual_extractor true, or --unfreeze last:N to train what lies above them, or --feature_cache ""'
        )
    if config.feature_cache and config.image_feature != "mean" and not config.unfreeze:
        raise InputError(f"--image_feature {config.image_feature}: --feature_cache keeps patches alone; give mean")
    if config.feature_grid and config.detection_features:
        raise InputError(f"--feature_grid {config.feature_grid}: --detection_features have no grid; give 0")
    if config.image_cache and config.feature_cache:
        raise InputError(f'--image_cache {config.image_cache}: with --feature_cache no image is read; set that to ""')
    if config.detection_features and (config.feature_cache or config.image_cache):
        cache = "feature_cache" if config.feature_cache else "image_cache"
        raise InputError(f'--{cache}: with --detection_features no image is read; give --{cache} ""')
    if config.contexts and config.image_feature != "mean":
        raise InputError(f"--image_feature {config.image_feature}: --context reads the mean of the patches; give mean")
    if config.contexts and config.captioning:
        raise InputError(f"--context {config.context}: does not go with captions of images; leave it out")
    if config.contexts and config.guidance:
        raise InputError(
            f"--context {config.context}: does not go with --guidance {config.guidance:g}; add --guidance 0 "
            f"(the preset small sets {PRESETS['small']['guidance']})"
        )
    if PRIOR_IMAGE in config.contexts and config.shards:
        raise InputError(f"--context {config.context}: --shards hold no images of the study before; give --image_dir")
    if config.detection_features and config.jpeg_draft:
        raise InputError("--jpeg_draft true: with --detection_features no image is read; leave one of them out")
    if config.detection_features and config.views == "separate":
        raise InputError("--views separate: --detection_features has one set of features per record; leave it out")


def _check_scores(config: Config) -> None:
    for name in ("chexbert_path", "radgraph_path", "radeval"):
        if getattr(config, name) and not config.dataset.clinical:
            data = f"--dataset_name {config.dataset_name}{' with --captions true' if config.captions else ''}"
            raise InputError(f"--{name}: scores radiology reports, and {data} has none")
    if config.monitor_metric.startswith("ce_") and not config.labels_by_rules:
        raise InputError(f"--monitor_metric {config.monitor_metric}: needs --clinical true and a radiology data set")
    if config.monitor_metric in (*NEED_JAVA, XPRONET_SUM.name) and not config.meteor:
        raise InputError(f"--monitor_metric {config.monitor_metric}: needs --meteor true")


def _check_stage(config: Config) -> None:
    for name in ("compile", "cuda_graph"):
        if config.self_critical and getattr(config, name):
            raise InputError(f"--{name}: not with --self_critical, whose steps generate reports; leave one of them out")
    if config.compile and config.cuda_graph:
        raise InputError("--cuda_graph: not with --compile; leave one of them out")
    if config.scst_reward == "clinical_f1" and not config.dataset.clinical:
        raise InputError(f"--scst_reward clinical_f1: there are no clinical labels on {config.dataset_name}")
    if config.start_eval_epoch > config.epochs:
        raise InputError(
            f"--start_eval_epoch {config.start_eval_epoch}: no epoch of --epochs {config.epochs} would be "
            "validated, so no best model could be chosen"
        )


def settings_with(fact: str, value: Any = True) -> frozenset[str]:
    """Names of the settings whose declaration says ``fact=value``."""
    return frozenset(item.name for item in fields(Config) if item.metadata.get(fact) == value)


def settings_of(*parts: Any) -> frozenset[str]:
    """Names of the settings of dataclasses ``parts``."""
    return frozenset(item.name for part in parts for item in fields(part))


def require_agreement(parts: Sequence[Any]) -> None:
    """ValueError where two of the dataclasses declare the same flag with different types, defaults or descriptions."""
    seen: dict[str, tuple[str, Any]] = {}
    for part in parts:
        for item in fields(part):
            if item.name not in part.__annotations__:  # inherited
                continue
            declaration = (item.type, item.default, dict(item.metadata))
            where, first = seen.setdefault(item.name, (part.__module__, declaration))
            if declaration != first:
                raise ValueError(
                    f"--{item.name} is declared in {where} and in {part.__module__} with another type, default or "
                    "description: declare it alike or name it differently (a default of one backbone belongs in its "
                    "PRESETS)"
                )


require_agreement(Config.__mro__[:-1])
# What older results were made with where they do not say.
OLDER_VALUES = {item.name: item.metadata.get("before", item.default) for item in fields(Config)}
# Another value gives the same results.
NO_EFFECT_ON_RESULTS = settings_with("effect", False)
# Without effect where a model is only tested.
TRAIN_ONLY = settings_with("train_only") | settings_of(ITHNSettings, OptimSettings, SelfCriticalSettings)
# Hub ids and addresses: what a checkpoint says there is not downloaded.
REMOTE = settings_with("remote")
# Never taken from a checkpoint.
TYPED_ONLY = settings_with("typed_only")
# Stored with exported weights: what decides their results, unless it names a file of this machine.
EXPORTED = settings_with("exported") | (
    settings_of(DecodingOptions, *BACKBONE_SETTINGS) - settings_with("train_only") - settings_with("file")
)
