"""What is minimised: a backbone's cross entropy with ITHN beside it (ECAI 2023, arXiv 2305.07176).

Shape legend: B samples (of all processes, in the contrastive part), T + 1 tokens of a report, C and D the backbone's
image and report width, E the joint embedding. z, u: projected image and report; z-, u-: those of the hard negative;
u~: the synthesised harder negative.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from modules.ithn.losses import (
    CONTRASTIVE_FORMS,
    alignment,
    clip_scores,
    contrastive_loss,
    cosine_loss,
    modified_scores,
    normalise,
    report_nll,
    token_nll,
)
from modules.ithn.synthesis import PreviousEpoch
from modules.ithn.taught_passes import TaughtPasses
from modules.ithn.variants import CONTRASTIVE_FEATURES, WITHOUT_NEGATIVES, check_choice, synthesis, variant_rules
from modules.ithn.weights import Projection, PublishedNames
from modules.runtime import distributed
from modules.runtime.errors import InputError


@dataclasses.dataclass
class Embedded:
    """What the contrastive terms see of the B samples of a Pair, and what u is the projection of."""

    image: Tensor  # (B, E) z
    report: Tensor  # (B, E) u
    hidden: Tensor  # (B, T, D) last hidden states, positions that do not count included
    mean: Tensor  # (B, D) their mean over the positions that count: u before projection and norm


class Objective(TaughtPasses, PublishedNames):
    """``objective(batch, epoch)`` -> dictionary with the ``loss`` to minimise and detached terms to log.

    ``strategy``: ``ithn``, ``mochi``, ``prior``, ``unconstrained`` (modules/ithn/synthesis.py); ``contrastive``: S_1
    alone, no hard negatives; ``off``: the plain backbone, whatever the options of ITHN say. ``variant``: ``paper`` or
    ``released``; ``ce_weight``, ``detach_negative``, ``renormalise_negative`` and ``joint_pass`` are the variant's own
    where they are None.
    ``previous_epoch_start`` begins the synthesis at the sample's harder negative of the epoch before and needs
    ``n_samples``, the size of the training set. ``mask_identical`` leaves off-diagonal pairs with the same report
    out of L_CP.

    Beyond the paper and for ``contrastive`` alone, ``contrastive_features`` ``encoder``: z comes from the transformer
    encoder's output, u is read under another study's image, and the contrastive terms do not train the decoder
    (modules/ithn/taught_passes.py).

    InputError for an unknown name or for options that exclude one another.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        strategy: str = "ithn",
        variant: str = "paper",
        alpha: float = 0.01,
        embedding_dim: int = 512,
        ce_weight: float | None = None,
        contrastive_weight: float = 0.1,
        cosine_weight: float = 0.2,
        contrastive_form: str = "standard",
        detach_negative: bool | None = None,
        renormalise_negative: bool | None = None,
        joint_pass: bool | None = None,
        previous_epoch_start: bool = False,
        clamp_segment: bool = False,
        mask_identical: bool = False,
        n_samples: int | None = None,
        contrastive_features: str = "extractor",
    ):
        super().__init__()
        check_choice("contrastive_form", contrastive_form, CONTRASTIVE_FORMS)
        check_choice("contrastive_features", contrastive_features, CONTRASTIVE_FEATURES)
        self.rule = variant_rules(
            variant,
            ce_weight=ce_weight,
            detach_negative=detach_negative,
            renormalise_negative=renormalise_negative,
            joint_pass=joint_pass,
        )
        self.strategy, self.alpha, self.contrastive_form = strategy, alpha, contrastive_form
        self.contrastive_weight, self.cosine_weight = contrastive_weight, cosine_weight
        self.mask_identical = mask_identical
        self.on_encoder = contrastive_features == "encoder" and strategy != "off"
        if self.on_encoder and strategy != "contrastive":
            raise InputError(
                f"contrastive_features 'encoder' with strategy {strategy!r}: it needs 'contrastive', as "
                "Eq. 11 did not leave its second minimum in a trial"
            )
        self.synthesise = synthesis(strategy, variant, clamp_segment)
        self.backbone = backbone
        if strategy != "off":
            # A module's own parameters come before its children's: temperatures, backbone, projections, as published.
            self.temp_1 = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
            if self.rule.own_harder_scale and strategy not in WITHOUT_NEGATIVES:
                self.temp_3 = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
            image_width = backbone.encoded_dim if self.on_encoder else backbone.image_dim
            self.img_projection = Projection(image_width, embedding_dim)
            self.text_projection = Projection(backbone.report_dim, embedding_dim)
        self.previous = None
        if previous_epoch_start and strategy != "off":
            if strategy not in ("ithn", "unconstrained") or not n_samples:
                raise InputError(
                    f"previous_epoch_start with strategy {strategy!r} and n_samples {n_samples}: it needs "
                    "strategy ithn or unconstrained, and the number of training samples"
                )
            self.previous = PreviousEpoch(n_samples, embedding_dim)

    def hardness(self, epoch: int) -> float:
        """lambda = 1 - exp(-alpha * e) of the ``epoch`` as logged, from 1: e = epoch - 1 (released: e = epoch)."""
        return -math.expm1(-self.alpha * (epoch - self.rule.first_epoch))

    def forward(
        self, batch: Any, epoch: int, *, token_count: Tensor | float | None = None, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Loss L_F = L_CE + beta L_CP + gamma L_CS (Eq. 13) and its terms for a modules.data.datasets.Batch.

        ``token_count`` is the number of target tokens of everything that makes up one optimiser step: all
        accumulated batches, all processes; by default those of this batch in all processes. ``share`` is this
        batch's part of that step, 1 / (number of accumulated batches): the other terms are multiplied by it, so that
        the losses of a step add up. The logged terms are this batch's own means.
        """
        positive = batch.positive
        pairs = [positive] if self.strategy in WITHOUT_NEGATIVES else [positive, batch.negative]
        outputs = self._outputs(pairs)
        mask = positive.token_mask[:, 1:]
        nll_sum = token_nll(outputs[0].log_probs, positive.tokens[:, 1:], mask, token_count=1)
        own_count = mask.sum().clamp(min=1)
        if token_count is None:
            token_count = distributed.all_reduce_sum(own_count)
        # Gradients are averaged over the processes, hence the factor.
        loss = self.rule.ce_weight * distributed.world_size() * nll_sum / token_count
        terms = {"nll": nll_sum / own_count, **outputs[0].auxiliary}
        loss = loss + share * sum(outputs[0].auxiliary.values())
        if self.strategy != "off":
            # Half precision is for the network only: similarities differ in the third digit.
            with torch.autocast(loss.device.type, enabled=False):
                contrast = self._contrast(batch, self._embed(pairs, outputs), epoch)
            loss = loss + share * self.contrastive_weight * contrast["contrastive"]
            loss = loss + share * self.cosine_weight * contrast.get("cosine", 0.0)
            terms |= contrast
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def report_nll(self, pair: Any, features: Any = None) -> Tensor:
        """Negative log-likelihood (B,) of each report of a Pair; ``features`` replace its images."""
        output = self._teach(pair, features=features)
        return report_nll(output.log_probs, pair.tokens[:, 1:], pair.token_mask[:, 1:])

    def embed(self, pair: Any, own_image: bool = False) -> Embedded:
        """z and u of a modules.data.datasets.Pair in this process, as the contrastive terms take them; not for "off".

        With ``own_image`` reports are read under their own images, which is what they are but for "encoder".
        """
        output = self._output_on_encoder(pair) if self.on_encoder else self._teach(pair, supervised_rows=0)
        if own_image and self.on_encoder:
            output = dataclasses.replace(self._teach(pair, 0), image_features=output.image_features)
        mean = self._report_feature(output.report_features, pair.token_mask[:, 1:])
        return Embedded(
            self.img_projection(output.image_features), self.text_projection(mean), output.report_features, mean
        )

    def after_step(self) -> None:
        """To be called after each optimiser step: keeps 1/tau at 100 at most (the released variant has no cap)."""
        if self.strategy != "off":
            with torch.no_grad():
                self.temp_1.clamp_(max=self.rule.max_log_scale)

    def _embed(self, pairs: list, outputs: list) -> list[Tensor]:
        """z, u or z, z-, u, u- of all processes, each (B, E) of unit length."""
        reports = torch.cat(
            [
                self._report_feature(output.report_features, pair.token_mask[:, 1:])
                for output, pair in zip(outputs, pairs, strict=True)
            ]
        )
        z = self.img_projection(torch.cat([output.image_features for output in outputs]))
        u = self.text_projection(reports)
        features = torch.stack([*z.chunk(len(pairs)), *u.chunk(len(pairs))], dim=1)
        return list(distributed.gather_with_gradient(features).unbind(1))

    def _report_feature(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Mean of the hidden states (B, T, D) over the positions whose target counts, (B, D)."""
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if not self.rule.masked_mean:
            return hidden.mean(1)
        return torch.where(mask.unsqueeze(-1), hidden, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def _contrast(self, batch: Any, features: list[Tensor], epoch: int) -> dict[str, Tensor]:
        """L_CP (Eq. 12), L_CS (Eq. 1) and what shows whether they work, over the samples with a hard negative."""
        scale = self.temp_1.clamp(max=self.rule.max_log_scale).exp()
        rows = excluded = None
        if self.mask_identical:
            key = distributed.gather(batch.report_key)
            excluded = key.unsqueeze(0) == key.unsqueeze(1)
        if self.strategy in WITHOUT_NEGATIVES:
            z, u = features
            scores, terms = clip_scores(z, u, scale), alignment(z, u)
        else:
            z, negative_z, u, negative_u = features
            rows = distributed.gather(batch.has_negative)
            harder = self._harder_negative(batch, z, u, negative_u, rows, epoch)
            harder_scale = self.temp_3.exp() if self.rule.own_harder_scale else None
            scores = modified_scores(
                z, u, negative_z, negative_u, harder, scale, harder_scale, self.rule.keep_off_diagonal
            )
            terms = alignment(z, u, rows, cos_negative=negative_u, cos_harder=harder)
            terms["cosine"] = cosine_loss(z, negative_z, rows, self.rule.absolute_cosine)
            terms["hardness"] = torch.full_like(scale, self.hardness(epoch))
        terms["contrastive"] = contrastive_loss(scores, self.contrastive_form, rows, excluded)
        return terms | {"temperature": 1 / scale}

    def _harder_negative(self, batch: Any, z: Tensor, u: Tensor, negative: Tensor, rows: Tensor, epoch: int) -> Tensor:
        """u~ (B, E) as it enters S_3, from u- or from the one of the epoch before."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.rule.detach_negative):
            # Outside training the sample indices are those of another split.
            if self.previous is None or not self.training:
                harder = self.synthesise(z, u, negative, self.hardness(epoch))
            else:
                index = distributed.gather(batch.sample_index)
                harder = self.synthesise(z, u, self.previous.start(index, negative), self.hardness(epoch))
                self.previous.keep(index, harder, rows)
            return normalise(harder) if self.rule.renormalise_negative else harder
