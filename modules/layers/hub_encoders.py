"""Vision models as transformers, timm and open_clip save them, as patch features: ``--visual_extractor hf:...``.

A folder is described once, as JSON with its architecture, mean, std and size; a checkpoint keeps the description, so
that its model is built without the folder. No code of a folder is run, and its weights come from safetensors or
through torch's weights_only reader.

Shapes: n images, S patches of one image (a row-major grid), C = width of the features.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modules.layers.size_limits import require_moderate
from modules.layers.visual_extractor_weights import load_state, read_weights
from modules.runtime.hub import MODEL, download_model
from modules.runtime.input_files import read_json, require_regular_folder

logger = logging.getLogger("ithn")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
OPEN_CLIP = "open_clip_config.json"
# What timm's towers are called in open_clip's weights.
OPEN_CLIP_TRUNK = "visual.trunk."
LOCAL = {"local_files_only": True, "trust_remote_code": False}
# Entries of a configuration that are about files, code or classes, not about the architecture.
_NOT_ARCHITECTURE = (
    "id2label",
    "label2id",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
)


class Encoder(NamedTuple):
    """A model type of transformers."""

    prefix: Callable[[Any], int] = lambda config: 0  # class and register tokens before the patches
    unused: tuple[str, ...] = ()  # parameters that no patch depends on
    tiled: bool = True  # whether the image must be a multiple of the patch


def _one(config: Any) -> int:
    return 1


def _with_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


ENCODERS = {
    "vit": Encoder(_one),
    "deit": Encoder(lambda config: 2),
    "beit": Encoder(_one),
    "data2vec-vision": Encoder(_one),
    "ijepa": Encoder(),
    "dinov2": Encoder(_one),
    "dinov2_with_registers": Encoder(_with_registers),
    "dinov3_vit": Encoder(_with_registers),
    "dinov3_convnext": Encoder(_one, tiled=False),
    "swin": Encoder(tiled=False),
    "swinv2": Encoder(tiled=False),
    "cvt": Encoder(tiled=False),
    "convnext": Encoder(unused=("layernorm.",), tiled=False),
    "convnextv2": Encoder(unused=("layernorm.",), tiled=False),
    "resnet": Encoder(tiled=False),
    "clip_vision_model": Encoder(_one, unused=("post_layernorm.",)),
    "siglip_vision_model": Encoder(unused=("head.",)),
}
# Models of image and text, by the type of their vision tower.
TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# Left out of checkpoints at times, and of no use for patches.
_UNUSED = ("pooler.", "embeddings.mask_token")


def is_hub_name(name: str) -> bool:
    """Whether --visual_extractor ``name`` means a folder or a model of the hub."""
    return name.startswith(MODEL)


def find_encoder(name: str) -> Path:
    """The folder that ``name`` (hf:FOLDER, hf:OWNER/NAME) means, downloaded once where it is a hub id.

    ValueError where there is none.
    """
    where = name.removeprefix(MODEL)
    if Path(where).is_dir():
        return Path(where)
    if not where or where.startswith((".", "/", "~")) or where.count("/") != 1:
        raise ValueError(f"visual_extractor {name}: no such folder, nor a hub id (hf:OWNER/NAME)")
    return download_model(where, flag="--visual_extractor", prefix=MODEL, needs_vocabulary=False)


def describe_encoder(folder: Path) -> str:
    """JSON of the vision model in ``folder``: library, architecture, mean, std, size. ValueError where it has none."""
    require_regular_folder(folder, "--visual_extractor")
    name = OPEN_CLIP if (folder / OPEN_CLIP).is_file() else "config.json"
    try:
        found = _read_object(folder, name)
        if name == OPEN_CLIP:
            described = _describe_open_clip(found)
        elif "architecture" in found:
            described = _describe_timm(found)
        else:
            described = _describe_transformers(found, folder)
        _checked(described)
    except (ValueError, TypeError) as error:
        raise ValueError(f"visual_extractor {MODEL}{folder}: {error}") from error
    return json.dumps(described, sort_keys=True)


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = read_json(folder / name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} is not a JSON object")
    return found


def _section(found: dict, name: str) -> dict[str, Any]:
    """The object called ``name`` in a file, empty where there is none."""
    section = {} if found.get(name) is None else found[name]
    if not isinstance(section, dict):
        raise ValueError(f"its {name} {section!r} is not a JSON object")
    return section


def _describe_open_clip(found: dict) -> dict[str, Any]:
    tower = _section(_section(found, "model_cfg"), "vision_cfg")
    if "timm_model_name" not in tower:
        raise ValueError(f"its vision tower is not timm's; expected timm_model_name in {OPEN_CLIP}")
    look = _section(found, "preprocess_cfg")
    return {
        "library": "timm",
        "architecture": tower["timm_model_name"],
        "args": {},
        "mean": look.get("mean", IMAGENET["mean"]),
        "std": look.get("std", IMAGENET["std"]),
        "size": tower.get("image_size", 224),
    }


def _describe_timm(found: dict) -> dict[str, Any]:
    look, given = _section(found, "pretrained_cfg"), _section(found, "model_args")
    return {
        "library": "timm",
        "architecture": found["architecture"],
        "args": given,
        "mean": look.get("mean", IMAGENET["mean"]),
        "std": look.get("std", IMAGENET["std"]),
        "size": _side(look.get("input_size")) or 224,
    }


def _describe_transformers(found: dict, folder: Path) -> dict[str, Any]:
    kind = found.get("model_type")
    if kind not in (*ENCODERS, *TOWERS):
        raise ValueError(
            f"model_type {kind!r} is not one that gives a grid of patches here: {', '.join((*ENCODERS, *TOWERS))}"
        )
    if kind in TOWERS:
        found = _configuration(kind, found).vision_config.to_dict()
        kind = TOWERS[kind]
    look = _preprocessing(folder)
    if look is None:
        logger.warning("%s has no preprocessor_config.json: ImageNet's mean and std are used", folder)
        look = {}
    size = look.get("crop_size") if look.get("do_center_crop") else None
    sides = _side(size) or _side(look.get("size")) or _side(found.get("image_size")) or 224
    normal = look.get("do_normalize", True)
    return {
        "library": "transformers",
        "config": architecture(found) | {"model_type": kind},
        "mean": look.get("image_mean", IMAGENET["mean"]) if normal else [0.0] * 3,
        "std": look.get("image_std", IMAGENET["std"]) if normal else [1.0] * 3,
        "size": sides,
    }


def _configuration(kind: str, entries: dict[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _made(CONFIG_MAPPING[kind].from_dict, entries)


def _made(make: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """What a library's ``make`` makes of a configuration; TypeError, in a line, where that is none."""
    try:
        return make(*values, **options)
    except Exception as error:  # the libraries check with exceptions of many kinds, or not at all
        raise TypeError(" ".join(str(error).split())[:200]) from error


