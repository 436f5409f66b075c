"""What is minimised: a backbone's cross entropy and the terms of ITHN (ECAI 2023, arXiv 2305.07176).

Read from top to bottom as the paper is: teacher-forced passes, features, synthesis, similarities, losses.
Shape legend: B samples (of all processes, in the contrastive part), T + 1 tokens of a report, C and D the backbone's
image and report width, E the joint embedding. z, u: projected image and report; z-, u-: those of the hard negative;
u~: the synthesised harder negative. Pairs and batches are those of modules/data/batches.py, a backbone and its Output
those of models/base.py.
"""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from modules.ithn.contrastive_forms import FORMS, FormOptions, paper_triplet
from modules.ithn.losses import (
    FurtherColumns,
    alignment,
    clip_scores,
    contrastive_loss,
    cosine_loss,
    equal_rows,
    mean_over,
    modified_scores,
    normalise,
    report_nll,
    soft_targets,
    tf_idf,
    token_nll,
)
from modules.ithn.negative_queue import NegativeQueue
from modules.ithn.pairs import join_pairs, of_any_size, rolled_features, rolled_studies, split_output
from modules.ithn.previous_epoch import PreviousEpoch
from modules.ithn.settings import OFF, ITHNSettings
from modules.ithn.synthesis import NEEDING_NEGATIVES, STRATEGIES
from modules.runtime import distributed
from modules.runtime.transfers import upload

LABELS = 14  # of a study
INITIAL_LOG_SCALE = math.log(1 / 0.07)  # t = log 1/tau, as CLIP starts
INITIAL_BIAS = -10.0  # of --contrastive_form sigmoid, as SigLIP starts: nearly all pairs are negatives


