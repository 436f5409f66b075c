"""XProNet: a cross-modal network that reads prototypes of a study's labels (Wang et al., ECCV 2022, arXiv 2207.04818).

Shapes: B studies, T tokens or visual tokens, d = d_model, h heads of width w, C classes, M = C * num_protype prototypes
(class c in rows c * num_protype onwards).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Output, VisualFeatures
from models.transformer_base import EncoderDecoder, Session, Transformer, TransformerBackbone, TransformerSettings
from modules.decoding.options import DecodingOptions
from modules.layers.prototypes import PrototypeResponse, label_contrastive_loss, prototypes_of, with_no_finding
from modules.layers.transformer import PatchEmbedding
from modules.runtime.errors import InputError
from modules.runtime.settings import setting

# The published run scripts; everything else keeps its default.
PRESETS = {
    "*": {
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
    "mimic_cxr": {"lr_ve": 5e-5, "lr_ed": 1e-4, "step_size": 3, "cluster_order": "mimic_cxr"},
}


@dataclass(frozen=True)
class Settings(TransformerSettings):
    """XProNet's settings; InputError where they do not go together."""

    topk: int = setting(32, "backbone", "memory rows (XProNet: prototypes) that a query reads", low=1)
    init_protypes_path: str = setting(
        "data/iu_xray/init_protypes_512.pt",
        "XProNet",
        "initial prototypes, written by scripts/build_prototypes.py or published; an empty name draws them at random",
        train_only=True,
        file=True,
        initial=True,
    )
    num_cluster: int = setting(20, "XProNet", "classes that have prototypes; the labels have 14", low=1, shapes=True)
    num_protype: int = setting(10, "XProNet", "prototypes of each class", low=1, shapes=True)
    d_img_ebd: int = setting(512, "XProNet", "width of a prototype's image part", low=1, shapes=True)
    d_txt_ebd: int = setting(768, "XProNet", "width of a prototype's text part", low=0, shapes=True)
    weight_img_con_loss: float = setting(
        1.0, "XProNet", "weight of the images' contrastive loss", low=0.0, train_only=True
    )
    weight_txt_con_loss: float = setting(
        1.0, "XProNet", "weight of the reports' contrastive loss", low=0.0, train_only=True
    )
    img_con_margin: float = setting(
        0.4, "XProNet", "cosine above which unlike images are pushed apart", low=-1.0, high=1.0, train_only=True
    )
    txt_con_margin: float = setting(
        0.4, "XProNet", "cosine above which unlike reports are pushed apart", low=-1.0, high=1.0, train_only=True
    )
    xpronet_labels: str = setting(
        "predicted",
        "XProNet",
        "labels that generation uses: predicted from the image (each with a probability above 0.5, No Finding where "
        "there is none); or reference: those of --label_path, as published, which come from the reference report and "
        "leak it",
        choices=("predicted", "reference"),
    )
    label_loss_weight: float = setting(
        1.0, "XProNet", "weight of the binary cross entropy that trains the predicted labels", low=0.0, train_only=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        prototypes = self.num_cluster * self.num_protype
        if self.topk > prototypes:
            raise InputError(
                f"--topk {self.topk}: --num_cluster {self.num_cluster} times --num_protype {self.num_protype} are only "
                f"{prototypes} prototypes"
            )
        if self.xpronet_labels == "predicted" and not self.label_loss_weight:
            raise InputError(
                "--label_loss_weight 0 trains no predicted labels: give it a weight, or --xpronet_labels reference"
            )

    @property
    def reads_reference_labels(self) -> bool:
        return self.xpronet_labels == "reference"


@dataclass
class Prototypes:
    """The projected prototypes of a pass, and which of them each study reads."""

    keys: Tensor  # (h, M, w)
    values: Tensor  # (h, M, w)
    selected: Tensor  # (B, M) bool


class PrototypeNetwork(EncoderDecoder):
    """The encoder-decoder whose visual tokens and words read prototypes; a linear layer fuses the response."""

    def __init__(self, image_dim: int, num_ids: int, settings: Settings):
        super().__init__()
        d_model, prototype_dim = settings.d_model, settings.d_img_ebd + settings.d_txt_ebd
        prototypes = torch.empty(settings.num_cluster * settings.num_protype, prototype_dim)
        self.protypes = nn.Parameter(nn.init.xavier_uniform_(prototypes))
        self.att_embed = PatchEmbedding(image_dim, d_model, settings.drop_prob_lm, settings.use_bn)
        self.dim_reduction = nn.Linear(prototype_dim, d_model)
        self.fuse_feature = nn.Linear(2 * d_model, d_model)
        self.cmn = PrototypeResponse(d_model, settings.num_heads, settings.topk)
        self.model = Transformer(num_ids, settings, cmn=self.cmn, fuse_feature=nn.Linear(2 * d_model, d_model))
        self.logit = nn.Linear(d_model, num_ids)

    def memory(self, labels: Tensor | None) -> Prototypes:
        """The prototypes for studies with multi-hot ``labels`` (B, C), each row with a positive."""
        assert labels is not None
        keys, values = self.cmn.keys_values(self.dim_reduction(self.protypes))
        return Prototypes(keys, values, prototypes_of(labels, len(self.protypes)))

    def read(self, x: Tensor, memory: Any, *, words: bool) -> tuple[Tensor, Tensor]:
        """``x`` (B, T, d) fused with the prototypes' response to it, and the response."""
        response = self.cmn(x, memory.keys, memory.values, memory.selected)
        fuse = self.model.fuse_feature if words else self.fuse_feature
        return fuse(torch.cat([x, response], dim=-1)), response


class XProNet(TransformerBackbone):
    """The published model and a classification head that predicts the labels from the image.

    ``num_ids`` = V+1 rows of embedding and logits, ``visual_extractor`` has ``width``; ``no_finding`` is the class of a
    study without a positive label. ``init_prototypes`` (M, d_img_ebd + d_txt_ebd) starts the prototypes, None draws
    them.

    In training the given labels choose the prototypes. In generation the head's do, a probability above one half being
    positive: the given ones come from the reference report, and are used only where ``xpronet_labels`` is "reference",
    as the published code does. ValueError for a ``no_finding`` that is not a class.
    """

    published_entries = "encoder_decoder.protypes"
    needs_labels = True
    resources = ("prototypes",)

    def __init__(
        self,
        *,
        visual_extractor: Any,
        num_ids: int,
        settings: Settings,
        no_finding: int,
        init_prototypes: Tensor | None = None,
    ):
        super().__init__(visual_extractor, settings)
        if not 0 <= no_finding < settings.num_cluster:
            raise ValueError(f"no_finding {no_finding}: must be one of the {settings.num_cluster} clusters, from 0")
        self.settings, self.no_finding = settings, no_finding
        self.encoder_decoder = PrototypeNetwork(self.image_dim, num_ids, settings)
        self.label_head = nn.Linear(self.image_dim, settings.num_cluster)
        # Without its loss it would be trainable and have no gradient, which processes would wait for.
        self.label_head.requires_grad_(settings.label_loss_weight > 0)
        if init_prototypes is not None:
            with torch.no_grad():
                self.encoder_decoder.protypes.copy_(init_prototypes)

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None) -> Output:
        """As in the contract, with ``labels`` (B, C) or else the head's; ValueError for training without labels."""
        if labels is None and self.training:
            raise ValueError("XProNet is trained with labels: every study needs a row of them")
        features = self.extract(images, view_mask, features)
        logits = self.label_head(features.pooled)  # (B, C)
        used = self._complete(logits > 0 if labels is None else labels)
        network = self.encoder_decoder
        prototypes = network.memory(used)
        encoded, image_response = network.encode(features, prototypes)
        hidden, text_response = network.decode(tokens, encoded, prototypes, features.attention_mask)
        auxiliary = {}
        rows = len(tokens) if supervised_rows is None else supervised_rows
        if labels is not None and rows:
            assert image_response is not None and text_response is not None
            mask = None if features.patch_mask is None else features.patch_mask[:rows]
            seen = mean_over_tokens(image_response[:rows], mask)
            told = mean_over_tokens(text_response[:rows], own_columns(tokens[:rows]))
            auxiliary = self._auxiliary(used[:rows], logits[:rows], seen, told)
        return Output(network.log_probs(hidden[:supervised_rows]), features.pooled, hidden, auxiliary)

    def labels_to_read(self, features: VisualFeatures, labels: Tensor | None) -> Tensor:
        """(B, C): ``labels``, or where there are none those that the head predicts; each row with a positive."""
        return self._complete(self.label_head(features.pooled) > 0 if labels is None else labels)

    def _complete(self, labels: Tensor) -> Tensor:
        return with_no_finding(labels.to(self.label_head.weight.dtype), self.no_finding)

    def _auxiliary(self, labels: Tensor, logits: Tensor, seen: Tensor, told: Tensor) -> dict[str, Tensor]:
        """Weighted losses of the responses to image and report (B, d), and of the head's logits (B, C)."""
        settings, losses = self.settings, {}
        if settings.weight_img_con_loss:
            loss = label_contrastive_loss(seen, labels, settings.img_con_margin)
            losses["img_con"] = settings.weight_img_con_loss * loss
        if settings.weight_txt_con_loss:
            loss = label_contrastive_loss(told, labels, settings.txt_con_margin)
            losses["txt_con"] = settings.weight_txt_con_loss * loss
        if settings.label_loss_weight:
            loss = F.binary_cross_entropy_with_logits(logits.to(labels.dtype), labels)
            losses["label"] = settings.label_loss_weight * loss
        return losses

    def session(self, features: VisualFeatures, labels: Tensor | None, decoding: DecodingOptions) -> Session:
        """A decoder whose prototypes are chosen by the labels that the image predicts, or by ``labels`` (B, C).

        ValueError where ``xpronet_labels`` is "reference" and none are given.
        """
        if not self.settings.reads_reference_labels:
            labels = None
        elif labels is None:
            raise ValueError("xpronet_labels 'reference': generation needs the labels of every study")
        memory = self.encoder_decoder.memory(self.labels_to_read(features, labels))
        return PrototypeSession(self.encoder_decoder, features, memory, decoding)

    def check_missing(self, names: list[str]) -> None:
        """As in the contract; the label head may be missing where labels are not predicted.

        ValueError where they are.
        """
        without_head = [name for name in names if not name.startswith("label_head.")]
        super().check_missing(without_head)
        if len(names) > len(without_head) and not self.settings.reads_reference_labels:
            raise ValueError(
                "it has no label head, as published files do, so labels cannot be predicted from images: "
                "give --xpronet_labels reference and --label_path"
            )


class PrototypeSession(Session):
    """A batch of studies being decoded, each with its own prototypes."""

    def keep(self, rows: Tensor) -> None:
        """Keep only the studies ``rows``, (b,) int64 indices."""
        super().keep(rows)
        self.memory.selected = self.memory.selected[rows]


def mean_over_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, d) -> (B, d), over the tokens where ``mask`` (B or 1, T) bool is true."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return x.mean(dim=1)
    kept = mask.unsqueeze(-1).to(x.dtype)
    return (x * kept).sum(dim=1) / kept.sum(dim=1)


def own_columns(tokens: Tensor) -> Tensor:
    """(1, T) bool: columns up to the last word of any row of ``tokens`` (B, T).

    The published text loss averages over a batch's own padding too, but not over what joining it with its hard
    negatives adds.
    """
    has_word = (tokens > 0).any(dim=0)
    has_word[:1].fill_(True)  # of a number, an assignment is an upload in torch 2.10
    return has_word.flip(0).cummax(dim=0).values.flip(0).unsqueeze(0)