def architecture(entries: dict[str, Any]) -> dict[str, Any]:
    """The ``entries`` of a configuration of transformers that say what is computed, none that names code or kernels."""
    return {
        name: value
        for name, value in entries.items()
        if name not in _NOT_ARCHITECTURE and not name.startswith("_") and "attn_implementation" not in name
    }


def _preprocessing(folder: Path) -> dict[str, Any] | None:
    """What transformers saved of the image processor; None where there is nothing."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = _read_object(folder, name)
            look = found if "image_processor" not in found else _section(found, "image_processor")
            factor = look.get("rescale_factor", 1 / 255)
            if look.get("do_rescale", True) and not math.isclose(factor, 1 / 255, rel_tol=1e-3):
                raise ValueError(f"{name} has the rescale_factor {factor:g}; pixels are divided by 255 here")
            return look
    return None


def _side(size: Any) -> int | None:
    """The side of an image that ``size`` means in any of transformers' spellings."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    elif isinstance(size, list):
        size = size[-1] if size else None
    return size if isinstance(size, int) else None


class Described(NamedTuple):
    """A description that was read and checked."""

    library: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    entries: dict[str, Any]


def read_description(text: str) -> Described:
    """What ``describe_encoder`` wrote; ValueError for anything else."""
    try:
        return _checked(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"visual_extractor_config: not the description of a vision model ({error})") from error


def _checked(found: Any) -> Described:
    mean, std = _three(found, "mean"), _three(found, "std")
    if not all(value > 0 for value in std):
        raise ValueError(f"std {found['std']} is not above 0")
    size = int(found["size"])
    if found["library"] not in BUILDERS or size < 1:
        raise ValueError("of an unknown library or size")
    require_moderate(found)
    return Described(found["library"], mean, std, size, found)