class Projection(nn.Module):
    """Bias-free linear map into the joint embedding."""

    leaves_autocast = True  # similarities differ in the third digit

    def __init__(self, width: int, embedding_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(width, embedding_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, E) of unit length."""
        return normalise(self.linear1(x.to(self.linear1.weight.dtype)))


@dataclasses.dataclass
class ContrastiveFeatures:
    """What the contrastive terms see of the B samples of a pair, and what u is the projection of."""

    image: Tensor  # (B, E) z
    report: Tensor  # (B, E) u
    hidden: Tensor  # (B, T, D) last hidden states, also at positions that do not count
    mean: Tensor  # (B, D) their mean over the positions that count: u before projection and norm


class Objective(nn.Module):
    """``objective(batch, epoch)`` -> dictionary with the ``loss`` to minimise and detached terms to log.

    Without ``settings``, or with their strategy "off", it is the plain backbone. ``n_samples``, the size of the
    training set, is needed for previous_epoch_start; ``idf`` (V,), the inverse document frequency of every token id in
    the training reports, for contrastive_targets "text".

    Beyond the paper, contrastive_features "encoder" takes z from the transformer encoder's output, reads u under
    another study's image, and does not train the decoder by the contrastive terms.
    """

    backbone: Any
    previous: PreviousEpoch | None
    queue: NegativeQueue | None
    idf: Tensor
    compiled = False

    def __init__(
        self,
        backbone: nn.Module,
        settings: ITHNSettings | None = None,
        *,
        n_samples: int | None = None,
        idf: Tensor | None = None,
    ):
        super().__init__()
        self.settings = settings = settings or ITHNSettings(strategy=OFF)
        self.strategy, self.variant = settings.strategy, settings.variant
        self.uses_negatives = settings.strategy in NEEDING_NEGATIVES
        self.on_encoder = settings.on_encoder and settings.strategy != OFF
        self.backbone = backbone
        self.previous = self.queue = None
        if settings.strategy == OFF:
            return
        # A module's own parameters come before its children's: temperatures, backbone, projections, as published.
        learned = FORMS[settings.contrastive_form].temperature
        self.temp_1 = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE), requires_grad=learned)
        if self.variant.own_harder_scale and self.uses_negatives:
            self.temp_3 = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE), requires_grad=learned)
        if settings.contrastive_form == "sigmoid":
            self.contrastive_bias = nn.Parameter(torch.tensor(INITIAL_BIAS))
        if settings.contrastive_targets == "text":
            self.register_buffer("idf", idf, persistent=False)
        image_width = self.backbone.encoded_dim if self.on_encoder else self.backbone.image_dim
        self.img_projection = Projection(image_width, settings.embedding_dim)
        self.text_projection = Projection(self.backbone.report_dim, settings.embedding_dim)
        row = STRATEGIES[settings.strategy]
        self.synthesise = row.released if settings.released and row.released else row.synthesise
        if settings.clamp_segment and self.synthesise:
            self.synthesise = functools.partial(self.synthesise, clamp_segment=True)
        if settings.previous_epoch_start:
            assert n_samples
            self.previous = PreviousEpoch(n_samples, settings.embedding_dim)
        if row.has_queue:
            labels = LABELS if settings.same_label_weight != 1 else 0
            self.queue = NegativeQueue(settings.queue_size, settings.queue_hardest, settings.embedding_dim, labels)

    def hardness(self, epoch: int | Tensor) -> Any:
        """lambda = 1 - exp(-alpha * e) of the ``epoch`` as logged, from 1, a number or scalar: e = epoch - 1.

        In the released variant e = epoch.
        """
        exponent = -self.settings.alpha * (epoch - self.variant.first_epoch)
        return -exponent.expm1() if isinstance(exponent, Tensor) else -math.expm1(exponent)

    @property
    def takes_longer_reports(self) -> bool:
        """Whether padding leaves the losses as they are."""
        return self.strategy == OFF or self.variant.masked_mean

    def forward(
        self, batch: Any, epoch: int | Tensor, *, token_count: Tensor | float | None = None, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Loss L_F = L_CE + beta L_CP + gamma L_CS (Eq. 13) and its terms, all scalars.

        ``token_count`` is the number of target tokens of everything that makes up one optimiser step: all
        accumulated batches, all processes; by default those of this batch in all processes. ``share`` is this
        batch's part of that step, 1 / (number of accumulated batches): the other terms are multiplied by it, so that
        the losses of a step add up. The logged terms are this batch's own means.
        """
        hardness: Tensor | float = self.hardness(epoch)
        if self.compiled:
            batch, hardness, token_count, share = self._for_one_graph(batch, hardness, token_count, share)
        return self._losses(batch, hardness, token_count, share)

    def compile(self, **options: Any) -> None:  # type: ignore[override]
        """Compile the losses with torch.compile's ``options``: one graph for all epochs and report lengths.

        The module and its state dict stay as they are.
        """
        self._losses = torch.compile(self._losses, **options)  # type: ignore[method-assign]
        self.compiled = True

    def _for_one_graph(self, batch: Any, hardness: Any, token_count: Any, share: Any) -> tuple[Any, Any, Any, Any]:
        """The arguments of ``_losses`` without what a graph would be bound to: numbers, lengths, and present views."""
        device, dtype = batch.positive.tokens.device, next(self.parameters()).dtype
        if token_count is not None:
            token_count = upload(torch.as_tensor(token_count), device)
        hardness, share = (torch.full((), value, dtype=dtype, device=device) for value in (hardness, share))
        together = self.uses_negatives and self.variant.joint_pass
        return of_any_size(batch, self.backbone.pad_id if together else None), hardness, token_count, share

    def _losses(
        self, batch: Any, hardness: Tensor | float, token_count: Tensor | float | None, share: Tensor | float
    ) -> dict[str, Tensor]:
        """``forward``, for the ``hardness`` of the epoch."""
        pairs = [batch.positive, batch.negative] if self.uses_negatives else [batch.positive]
        outputs = self._passes(pairs)
        nll_sum, own_count = self._nll_sum(batch.positive, outputs[0])
        if token_count is None:
            token_count = distributed.all_reduce_sum(own_count)
        # Gradients are averaged over the processes, hence the factor.
        loss = self.variant.ce_weight * distributed.world_size() * nll_sum / token_count
        loss = loss + share * sum(outputs[0].auxiliary.values())
        terms = {"nll": nll_sum / own_count, **outputs[0].auxiliary}
        if self.strategy != OFF:
            # Half precision is for the network only: similarities differ in the third digit.
            with torch.autocast(loss.device.type, enabled=False):
                found = self._contrastive_terms(batch, self._features(pairs, outputs), hardness)
            for name, weight in self._weights().items():
                if name in found:
                    loss = loss + share * weight * found[name]
            terms |= found
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def _weights(self) -> dict[str, float]:
        """The weight of each contrastive term in L_F, Eq. 13."""
        return {"contrastive": self.settings.contrastive_weight, "cosine": self.settings.cosine_weight}

    def after_step(self) -> None:
        """To be called after each optimiser step: keeps 1/tau at 100 at most (the released variant has no cap)."""
        if self.strategy != OFF:
            with torch.no_grad():
                self.temp_1.clamp_(max=self.variant.max_log_scale)

    def forget_samples(self) -> bool:
        """Forget what is kept of single training samples, whose numbers now mean others; whether anything was kept."""
        kept = [memory.known for memory in (self.previous, self.queue) if memory is not None]
        found = any(bool(known.any()) for known in kept)
        for known in kept:
            known.zero_()
        return found

    # ---- 1. Teacher-forced passes

    def _teacher_forced(self, pair: Any, supervised_rows: int | None = None, features: Any = None) -> Any:
        """Output under teacher forcing: the one place that shifts inputs [:, :-1] against targets [:, 1:]."""
        if features is None and pair.context is not None:
            features = self.extract(pair)
        return self.backbone(
            None if features is not None else pair.images,
            pair.tokens[:, :-1],
            view_mask=pair.view_mask,
            labels=pair.labels,
            features=features,
            supervised_rows=supervised_rows,
        )

    def extract(self, pair: Any) -> Any:
        """The VisualFeatures of ``pair``, with its context where it has one."""
        context = {} if pair.context is None else {"context": pair.context}
        return self.backbone.extract(pair.images, pair.view_mask, **context)

    def _passes(self, pairs: list[Any]) -> list[Any]:
        """The backbone's Output for the positives and, if any, for their hard negatives, which are not supervised."""
        if self.on_encoder:
            return [self._pass_on_encoder(pair) for pair in pairs]
        if len(pairs) == 2 and self.variant.joint_pass:
            positive, negative = pairs
            joined = join_pairs(positive, negative, self.backbone.pad_id)
            output = self._teacher_forced(joined, supervised_rows=len(positive.tokens))
            return split_output(output, positive, negative)
        return [self._teacher_forced(pair, None if i == 0 else 0) for i, pair in enumerate(pairs)]

    def _pass_on_encoder(self, pair: Any) -> Any:
        """Output with image features of the encoder, and report features that are made under another study's image.

        The decoder attends to the image while it reads the report, so that a report feature made under its own image
        carries that image, and an image can be matched with it without a look at the report. Under the image of the
        previous row it can only say what the report says. No gradient comes from there: reading does not train the
        decoder. Log-probabilities are those of the ordinary pass.
        """
        features = self.extract(pair)
        output = self._teacher_forced(pair, features=features)
        with torch.no_grad():
            read = self._teacher_forced(rolled_studies(pair), supervised_rows=0, features=rolled_features(features))
        return dataclasses.replace(output, image_features=self._encoded(features), report_features=read.report_features)

    def _encoded(self, features: Any) -> Tensor:
        """Mean of the encoder's output over the tokens of the views that are present, (B, D)."""
        tokens = self.backbone.encode(features)[0]
        tokens = tokens if tokens.dim() == 3 else tokens[:, -1]  # the last of VisualGPT's levels
        tokens = tokens[:, : features.own].to(torch.promote_types(tokens.dtype, torch.float32))
        if features.patch_mask is None:
            return tokens.mean(1)
        present = features.patch_mask[:, : features.own].unsqueeze(-1).to(tokens.dtype)
        return (tokens * present).sum(1) / present.sum(1)

    # ---- 2. Features in the joint embedding

    def _features(self, pairs: list[Any], outputs: list[Any]) -> list[Tensor]:
        """z, u or z, z-, u, u- of all processes, each (B, E) of unit length."""
        reports = [
            self._report_feature(output.report_features, pair.token_mask[:, 1:])
            for output, pair in zip(outputs, pairs, strict=True)
        ]
        z = self.img_projection(torch.cat([output.image_features for output in outputs]))
        u = self.text_projection(torch.cat(reports))
        features = torch.stack([*z.chunk(len(pairs)), *u.chunk(len(pairs))], dim=1)
        return list(distributed.gather_with_gradient(features).unbind(1))

    def _report_feature(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Mean (B, D) of the hidden states (B, T, D) over the positions whose target counts in ``mask`` (B, T)."""
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if not self.variant.masked_mean:
            return hidden.mean(1)
        return torch.where(mask.unsqueeze(-1), hidden, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def embed(self, pair: Any, own_image: bool = False) -> ContrastiveFeatures:
        """z and u of ``pair`` in this process, as the contrastive terms take them; not with strategy "off".

        ``own_image`` has reports read under their own images, which makes a difference for "encoder" only.
        """
        output = self._pass_on_encoder(pair) if self.on_encoder else self._teacher_forced(pair, supervised_rows=0)
        if own_image and self.on_encoder:
            output = dataclasses.replace(self._teacher_forced(pair, 0), image_features=output.image_features)
        mean = self._report_feature(output.report_features, pair.token_mask[:, 1:])
        return ContrastiveFeatures(
            self.img_projection(output.image_features), self.text_projection(mean), output.report_features, mean
        )

    def read(self, pair: Any, features: Any) -> Tensor:
        """Mean hidden states (B, D) of the reports of ``pair``, read under the studies with visual ``features``."""
        hidden = self._teacher_forced(pair, 0, features).report_features
        return self._report_feature(hidden, pair.token_mask[:, 1:])

    # ---- 3. Synthesis of the harder negative

    def _harder_negative(
        self, batch: Any, z: Tensor, u: Tensor, negative: Tensor, rows: Tensor, hardness: Any
    ) -> Tensor:
        """u~ (B, E) as it enters S_3, from u- or from the u~ of the previous epoch."""
        assert self.synthesise is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.variant.detach_negative):
            # Outside training the sample indices are those of another split.
            if self.previous is None or not self.training:
                harder = self.synthesise(z, u, negative, hardness)
            else:
                index = distributed.gather(batch.sample_index)
                harder = self.synthesise(z, u, self.previous.start(index, negative), hardness)
                self.previous.keep(index, harder, rows)
            harder = normalise(harder) if self.variant.renormalise_negative else harder
        # A strategy may return one of its arguments, which no_grad does not cut off.
        return harder.detach() if self.variant.detach_negative else harder

    # ---- 4. Similarities and 5. losses

    def _contrastive_terms(self, batch: Any, features: list[Tensor], hardness: Any) -> dict[str, Tensor]:
        """L_CP (Eq. 12), L_CS (Eq. 1) and what shows whether they work, over the samples with a hard negative."""
        scale = self.temp_1.reshape(()).clamp(max=self.variant.max_log_scale).exp()
        if not self.uses_negatives:
            z, u = features
            terms = alignment(z, u)
            terms["contrastive"] = self._contrastive(
                batch, clip_scores(z, u, scale), scale, further=self._queued(batch, z, u, scale)
            )
            return terms | {"temperature": 1 / scale}
        z, negative_z, u, negative_u = features
        rows = distributed.gather(batch.has_negative)
        harder = self._harder_negative(batch, z, u, negative_u, rows, hardness)
        terms = alignment(z, u, rows, cos_negative=negative_u, cos_harder=harder)
        terms["cosine"] = cosine_loss(z, negative_z, rows, self.variant.absolute_cosine)
        terms["hardness"] = torch.zeros_like(scale) + hardness
        if FORMS[self.settings.contrastive_form].of_anchor is None:
            excluded, _ = self._alike(batch, of_negatives=True)
            own = rows if excluded is None else rows & ~excluded.diagonal()
            terms["contrastive"] = mean_over(paper_triplet(z, u, harder, self.settings.triplet_margin), own)
        elif self.settings.has_columns:
            # A study without a negative is compared with the others' like all.
            excluded, log_weights = self._alike(batch, of_negatives=True)
            count = rows if excluded is None else rows & ~excluded
            added = 0.0 if log_weights is None else log_weights
            columns = FurtherColumns(
                clip_scores(z, harder, scale) + added, clip_scores(u, negative_z, scale) + added, count
            )
            terms["contrastive"] = self._contrastive(batch, clip_scores(z, u, scale), scale, further=columns)
        else:
            # A hinge of cosines divides by one scale what was multiplied by it.
            apart = self.variant.own_harder_scale and FORMS[self.settings.contrastive_form].temperature
            harder_scale = self.temp_3.reshape(()).exp() if apart else None
            scores = modified_scores(
                z, u, negative_z, negative_u, harder, scale, harder_scale, self.variant.keep_off_diagonal
            )
            terms["contrastive"] = self._contrastive(batch, scores, scale, rows=rows)
        return terms | {"temperature": 1 / scale}

    def _queued(self, batch: Any, z: Tensor, u: Tensor, scale: Tensor) -> FurtherColumns | None:
        """Negatives of the queue, which takes this batch's samples in training; None without a queue."""
        if self.queue is None:
            return None
        keys, labels = distributed.gather(batch.report_key), None
        if self.settings.same_label_weight != 1:
            labels = distributed.gather(batch.positive.labels)
        columns = self.queue.further(z, u, keys, scale, labels, self.settings.same_label_weight)
        if self.training:
            self.queue.keep(z, u, keys, labels)
        return columns

    def _alike(self, batch: Any, *, of_negatives: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """Which samples (B, B) are no negatives of an anchor, and log-weights (B, B) of those that count more or less;
        None where neither was asked for. The samples are the batch's own, or their hard negatives.
        """
        settings, excluded, log_weights = self.settings, None, None
        if settings.mask_identical:
            key = distributed.gather(batch.report_key)
            others = distributed.gather(batch.negative_key) if of_negatives else key
            excluded = key.unsqueeze(1) == others.unsqueeze(0)
        if settings.same_label_weight != 1:
            labels = distributed.gather(batch.positive.labels)
            alike = equal_rows(labels, distributed.gather(batch.negative.labels) if of_negatives else None)
            if settings.same_label_weight:
                log_weights = alike.to(self.temp_1.dtype) * math.log(settings.same_label_weight)
            else:
                excluded = alike if excluded is None else excluded | alike
        return excluded, log_weights

    def _contrastive(
        self,
        batch: Any,
        scores: Tensor,
        scale: Tensor,
        *,
        rows: Tensor | None = None,
        further: FurtherColumns | None = None,
    ) -> Tensor:
        """L_CP of ``scores`` = S/tau (B, B) in the form, with the targets and without the pairs that were asked for."""
        settings = self.settings
        excluded, log_weights = self._alike(batch)
        return contrastive_loss(
            scores,
            settings.contrastive_form,
            rows,
            excluded,
            further=further,
            log_weights=log_weights,
            targets=self._targets(batch.positive),
            scale=scale,
            options=FormOptions(
                self.contrastive_bias.reshape(()) if hasattr(self, "contrastive_bias") else 0.0,
                settings.positive_prior,
                settings.hardness_beta,
                settings.triplet_margin,
            ),
        )

    def _targets(self, pair: Any) -> Tensor | None:
        """Soft targets (B, B) of contrastive_targets, None where the target is the study's own report."""
        kind = self.settings.contrastive_targets
        if kind == "own":
            return None
        described = pair.labels if kind == "labels" else tf_idf(pair.tokens, pair.token_mask, self.idf)
        return soft_targets(distributed.gather(described), self.settings.target_temperature)

    def _nll_sum(self, pair: Any, output: Any) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood of the targets of ``pair``, and their number; scalars."""
        mask = pair.token_mask[:, 1:]
        nll = token_nll(output.log_probs, pair.tokens[:, 1:], mask, token_count=1)
        return nll, mask.sum().clamp(min=1)

    def report_nll(self, pair: Any, features: Any = None) -> Tensor:
        """Negative log-likelihood (B,) of each report of ``pair``; ``features`` replace its images."""
        output = self._teacher_forced(pair, features=features)
        return report_nll(output.log_probs, pair.tokens[:, 1:], pair.token_mask[:, 1:])
