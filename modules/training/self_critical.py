"""Self-critical training: a metric rewards the reports that a model samples (Rennie et al., CVPR 2017).

Shapes: B studies, S samples of each, L = max_seq_length tokens, V words.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.decoding.options import DecodingOptions
from modules.ithn.objective import Objective
from modules.ithn.settings import OFF, ITHNSettings
from modules.training.settings import SelfCriticalSettings


class SelfCritical(Objective):
    """The objective with the policy gradient of a reward in place of the cross entropy.

    loss = -(r - b) * sum_t log p(y_t) / L, mean over the samples y of all studies, where b is the reward of the
    study's greedy report, or the mean reward of its samples. ITHN's losses stay as they are, and the cross entropy of
    the references is added with the weight scst_ce_weight.

    Samples are drawn, and their log-probabilities computed in a second, teacher-forced pass, by the network as it
    generates reports: without dropout. With it the two passes would belong to two different networks, and the gradient
    to neither. The visual extractor sees the images once, in the mode that training has set.

    ``reward`` scores texts by the index of their sample, ``decode`` maps tokens (N, L) to texts. ``labelled`` says that
    reports are generated from given labels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        settings: ITHNSettings | None = None,
        *,
        n_samples: int | None = None,
        idf: Tensor | None = None,
        stage: SelfCriticalSettings,
        reward: Callable[[Sequence[int], list[str]], Sequence[float]],
        decode: Callable[[Tensor], list[str]],
        max_seq_length: int,
        labelled: bool,
    ):
        super().__init__(backbone, settings, n_samples=n_samples, idf=idf)
        self.variant = dataclasses.replace(self.variant, ce_weight=stage.scst_ce_weight)
        self.samples, self.baseline = stage.scst_samples, stage.scst_baseline
        self.reward, self.decode, self.max_seq_length, self.labelled = reward, decode, max_seq_length, labelled

    def forward(
        self, batch: Any, epoch: int | Tensor, *, token_count: Tensor | float | None = None, share: float = 1.0
    ) -> dict[str, Tensor]:
        """Scalars, as those of Objective; ``reward`` and ``baseline`` are among the terms."""
        terms = {}
        if self.strategy != OFF or self.variant.ce_weight or self.backbone.needs_labels:
            terms = super().forward(batch, epoch, token_count=token_count, share=share)
        policy, found = self._policy_gradient(batch)
        return terms | found | {"loss": terms.get("loss", 0.0) + share * policy}

    def _policy_gradient(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the mean rewards of samples and baseline; scalars."""
        pair = batch.positive
        rows = batch.sample_index.tolist()
        features = self.extract(pair)
        repeated = {
            "features": repeat_rows(features, self.samples),
            "view_mask": repeat_rows(pair.view_mask, self.samples),
            "labels": repeat_rows(pair.labels, self.samples) if self.labelled else None,
        }
        with without_dropout(self.backbone):
            tokens = self._generate("sample", **repeated)  # (B * S, L)
            rewards = self._rewards([row for row in rows for _ in range(self.samples)], tokens)
            if self.baseline == "greedy":
                answers = self._generate(
                    "greedy", features=features, view_mask=pair.view_mask, labels=pair.labels if self.labelled else None
                )
                baseline = repeat_rows(self._rewards(rows, answers), self.samples)
            else:
                baseline = repeat_rows(rewards.view(-1, self.samples).mean(dim=1), self.samples)
            begin = tokens.new_zeros(len(tokens), 1)
            output = self.backbone(None, torch.cat([begin, tokens[:, :-1]], dim=1), **repeated)
        log_probs = output.log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        sample_log_probs = torch.where(up_to_end(tokens), log_probs, 0.0).sum(dim=1) / self.max_seq_length  # (B * S,)
        loss = -((rewards - baseline) * sample_log_probs).mean()
        return loss, {"reward": rewards.mean(), "baseline": baseline.mean()}

    def _generate(self, method: str, **inputs: Any) -> Tensor:
        """Tokens (N, L), one report a row, chosen by the network's own probabilities."""
        decoding = DecodingOptions(
            sample_method=method, max_seq_length=self.max_seq_length, block_trigrams=False, suppress_unk=False
        )
        with torch.no_grad():
            tokens = self.backbone.generate(None, decoding=decoding, **inputs)
        torch.clear_autocast_cache()  # some versions of torch would use weights cast here, without gradient, again
        return tokens

    def _rewards(self, rows: list[int], tokens: Tensor) -> Tensor:
        found = self.reward(rows, self.decode(tokens))
        return torch.as_tensor(found, dtype=torch.float32).to(tokens.device)


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """A block with ``module`` in evaluation mode; afterwards each of its parts is in its former mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def repeat_rows(rows: Any, times: int) -> Any:
    """Each row of a tensor (B, ...), or of the tensors of a dataclass, ``times`` times in succession, (B * times, ...).

    What has no rows, None or a number, stays as it is.
    """
    if isinstance(rows, Tensor):
        return rows.repeat_interleave(times, dim=0)
    if dataclasses.is_dataclass(rows) and not isinstance(rows, type):
        return dataclasses.replace(
            rows, **{field.name: repeat_rows(getattr(rows, field.name), times) for field in dataclasses.fields(rows)}
        )
    return rows


def up_to_end(tokens: Tensor) -> Tensor:
    """(N, L) bool: the positions of ``tokens`` (N, L) up to the first 0, which is a choice too."""
    ended = tokens == 0
    return ended.cumsum(dim=1) - ended.to(torch.int64) == 0
