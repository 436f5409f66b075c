"""Each backbone's published training settings: what ``--backbone`` sets beneath the flags that the user gives."""

from collections.abc import Mapping
from typing import Any

from modules.data.dataset_specs import DATASETS

# The papers' run scripts; everything else keeps its default.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "r2gen": {
        "batch_size": 16,
        "lr_ve": 5e-5,
        "lr_ed": 1e-4,
        "lr_scheduler": "StepLR",
        "step_size": 50,
        "gamma": 0.1,
        "epochs": 100,
        "adam_betas": (0.9, 0.999),
        "adam_eps": 1e-8,
        "amsgrad": True,
        "weight_decay": 5e-5,
        "clip_value": 0.1,
        "seed": 9223,
        "views": "paired",
    },
    "r2gencmn": {
        "batch_size": 16,
        "lr_ve": 1e-4,
        "lr_ed": 5e-4,
        "lr_scheduler": "StepLR",
        "step_size": 10,
        "gamma": 0.8,
        "epochs": 100,
        "seed": 7580,
        "topk": 32,
        "views": "paired",
    },
    "xpronet": {
        "batch_size": 16,
        "lr_ve": 1e-3,
        "lr_ed": 2e-3,
        "lr_scheduler": "StepLR",
        "step_size": 10,
        "gamma": 0.8,
        "epochs": 30,
        "topk": 15,
        "num_protype": 20,
        "num_cluster": 14,
        "d_img_ebd": 2048,
        "d_txt_ebd": 768,
        "cluster_order": "chexbert",
        "weight_img_con_loss": 1.0,
        "weight_txt_con_loss": 0.1,
        "flip": False,
        "drop_last": True,
        "views": "paired",
        "seed": 7580,
    },
    "visualgpt": {
        "gpt2_path": "gpt2",
        "d_model": 768,
        "num_heads": 12,
        "gpt2_layers": 12,
        "num_layers": 3,
        "d_ff": 2048,
        "tau": 0.2,
        "batch_size": 25,
        "grad_accumulation": 2,
        "drop_last": True,
        "optim": "AdamW",
        "lr_ve": 1e-4,
        "lr_ed": 1e-4,
        "adam_betas": (0.9, 0.999),
        "adam_eps": 1e-8,
        "amsgrad": False,
        "weight_decay": 0.01,
        "lr_scheduler": "constant",
        "clip_norm": 1.0,
        "epochs": 100,
        "beam_size": 5,
        "seed": 42,
    },
}
# What a paper changes on one data set, beside what all change there (DataSpec.preset).
_PUBLISHED_ON: dict[str, dict[str, dict[str, Any]]] = {
    "r2gen": {"mimic_cxr": {"epochs": 30, "step_size": 1, "gamma": 0.8, "seed": 456789}},
    "r2gencmn": {"mimic_cxr": {"epochs": 30, "step_size": 3, "seed": 9153}},
    "xpronet": {"mimic_cxr": {"lr_ve": 5e-5, "lr_ed": 1e-4, "step_size": 3, "cluster_order": "mimic_cxr"}},
    "visualgpt": {"coco": {"collapse_repeats": True}},
}
# What --self_critical sets beneath the flags given, above the settings of the weights that it starts from.
SELF_CRITICAL: dict[str, Any] = {"lr_ve": 1e-5, "lr_ed": 1e-5, "lr_scheduler": "constant", "monitor_metric": "CIDEr"}
BACKBONES = tuple(_PUBLISHED)


def preset(backbone: str, dataset_name: str) -> dict[str, Any]:
    """Flag values by name of ``backbone`` on ``dataset_name``."""
    spec = DATASETS.get(dataset_name)
    own = _PUBLISHED_ON[backbone].get(dataset_name, {})
    return {**_PUBLISHED[backbone], **(spec.preset if spec else {}), **own}


def stage_settings(given: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flags beneath those given: ``settings`` of the weights, and above them those of the self-critical stage."""
    return {**settings, **(SELF_CRITICAL if given.get("self_critical") else {})}
