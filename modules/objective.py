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

from modules import distributed
from modules.errors import InputError
from modules.image_feature import IMAGE_FEATURES
from modules.losses import (
    CONTRASTIVE_FORMS,
    alignment,
    clip_scores,
    contrastive_loss,
    cosine_loss,
    modified_scores,
    normalise,
    own_scores,
    report_nll,
    token_nll,
)
from modules.negatives import PreviousEpoch
from modules.negatives_queue import FeatureQueue
from modules.published_names import Projection, PublishedNames
from modules.report_context import CONTEXTS
from modules.taught_passes import TaughtPasses
from modules.token_level import contrast_tokens
from modules.variants import (
    HARDER_TERMS,
    HARDNESS_SCHEDULES,
    WITHOUT_NEGATIVES,
    check_choice,
    synthesis,
    variant_rules,
)

ACCURACY_DECAY = 0.99  # per optimiser step


@dataclasses.dataclass
class Embedded:
    """What the contrastive terms see of the B samples of a Pair, and what u is the projection of."""

    image: Tensor  # (B, E) z
    report: Tensor  # (B, E) u
    hidden: Tensor  # (B, T, D) last hidden states, positions that do not count included
    mean: Tensor  # (B, D) their mean over the positions that count: u before projection and norm


class Objective(TaughtPasses, PublishedNames):
    """``objective(batch, epoch)`` -> dictionary with the ``loss`` to minimise and detached terms to log.

    ``strategy``: ``ithn``, ``mochi``, ``prior``, ``unconstrained`` (modules/negatives.py); ``contrastive``: S_1 alone,
    no hard negatives; ``off``: the plain backbone, whatever the options of ITHN say. ``variant``: ``paper`` or
    ``released``; ``ce_weight``, ``detach_negative``, ``renormalise_negative`` and ``joint_pass`` are the variant's own
    where they are None.
    ``previous_epoch_start`` begins the synthesis at the sample's harder negative of the epoch before and needs
    ``n_samples``, the size of the training set. ``mask_identical`` leaves off-diagonal pairs with the same report
    out of L_CP.

    Beyond the paper: ``mask_same_labels`` leaves pairs with the same Batch.label_key out of L_CP.
    ``hardness_schedule`` ``retrieval``: lambda is ``max_hardness`` times the smoothed retrieval accuracy in training.
    ``harder_term`` ``column``: u~_i is one more candidate in row i of S_1, and S_2 is left out. ``image_negatives``
    synthesises z~ too, from z- as u~ is from u-: S_4' of ``modified_scores``, or with ``column`` one more candidate in
    column i. ``negative_queue``: the features of that many past samples are further negatives, by their S_1. The
    temperature starts at ``contrastive_temperature``, and stays there unless ``learn_temperature``. ``image_feature``
    ``encoder``: z comes from the transformer encoder's output. Without ``report_gradient`` the contrastive terms train
    everything but the decoder. ``token_level``: words and patches are compared (modules/token_level.py), in the column
    form. A Batch with several hard negatives of each sample has a u~ of each: S is their mean, and columns are added.

    InputError for an unknown name or for options that exclude one another.
    """

    def __init__(self, backbone: nn.Module, *, strategy: str = "ithn", variant: str = "paper", alpha: float = 0.01,
                 embedding_dim: int = 512, ce_weight: float | None = None, contrastive_weight: float = 0.1,
                 cosine_weight: float = 0.2, contrastive_form: str = "standard", detach_negative: bool | None = None,
                 renormalise_negative: bool | None = None, joint_pass: bool | None = None,
                 previous_epoch_start: bool = False, clamp_segment: bool = False, mask_identical: bool = False,
                 n_samples: int | None = None, mask_same_labels: bool = False, hardness_schedule: str = "epoch",
                 max_hardness: float = 1.0, harder_term: str = "paper", image_negatives: bool = False,
                 negative_queue: int = 0, contrastive_temperature: float = 0.07, learn_temperature: bool = True,
                 report_context: str = "own", image_feature: str = "pooled", report_gradient: bool = True,
                 token_level: bool = False):
        super().__init__()
        check_choice("image_feature", image_feature, IMAGE_FEATURES)
        self.token_level = token_level
        self.image_feature, self.report_gradient = image_feature, report_gradient
        check_choice("report_context", report_context, CONTEXTS)
        self.report_context = report_context
        check_choice("contrastive_form", contrastive_form, CONTRASTIVE_FORMS)
        check_choice("harder_term", harder_term, HARDER_TERMS)
        check_choice("hardness_schedule", hardness_schedule, HARDNESS_SCHEDULES)
        self.rule = variant_rules(variant, ce_weight=ce_weight, detach_negative=detach_negative,
                                  renormalise_negative=renormalise_negative, joint_pass=joint_pass)
        self.strategy, self.alpha, self.contrastive_form = strategy, alpha, contrastive_form
        self.contrastive_weight, self.cosine_weight = contrastive_weight, cosine_weight
        self.mask_identical, self.mask_same_labels = mask_identical, mask_same_labels
        self.max_hardness, self.harder_term, self.image_negatives = max_hardness, harder_term, image_negatives
        self.synthesise = synthesis(strategy, variant, clamp_segment)
        self.backbone = backbone
        if strategy != "off":
            # A module's own parameters come before its children's: temperatures, backbone, projections, as published.
            start = torch.tensor(math.log(1 / contrastive_temperature))
            self.temp_1 = nn.Parameter(start, requires_grad=learn_temperature)
            if self.rule.own_harder_scale and strategy not in WITHOUT_NEGATIVES:
                self.temp_3 = nn.Parameter(start.clone(), requires_grad=learn_temperature)
            width = backbone.image_dim if image_feature == "pooled" else backbone.report_dim
            self.img_projection = Projection(width, embedding_dim)
            self.text_projection = Projection(backbone.report_dim, embedding_dim)
        by_retrieval = hardness_schedule == "retrieval" and strategy != "off"
        self.register_buffer("smoothed_accuracy", torch.zeros(()) if by_retrieval else None)
        self.queue = FeatureQueue(negative_queue, embedding_dim) if negative_queue and strategy != "off" else None
        self.previous = None
        if previous_epoch_start and strategy != "off":
            if strategy not in ("ithn", "unconstrained") or not n_samples:
                raise InputError(f"previous_epoch_start with strategy {strategy!r} and n_samples {n_samples}: it needs "
                                 "strategy ithn or unconstrained, and the number of training samples")
            self.previous = PreviousEpoch(n_samples, embedding_dim)

    def hardness(self, epoch: int) -> float | Tensor:
        """lambda = 1 - exp(-alpha * e) of the ``epoch`` as logged, from 1: e = epoch - 1 (released: e = epoch).

        Scheduled by retrieval: ``max_hardness`` times the retrieval accuracy, smoothed over the steps so far, from 0.
        """
        if self.smoothed_accuracy is not None:
            return self._hardness_by_retrieval()
        return -math.expm1(-self.alpha * (epoch - self.rule.first_epoch))

    # A compiled backward pass must not read the buffer anew, after ``_follow`` has changed it.
    @torch.compiler.disable
    def _hardness_by_retrieval(self) -> Tensor:
        return self.max_hardness * self.smoothed_accuracy

    @torch.compiler.disable
    def _follow(self, accuracy: Tensor, share: float) -> None:
        self.smoothed_accuracy.lerp_(accuracy.to(self.smoothed_accuracy.dtype), 1 - ACCURACY_DECAY ** share)

    def forward(self, batch: Any, epoch: int, *, token_count: Tensor | float | None = None,
                share: float = 1.0) -> dict[str, Tensor]:
        """Loss L_F = L_CE + beta L_CP + gamma L_CS (Eq. 13) and its terms for a modules.datasets.Batch.

        ``token_count`` is the number of target tokens of everything that makes up one optimiser step: all
        accumulated batches, all processes; by default those of this batch in all processes. ``share`` is this
        batch's part of that step, 1 / (number of accumulated batches): the other terms are multiplied by it, so that
        the losses of a step add up. The logged terms are this batch's own means.
        """
        positive = batch.positive
        pairs = [positive] if self.strategy in WITHOUT_NEGATIVES else [positive, batch.negative]
        outputs = self._outputs(pairs) if self.report_context == "own" else self._outputs_under_others(pairs)
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
                contrast = contrast_tokens(self, batch, pairs, outputs, epoch) if self.token_level else \
                    self._contrast(batch, self._embed(pairs, outputs), epoch)
            loss = loss + share * self.contrastive_weight * contrast["contrastive"]
            loss = loss + share * self.cosine_weight * contrast.get("cosine", 0.0)
            terms |= contrast
            if self.smoothed_accuracy is not None and self.training:
                self._follow(contrast["retrieval_accuracy"].detach(), share)
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def report_nll(self, pair: Any, features: Any = None) -> Tensor:
        """Negative log-likelihood (B,) of each report of a modules.datasets.Pair; ``features`` replace its images."""
        output = self._teach(pair, features=features)
        return report_nll(output.log_probs, pair.tokens[:, 1:], pair.token_mask[:, 1:])

    def embed(self, pair: Any, context: str | None = None) -> Embedded:
        """z and u of a modules.datasets.Pair in this process, as the contrastive terms take them; not for "off".

        ``context`` other than the objective's: "own" reads a report under its own image, "other" under another.
        """
        own = (context or self.report_context) == "own"
        output = self._seen_and_taught(pair, 0) if own else self._outputs_under_others([pair])[0]
        mean = self._report_feature(output.report_features, pair.token_mask[:, 1:])
        return Embedded(self.img_projection(output.image_features), self.text_projection(mean),
                        output.report_features, mean)

    def after_step(self) -> None:
        """To be called after each optimiser step: keeps 1/tau at 100 at most (the released variant has no cap)."""
        if self.strategy != "off":
            with torch.no_grad():
                self.temp_1.clamp_(max=self.rule.max_log_scale)

    def _embed(self, pairs: list, outputs: list) -> list[Tensor]:
        """z, u or z, z-, u, u- of all processes, each (B, E) of unit length."""
        reports = torch.cat([self._report_feature(output.report_features, pair.token_mask[:, 1:])
                             for output, pair in zip(outputs, pairs, strict=True)])
        z = self.img_projection(torch.cat([output.image_features for output in outputs]))
        copies = len(z) // len(outputs[0].image_features)  # one of the positives, the others of negatives
        u = self.text_projection(reports if self.report_gradient else reports.detach())
        features = torch.stack([*z.chunk(copies), *u.chunk(copies)], dim=1)
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
        rows, for_images, for_reports = None, [], []
        if self.strategy in WITHOUT_NEGATIVES:
            z, u = features
            scores, terms = clip_scores(z, u, scale), alignment(z, u)
        else:
            half = len(features) // 2
            (z, *negatives_z), (u, *negatives_u) = features[:half], features[half:]
            negative_z, negative_u = negatives_z[0], negatives_u[0]
            rows = distributed.gather(batch.has_negative)
            # Outside training the sample indices are those of another split.
            remembers = self.previous is not None and self.training
            index = distributed.gather(batch.sample_index) if remembers else None
            harder = self._harder_negative(z, u, negative_u, epoch, index, rows)
            harder_z = self._harder_negative(u, z, negative_z, epoch) if self.image_negatives else None
            if self.harder_term == "column":
                more = [self._harder_negative(z, u, other, epoch) for other in negatives_u[1:]]
                scores, for_images = clip_scores(z, u, scale), [own_scores(z, each, scale) for each in (harder, *more)]
                for_reports = [] if harder_z is None else [own_scores(harder_z, u, scale)]
            else:
                harder_scale = self.temp_3.exp() if self.rule.own_harder_scale else None
                scores = modified_scores(z, u, negative_z, negative_u, harder, scale, harder_scale,
                                         self.rule.keep_off_diagonal, harder_z)
                for other_z, other_u in zip(negatives_z[1:], negatives_u[1:], strict=True):
                    scores = scores + modified_scores(z, u, other_z, other_u,
                                                      self._harder_negative(z, u, other_u, epoch), scale, harder_scale,
                                                      self.rule.keep_off_diagonal)
                scores = scores / len(negatives_u)
            terms = alignment(z, u, rows, cos_negative=negative_u, cos_harder=harder)
            terms["cosine"] = sum(cosine_loss(z, other, rows, self.rule.absolute_cosine)
                                  for other in negatives_z) / len(negatives_z)
            terms["hardness"] = torch.zeros_like(scale) + self.hardness(epoch)
        excluded, compared = None, [1] * self.mask_identical + [2] * self.mask_same_labels
        if compared or self.queue is not None:
            keys = self._keys(batch)
            excluded = (keys.unsqueeze(0) == keys.unsqueeze(1))[..., compared].any(-1)
        if self.queue is not None and self.training:
            past_z, past_u, unlike = self.queue.past(keys, compared)
            for_images.append(clip_scores(z, past_u, scale).masked_fill(~unlike, -torch.inf))
            for_reports.append(clip_scores(u, past_z, scale).masked_fill(~unlike, -torch.inf))
            self.queue.push(z, u, keys)
        terms["contrastive"] = contrastive_loss(
            scores, self.contrastive_form, rows, excluded, for_images=torch.cat(for_images, 1) if for_images else None,
            for_reports=torch.cat(for_reports, 1) if for_reports else None)
        return terms | {"temperature": 1 / scale}

    def _keys(self, batch: Any) -> Tensor:
        """Index, report key and label key (-1 where there is none) of the samples of all processes, (B, 3)."""
        assert batch.label_key is not None or not self.mask_same_labels
        index = batch.sample_index
        labels = torch.full_like(index, -1) if batch.label_key is None else batch.label_key
        return distributed.gather(torch.stack([index, batch.report_key, labels], 1))

    def _harder_negative(self, z: Tensor, u: Tensor, negative: Tensor, epoch: int, index: Tensor | None = None,
                         rows: Tensor | None = None) -> Tensor:
        """u~ (B, E) as it enters S_3, from u- or, given the samples' ``index``, from the one of the epoch before.

        With image and report exchanged, and from z-, it is z~.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.rule.detach_negative):
            start = negative if index is None else self.previous.start(index, negative)
            harder = self.synthesise(z, u, start, self.hardness(epoch))
            if index is not None:
                self.previous.keep(index, harder, rows)
            return normalise(harder) if self.rule.renormalise_negative else harder
