"""Images to patch features: torchvision models by name, timm for the rest, folders and the hub, without their heads.

Shapes: B studies, N views, S patches of one view (a row-major grid), C = width of the features.
"""

import difflib
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn

from modules.layers.batch_statistics import KERNELS, StatisticsOfFirst
from modules.layers.hub_encoders import TimmTokens, build_encoder, is_hub_name, read_description
from modules.layers.partial_training import Trunk, freeze_all_but, resting
from modules.layers.visual_extractor_weights import load_weights, no_pickles, not_fetched, packaged_weights
from modules.runtime.transfers import upload

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESNETS = ("resnet", "resnext", "wide_resnet")
WITH_FEATURES = ("densenet", "efficientnet", "convnext", "mobilenet", "vgg")
# DenseNets of the package torchxrayvision, whose pixels lie between -1024 and 1024.
XRAY = "xrv:"
XRAY_MEAN, XRAY_STD = (0.5,) * 3, (0.5 / 1024,) * 3
FAMILIES = (*RESNETS, *WITH_FEATURES, "vit_")  # taken from torchvision, all others from timm


# Images that go through the model together are filled up to a multiple: cuDNN chooses, and tunes, for each number.
COUNTED_BY = {"cpu": 1, "cuda": 8}


def filled_up(rows: Tensor, multiple: int) -> Tensor:
    """``rows`` (n,) and its first entry again until their number is a multiple, (n + fewer than ``multiple``,)."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows[:1].expand(missing)]) if missing else rows


class VisualExtractor(nn.Module):
    """Patch features of every view of a study.

    ``weights`` is a file (.pth or .safetensors) in place of ImageNet weights. ``batch_norm`` "joint" runs all views in
    one call; "per_view" runs each view by itself, with batch statistics of its own, as in the published codes.
    ``frozen`` trains neither weights nor statistics; ``unfreeze`` names a part that is trained, the rest being frozen
    (partial_training). ``pooling``: "mean" of the patches, or the "class" token. ``grid``: the patches of a view are
    averaged to ``grid`` x ``grid``, 0 leaves them. A name hf:... needs its ``description`` (hub_encoders) and, where
    ``pretrained``, the ``folder`` of its weights.
    ValueError for an unknown name, a model without a grid of patches, a file that does not fit, or weights that cannot
    be downloaded.
    """

    def __init__(
        self,
        name: str = "resnet101",
        *,
        pretrained: bool = False,
        weights: str | None = None,
        batch_norm: str = "joint",
        channels_last: bool = False,
        frozen: bool = False,
        unfreeze: str = "",
        image_size: int = 224,
        pooling: str = "mean",
        grid: int = 0,
        description: str = "",
        folder: Path | None = None,
    ):
        super().__init__()
        if batch_norm not in ("joint", "per_view"):
            raise ValueError(f"batch_norm {batch_norm!r}: expected joint or per_view")
        self.batch_norm = batch_norm
        self.channels_last = channels_last
        self.frozen = frozen
        self.pooling = pooling
        self.grid = 0  # until it has been measured what there is to average
        with no_pickles():
            if is_hub_name(name):
                described = read_description(description)
                self.mean, self.std = described.mean, described.std
                source = folder if pretrained else None
                self.model = build_encoder(described, name, image_size, folder=source, weights=weights)
            else:
                build = _builder(name)
                self.model, self.mean, self.std = build(name, pretrained and not weights, weights, image_size)
        self.num_prefix_tokens: int = getattr(self.model, "num_prefix_tokens", 0)
        self.name, self.image_size = name, image_size
        if pooling == "class" and not (self._has_class_token and self.num_prefix_tokens):
            raise ValueError(f"image_feature class: visual_extractor {name} has no class token; give mean")
        try:
            self.width, self.patches_per_view = self._measure(image_size)
        except (RuntimeError, AssertionError, ZeroDivisionError, IndexError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"visual_extractor {name}: takes no image_size of {image_size} ({reason})") from error
        if grid:
            self._average_to(grid, name)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.trunk: Trunk | None = None
        self.unfreeze = unfreeze
        if unfreeze:
            freeze_all_but(self.model, unfreeze, name, lambda: self._measure(image_size))
        if frozen:
            self.requires_grad_(False)
            self.eval()

    def train(self, mode: bool = True) -> "VisualExtractor":
        super().train(mode and not self.frozen)
        for module in resting(self.model) if self.unfreeze else ():  # now: layers may have been replaced
            module.eval()
        return self

    def cut(self) -> Trunk:
        """The part below the trained stages (unfreeze "last:N"); from now on stored tensors of its own are taken.

        ValueError for a model that cannot be cut there.
        """
        training, device = self.training, next(self.parameters()).device
        example = torch.linspace(-1, 1, 6 * self.image_size**2, device=device).view(2, 3, *(self.image_size,) * 2)
        self.eval()
        self.trunk = Trunk(self.model, resting(self.model), self.name, example.cos())
        self.train(training)
        return self.trunk

    def forward(self, images: Tensor, view_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Patches (B, N*S, C) with view 0 first, their mask (B, N*S) and the mean over present patches (B, C).

        ``images`` (B, N, 3, H, W); ``view_mask`` (B, N) bool. Absent views are not run, so that they do not enter
        batch statistics; their patches are 0. The mask is None where every view is present. ``images`` may also be
        stored patches (B, N, S, C), with absent views 0, which are passed on; after ``cut`` what the trunk stored.
        """
        views = images.shape[1]
        found = None if view_mask is None or views == 1 else self._present(view_mask, images.device)
        if found is None:
            tokens = images if self._are_patches(images) else self._all_views(images)  # (B, N, S, C)
            if self.pooling == "class":
                return tokens[:, :, 1:].flatten(1, 2), None, _at_least_float32(tokens[:, :, 0]).mean(dim=1)
            patches = tokens.flatten(1, 2)
            return patches, None, _at_least_float32(patches).mean(dim=1)
        present, rows = found
        patches = images if self._are_patches(images) else self._present_views(images, rows)
        if self.pooling == "class":
            of_view, patches = _at_least_float32(patches[:, :, 0]), patches[:, :, 1:]
        else:
            of_view = _at_least_float32(patches).mean(dim=2)
        pooled = of_view.sum(dim=1) / present.sum(dim=1, keepdim=True)
        patch_mask = present.repeat_interleave(patches.size(2), dim=1)
        return patches.flatten(1, 2), patch_mask, pooled

    def _are_patches(self, images: Tensor) -> bool:
        return images.dim() == 4 and self.trunk is None

    def _all_views(self, images: Tensor) -> Tensor:
        if self.batch_norm == "per_view":
            return torch.stack([self._grid(images[:, view]) for view in range(images.size(1))], dim=1)
        return self._grid(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    @torch.compiler.disable(reason="reads which views are present")
    def _present(self, view_mask: Tensor, device: torch.device) -> tuple[Tensor, list[Tensor]] | None:
        """The mask on ``device``, and the rows of the present images among all B * N for each call of the model.

        None where no view is absent.
        """
        if bool(view_mask.all()):
            return None
        rows, calls = torch.arange(view_mask.numel(), device=view_mask.device).view_as(view_mask), [view_mask]
        if self.batch_norm == "per_view":
            views = torch.arange(view_mask.size(1), device=view_mask.device)
            calls = [view_mask & (views == view) for view in range(view_mask.size(1))]
        return upload(view_mask, device), [upload(rows[selected], device) for selected in calls if selected.any()]

    def _present_views(self, images: Tensor, rows: list[Tensor]) -> Tensor:
        flat = images.flatten(0, 1)
        grids = torch.cat([self._filled_up(flat, index) for index in rows])
        patches = grids.new_zeros(len(flat), *grids.shape[1:])  # of (present views, S, C)
        return patches.index_copy(0, torch.cat(rows), grids).unflatten(0, images.shape[:2])

    def _filled_up(self, images: Tensor, index: Tensor) -> Tensor:
        """``_grid`` of the ``images`` (B * N, ...) in ``index`` (n,), whose number is filled up to a multiple."""
        multiple = COUNTED_BY.get(images.device.type, COUNTED_BY["cuda"])
        if not self.model.training:
            return self._grid(images[filled_up(index, multiple)])[: len(index)]
        # A batch's statistics leave out what it is filled up with, where they are its own.
        if len(index) % multiple == 0 or len(index) == 1 or self._shares_statistics or torch.compiler.is_compiling():
            return self._grid(images[index])
        if not KERNELS.passes(images.device):
            return self._grid(images[index])
        with StatisticsOfFirst(len(index)):
            return self._grid(images[filled_up(index, multiple)])[: len(index)]

    @property
    def _shares_statistics(self) -> bool:
        return any(isinstance(module, nn.SyncBatchNorm) for module in self.model.modules())

    def _grid(self, images: Tensor) -> Tensor:
        """(n, 3, H, W), or stored (n, rows, columns), -> (n, S, C), after the class token (n, 1 + S, C) where it is
        the pooled feature.
        """
        if images.dim() == 3:
            assert self.trunk is not None
            return self._tokens(self.trunk.above(images))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self._tokens(self.model(images))

    def _tokens(self, features: Tensor) -> Tensor:
        if features.dim() == 4:
            return self._averaged(features).flatten(2).transpose(1, 2)
        patches = features[:, self.num_prefix_tokens :]
        if self.grid:
            side = math.isqrt(patches.size(1))
            patches = self._averaged(patches.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        return torch.cat([features[:, :1], patches], dim=1) if self.pooling == "class" else patches

    def _averaged(self, grids: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, C, grid, grid), or as they are."""
        return F.adaptive_avg_pool2d(grids, self.grid) if self.grid else grids

    def _average_to(self, grid: int, name: str) -> None:
        side = math.isqrt(self.patches_per_view)
        if side * side != self.patches_per_view:
            raise ValueError(f"feature_grid {grid}: the {self.patches_per_view} patches of {name} are no square grid")
        if grid > side:
            raise ValueError(f"feature_grid {grid}: at most {side}, as {name} gives {side} x {side} patches")
        self.grid, self.patches_per_view = grid, grid * grid

    @torch.no_grad()
    def _measure(self, image_size: int) -> tuple[int, int]:
        """(C, S), measured on one empty image."""
        training = self.model.training
        self.model.eval()
        features = self.model(torch.zeros(1, 3, image_size, image_size))
        self.model.train(training)
        self._require_grid(features)
        patches = self._tokens(features)
        return patches.size(2), patches.size(1) - (self.pooling == "class")

    @property
    def _has_class_token(self) -> bool:
        return getattr(self.model, "has_class_token", self.num_prefix_tokens > 0)

    def _require_grid(self, features: Any) -> None:
        """ValueError unless a square image's ``features`` are a map, or a square of tokens after those of no patch."""
        if isinstance(features, Tensor) and features.dim() == 4:
            return
        reason = "more than one tensor"
        if isinstance(features, Tensor):
            patches = len(features[0]) - self.num_prefix_tokens
            uncounted = self._has_class_token and not self.num_prefix_tokens  # the class token alone, or amidst patches
            if patches > 0 and math.isqrt(patches) ** 2 == patches and not uncounted:
                return
            reason = f"{len(features[0])} tokens" + (", a class token among them" if self._has_class_token else "")
        raise ValueError(f"visual_extractor {self.name}: gives no grid of patches ({reason})")


class _VisionTransformerPatches(nn.Module):
    """torchvision's ViT up to its last norm; the class token precedes the patches."""

    num_prefix_tokens = 1

    def __init__(self, vit: nn.Module):
        super().__init__()
        vit.heads = nn.Identity()
        self.vit: Any = vit

    def forward(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) -> (n, 1 + S, C)."""
        patches = self.vit.conv_proj(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.vit.class_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.vit.encoder(tokens)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _builder(name: str) -> Callable[[str, bool, str | None, int], tuple[nn.Module, tuple, tuple]]:
    """What makes the trunk ``name``, with mean and std of its pixels."""
    if name.startswith(XRAY):
        return _xray_trunk
    return _torchvision_trunk if name.startswith(FAMILIES) and name in torchvision.models.list_models() else _timm_trunk


def _xray_trunk(name: str, pretrained: bool, weights: str | None, image_size: int):
    if pretrained:
        raise ValueError(
            f"visual_extractor {name}: give its weights as a file with --visual_extractor_weights, or start from "
            "random ones with --visual_extractor_pretrained false"
        )
    architecture = name.removeprefix(XRAY)
    if not architecture.startswith("densenet") or architecture not in torchvision.models.list_models():
        raise ValueError(
            f"visual_extractor {name}: of torchxrayvision the DenseNets are known, such as xrv:densenet121"
        )
    trunk, _, _ = _torchvision_trunk(architecture, False, weights, image_size)
    return trunk, XRAY_MEAN, XRAY_STD


def _torchvision_trunk(name: str, pretrained: bool, weights: str | None, image_size: int):
    sizes = {"image_size": image_size} if name.startswith("vit_") else {}
    if pretrained and "IMAGENET1K_V1" not in torchvision.models.get_model_weights(name).__members__:
        raise not_fetched(name, ValueError("torchvision has no IMAGENET1K_V1 of it"))
    try:
        # The weights that the published codes start from.
        model = torchvision.models.get_model(name, weights="IMAGENET1K_V1" if pretrained else None, **sizes)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise not_fetched(name, error) from error
    except AssertionError as error:  # of a vision transformer
        raise ValueError(
            f"visual_extractor {name}: image_size {image_size} is not a multiple of its patch size"
        ) from error
    except ValueError as error:  # likewise, whose ImageNet weights have positions for one size
        raise ValueError(
            f"visual_extractor {name}: its ImageNet weights do not fit --image_size {image_size}; give "
            "--image_size 224, a model of timm such as vit_base_patch16_224, whose positions are interpolated, or "
            "--visual_extractor_pretrained false"
        ) from error
    if weights:
        load_weights(model, weights)
    if name.startswith(RESNETS):
        trunk: nn.Module = nn.Sequential(*list(model.children())[:-2])  # keys 0..7, as published
    elif name.startswith("vit_"):
        trunk = _VisionTransformerPatches(model)
    elif name.startswith("densenet"):
        trunk = nn.Sequential(model.features, nn.ReLU(inplace=True))
    else:
        trunk = model.features
    return trunk, IMAGENET_MEAN, IMAGENET_STD


def _timm_trunk(name: str, pretrained: bool, weights: str | None, image_size: int):
    import timm

    if not name.startswith(("hf_hub:", "hf-hub:")) and not timm.is_model(name.split(".")[0]):
        served = [known for known in torchvision.models.list_models() if known.startswith(FAMILIES)]
        known = dict.fromkeys(served + timm.list_models())
        close = ", ".join(difflib.get_close_matches(name, known, n=3)) or "resnet101, densenet121, vit_b_16"
        raise ValueError(f"visual_extractor {name!r}: neither torchvision nor timm has it; did you mean {close}?")
    packaged = packaged_weights(name) if pretrained else None
    config = _timm_config(name)
    try:
        resized = config is not None and config.fixed_input_size and config.input_size[-1] != image_size
        sizes: dict[str, Any] = {"img_size": image_size} if resized else {}
        model: Any = timm.create_model(name, pretrained=pretrained and packaged is None, **sizes)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise not_fetched(name, error) from error
    if file := weights or packaged:
        load_weights(model, file)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    return TimmTokens(model), tuple(mean), tuple(std)


def _timm_config(name: str) -> Any:
    """What timm knows of the weights ``name``, NAME.TAG, None where that is nothing."""
    import timm

    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        tags = ", ".join(known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*"))
        raise ValueError(
            f"visual_extractor {name}: timm has no weights {tag} of {architecture}; expected {architecture} alone, "
            f"or one of {tags or 'none'} after the point"
        ) from error
