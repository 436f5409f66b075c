"""The smallest backbone that keeps the contract of models/base.py, batches for it, and an objective around it."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.base import Backbone, Output, VisualFeatures
from modules.data.batches import Batch, Pair
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings

VOCABULARY, PAD = 11, 10


class TinyBackbone(Backbone):
    """Mean colour in, running mean of word vectors out; its padding id is not 0, and it has an auxiliary loss."""

    def __init__(self, width: int = 6, auxiliary_weight: float = 0.0):
        super().__init__()
        self.image_dim, self.report_dim, self.pad_id = width, width + 1, PAD
        self.visual_extractor = nn.Linear(3, width)
        self.words = nn.Embedding(VOCABULARY, width + 1)
        self.look = nn.Linear(width, width + 1)
        self.logit = nn.Linear(width + 1, VOCABULARY)
        self.auxiliary_weight = auxiliary_weight
        self.calls: list[Tensor] = []  # the tokens of every pass

    def forward(self, images, tokens, *, view_mask=None, labels=None, features=None, supervised_rows=None):
        if not torch.compiler.is_compiling():
            self.calls.append(tokens)
        pooled = self.extract(images, view_mask, features).pooled
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device).unsqueeze(-1)
        hidden = torch.tanh(self.words(tokens).cumsum(1) / steps + self.look(pooled).unsqueeze(1))
        auxiliary = {}
        if self.auxiliary_weight:
            error = pooled[:supervised_rows, 0] - labels[:supervised_rows, 0]
            auxiliary["label"] = self.auxiliary_weight * error.square().mean()
        return Output(self.log_probs(hidden[:supervised_rows]), pooled, hidden, auxiliary)

    def log_probs(self, hidden):
        return self.logit(hidden).log_softmax(-1)

    def encode(self, features):
        return (self.look(features.patches),)

    def extract(self, images, view_mask=None, features=None):
        if features is not None:
            return features
        present = view_mask.unsqueeze(-1).to(images.dtype)  # (B, N, 1)
        pooled = self.visual_extractor((images.mean((-1, -2)) * present).sum(1) / present.sum(1))
        return VisualFeatures(pooled.unsqueeze(1), None, pooled)


def tiny_pair(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> Pair:
    """A pair of reports with ``lengths`` tokens each, begin and end included."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    tokens = torch.randint(1, PAD, (batch, width), generator=generator)
    tokens[torch.arange(batch), torch.tensor(lengths) - 1] = 0
    tokens[:, 0] = 0
    view_mask = torch.ones(batch, 2, dtype=torch.bool)
    view_mask[0, 1] = False
    return Pair(
        torch.randn(batch, 2, 3, 4, 4, generator=generator, dtype=dtype),
        view_mask,
        torch.where(mask, tokens, PAD),
        mask,
        torch.randn(batch, 14, generator=generator, dtype=dtype),
    )


def tiny_batch(
    lengths: list[int], negative_lengths: list[int] | None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Batch:
    """A batch of made-up studies, every row with a hard negative, or without negatives at all."""
    rows = len(lengths)
    has_negatives = negative_lengths is not None
    return Batch(
        tiny_pair(lengths, seed, dtype),
        tiny_pair(negative_lengths, seed + 1000, dtype) if has_negatives else None,
        torch.ones(rows, dtype=torch.bool) if has_negatives else None,
        torch.arange(rows),
        torch.arange(rows),
        [""] * rows,
        [""] * rows,
        negative_key=torch.arange(rows, 2 * rows) if has_negatives else None,
    )


def rows_of(batch: Batch, rows: slice | list[int]) -> Batch:
    """The batch of some of the rows."""

    def of_pair(pair: Pair) -> Pair:
        return Pair(*(getattr(pair, name)[rows] for name in ("images", "view_mask", "tokens", "token_mask", "labels")))

    count = len(batch.sample_index[rows])
    return Batch(
        of_pair(batch.positive),
        of_pair(batch.negative) if batch.negative else None,
        batch.has_negative[rows] if batch.negative else None,
        batch.sample_index[rows],
        batch.report_key[rows],
        [""] * count,
        [""] * count,
        negative_key=None if batch.negative_key is None else batch.negative_key[rows],
    )


def make_objective(
    seed: int = 0,
    auxiliary_weight: float = 0.0,
    n_samples: int | None = None,
    joint_pass: bool | None = None,
    idf: Tensor | None = None,
    **settings,
) -> Objective:
    """The objective in float64, with a temperature that is not the initial one."""
    torch.manual_seed(seed)
    backbone = TinyBackbone(auxiliary_weight=auxiliary_weight)
    objective = Objective(backbone, ITHNSettings(embedding_dim=5, **settings), n_samples=n_samples, idf=idf).double()
    if joint_pass is not None:
        objective.variant = replace(objective.variant, joint_pass=joint_pass)
    if objective.strategy != "off":
        objective.temp_1.data.fill_(1.7)
    return objective


def gradients(objective: Objective, loss: Tensor) -> dict[str, Tensor | None]:
    """The gradient of every parameter by name."""
    names, parameters = zip(*objective.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))