def _three(found: Any, name: str) -> tuple[float, ...]:
    """The values called ``name``, one for each of the three channels of the images."""
    values = found[name]
    numbers = tuple(map(float, values)) if isinstance(values, list | tuple) else ()
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} {values} is not 3 numbers, one for each channel")
    return numbers * (3 // len(numbers))


def build_encoder(
    described: Described, name: str, image_size: int, *, folder: Path | None = None, weights: str | None = None
) -> nn.Module:
    """The described model as images (n, 3, H, W) -> tokens (n, prefix + S, C) or maps (n, C, h, w).

    Its weights are those of ``folder``, or of the file ``weights``, else drawn at random. ValueError where they do not
    fit, or the model takes no ``image_size``.
    """
    try:
        return BUILDERS[described.library](described, name, image_size, folder, weights)
    except (TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:  # of one that is none
        raise ValueError(f"visual_extractor {name}: its configuration describes no model ({error})") from error


class TransformersTokens(nn.Module):
    """A transformers vision model up to its last hidden states; ``num_prefix_tokens`` of them precede the patches."""

    def __init__(self, model: Any, encoder: Encoder):
        super().__init__()
        self.model: Any = model
        self.num_prefix_tokens = encoder.prefix(model.config)
        self.one_channel = getattr(model.config, "num_channels", 3) == 1
        self.options = {"interpolate_pos_encoding": True} if _interpolates(model) else {}
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith((*_UNUSED, *encoder.unused)):
                parameter.requires_grad_(False)  # no patch depends on it

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, prefix + S, C) or (n, C, h, w)."""
        images = images.mean(1, keepdim=True) if self.one_channel else images
        return self.model(pixel_values=images, **self.options).last_hidden_state


def _interpolates(model: Any) -> bool:
    import inspect

    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def _build_transformers(
    described: Described, name: str, image_size: int, folder: Path | None, weights: str | None
) -> nn.Module:
    import transformers

    entries = dict(described.entries["config"])
    kind = entries.pop("model_type")
    encoder = ENCODERS[kind]
    config = _configuration(kind, architecture(entries))
    patch = getattr(config, "patch_size", None)
    if encoder.tiled and isinstance(patch, int) and image_size % patch:
        raise ValueError(
            f"visual_extractor {name}: image_size {image_size} is no multiple of its patch size {patch}; "
            f"{image_size // patch * patch or patch} is the nearest below"
        )
    model_class: Any = transformers.MODEL_MAPPING[type(config)]
    if folder is None or weights:
        model = _made(model_class, config)
        if weights:
            load_state(
                model,
                read_weights(weights),
                f"visual_extractor_weights {weights}",
                optional=(*_UNUSED, *encoder.unused),
            )
    else:
        model = _with_own_weights(model_class, folder, config, name, encoder.unused)
    return TransformersTokens(model, encoder)


def _with_own_weights(model_class: Any, folder: Path, config: Any, name: str, unused: tuple[str, ...]) -> nn.Module:
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, report = model_class.from_pretrained(
            folder, config=config, **LOCAL, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # damaged files surface as whatever their readers raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"visual_extractor {name}: its weights cannot be loaded: {reason}") from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith((*_UNUSED, *unused)))
    if missing:
        raise ValueError(f"visual_extractor {name}: its weights lack {len(missing)} tensors, such as {missing[0]}")
    return model


# What timm leaves of a head: forward_features does not use it.
_BEHIND_FEATURES = ("head.", "fc_norm.", "conv_head.", "norm_head.")


class TimmTokens(nn.Module):
    """A timm model's feature grid (n, C, h, w), or its tokens, of which ``num_prefix_tokens`` precede the patches."""

    def __init__(self, model: Any):
        super().__init__()
        try:
            model.reset_classifier(0, "")
        except AssertionError:  # of models that always pool, which forward_features does not
            model.reset_classifier(0)
        for key, value in model.named_parameters():
            if key.startswith(_BEHIND_FEATURES):  # several processes wait for the gradient of whatever is trained
                value.requires_grad_(False)
        self.model: Any = model
        self.channels_are_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        # Prefixes of registers alone have none.
        self.has_class_token = any(key.split(".")[-1] == "cls_token" for key, _ in model.named_parameters())
        self.one_channel = _in_channels(model) == 1

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, C, h, w) or (n, prefix + S, C)."""
        images = images.mean(1, keepdim=True) if self.one_channel else images
        features = self.model.forward_features(images)
        return features.permute(0, 3, 1, 2) if self.channels_are_last and features.dim() == 4 else features


def _in_channels(model: nn.Module) -> int:
    return next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 3)


def _build_timm(
    described: Described, name: str, image_size: int, folder: Path | None, weights: str | None
) -> nn.Module:
    import timm

    architecture, given = str(described.entries["architecture"]), dict(described.entries["args"])
    if ":" in architecture or not timm.is_model(architecture.split(".")[0]):
        raise ValueError(f"visual_extractor {name}: timm has no architecture {architecture!r}")
    # None that makes timm read a file or ask a server.
    sizes = {key: value for key, value in given.items() if not key.startswith(("pretrained", "checkpoint", "cache"))}
    sizes |= {"num_classes": 0} | _timm_size(architecture, image_size)
    model = _made(timm.create_model, architecture, pretrained=False, **sizes)
    if weights:
        state, where = read_weights(weights), f"visual_extractor_weights {weights}"
    elif folder is not None:
        state, where = _timm_weights(folder, name), f"visual_extractor {name}"
    else:
        return TimmTokens(model)
    load_state(model, state, where)
    return TimmTokens(model)


def _timm_size(architecture: str, image_size: int) -> dict[str, Any]:
    """The argument of models whose weights depend on the image's size."""
    import timm

    config = _made(timm.get_pretrained_cfg, architecture)
    return {"img_size": image_size} if config is not None and config.fixed_input_size else {}


def _timm_weights(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of timm's folder, or of the vision tower in open_clip's."""
    names = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")
    found = next((folder / file for file in names if (folder / file).is_file()), None)
    if found is None:
        raise ValueError(f"visual_extractor {name}: no weights in its folder, expected one of {', '.join(names)}")
    state = read_weights(str(found))
    tower = {
        key.removeprefix(OPEN_CLIP_TRUNK): value for key, value in state.items() if key.startswith(OPEN_CLIP_TRUNK)
    }
    return tower or state


BUILDERS: dict[str, Callable[[Described, str, int, Path | None, str | None], nn.Module]] = {
    "transformers": _build_transformers,
    "timm": _build_timm,
}
