"""Reports for images outside any data set, with the model's probability of every word.

Shapes: B studies, N views, L generated tokens, g x g patches of a view.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from modules.data.batches import stack_contexts
from modules.data.tokenizers import join_words
from modules.data.transforms import Transform
from modules.decoding.options import DecodingOptions
from modules.inference.attention import recorded_attention, view_maps
from modules.runtime.environment import autocast
from modules.runtime.errors import InputError

WARNING = (
    "Research software, not a medical device: these reports are written by a statistical model, may be wrong in "
    "any sentence, and must not be used for care."
)
ABSENT_CONTEXT = "note: the model was trained with --context, which images alone do not bring: absent, and masked"
SENTENCE_ENDS = (".", "\u3002", "\u0964")  # the full stop, that of Chinese and Japanese, and the danda


@dataclass(frozen=True)
class WrittenSentence:
    """Words ``start`` to ``stop`` of a report, and the natural logarithm of their joint probability."""

    text: str
    start: int
    stop: int
    log_prob: float

    @property
    def mean_log_prob(self) -> float:
        """Mean over its words."""
        return self.log_prob / (self.stop - self.start)


@dataclass(frozen=True)
class WrittenReport:
    """A study's report: its words, their log-probabilities given all previous words, and where the model looked."""

    words: list[str]
    log_probs: list[float]
    end_log_prob: float | None  # of ending there; None: cut at max_seq_length
    maps: np.ndarray | None = None  # (words, N, g, g) attention of each word over the patches; None: not recorded
    pooled: np.ndarray | None = None  # (C,) visual features of the study, mean over its views

    @property
    def text(self) -> str:
        return join_words(self.words)

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole report, its end included."""
        return sum(self.log_probs) + (self.end_log_prob or 0.0)

    @property
    def sentences(self) -> list[WrittenSentence]:
        """The report split after every full stop; words after the last one form a sentence too."""
        cuts = [0, *(i for i, word in enumerate(self.words, start=1) if word in SENTENCE_ENDS), len(self.words)]
        return [
            WrittenSentence(join_words(self.words[start:stop]), start, stop, sum(self.log_probs[start:stop]))
            for start, stop in itertools.pairwise(cuts)
            if start < stop
        ]


@dataclass(frozen=True)
class StudyContext:
    """What is known of a study beside its images: images of the study before, and the ids of texts with their kinds."""

    prior: Sequence[Image.Image] = ()
    texts: tuple[Sequence[int], Sequence[int]] = ((), ())


class Predictor:
    """Writes reports with a trained ``backbone`` in evaluation mode, from at most ``num_views`` images a study.

    ``prior_views`` says that the backbone also has places for as many images of the study before. What is drawn at
    random for a study depends on ``seed`` and its name alone.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        tokenizer: Any,
        transform: Transform,
        num_views: int,
        decoding: DecodingOptions,
        device: torch.device,
        precision: str,
        prior_views: bool = False,
        seed: int = 0,
    ):
        self.backbone, self.tokenizer, self.transform = backbone.eval(), tokenizer, transform
        self.num_views, self.decoding, self.device, self.precision = num_views, decoding, device, precision
        self.seed = seed
        self.slots = 2 * num_views if prior_views else num_views

    @property
    def shows_attention(self) -> bool:
        """Whether the backbone exposes its cross-attention."""
        return bool(self.backbone.cross_attention())

    @torch.inference_mode()
    def write(
        self,
        studies: Sequence[Sequence[Image.Image]],
        *,
        names: Sequence[str] | None = None,
        contexts: Sequence[StudyContext] | None = None,
        attention: bool = False,
        layer: int | None = -1,
    ) -> list[WrittenReport]:
        """A report for each study of 1 to ``num_views`` images; ``contexts`` are masked where they are not given.

        The words' log-probabilities, and with ``attention`` the maps of decoder ``layer`` (None: the mean of all),
        come from one more pass over the finished reports, so they do not depend on the search. InputError where the
        decoder has no such layer.
        """
        contexts = contexts or [StudyContext()] * len(studies)
        images, view_mask = self._tensors(studies, [context.prior for context in contexts])
        texts: dict[str, Any] = {}
        if self.backbone.study_context is not None:
            found = stack_contexts([context.texts for context in contexts])
            assert found is not None
            texts["context"] = replace(found, tokens=found.tokens.to(self.device), kinds=found.kinds.to(self.device))
        modules = self.backbone.cross_attention() if attention else []
        drawn = {}
        if self.decoding.sample_method == "sample":
            from modules.decoding.sampling import study_seed

            drawn["seeds"] = [study_seed(self.seed, name) for name in names or [""] * len(studies)]
        with autocast(self.device, self.precision), recorded_attention(modules) as layers:
            features = self.backbone.extract(images, view_mask, **texts)
            tokens = self.backbone.generate(
                None, view_mask=view_mask, features=features, decoding=self.decoding, **drawn
            )
            layers.clear()  # drop those recorded during the search
            begin = tokens.new_zeros(len(tokens), 1)
            output = self.backbone(
                None, torch.cat([begin, tokens[:, :-1]], dim=1), view_mask=view_mask, features=features
            )
        log_probs = output.log_probs.float().gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (B, L)
        maps = None
        if layers:
            if layer is not None and not -len(layers) <= layer < len(layers):
                raise InputError(f"--layer {layer}: the decoder has layers 0 to {len(layers) - 1}")
            maps = view_maps([weights[..., : features.own] for weights in layers], self.num_views, layer)
        pooled = features.pooled.float().cpu().numpy()
        return [
            self._report(tokens[i], log_probs[i], None if maps is None else maps[i], pooled[i])
            for i in range(len(tokens))
        ]

    @torch.inference_mode()
    def pooled(self, studies: Sequence[Sequence[Image.Image]]) -> np.ndarray:
        """(B, C) float32: the studies' visual features, mean over patches and views."""
        images, view_mask = self._tensors(studies)
        with autocast(self.device, self.precision):
            return self.backbone.extract(images, view_mask).pooled.float().cpu().numpy()

    def extractor_sha256(self) -> str:
        """SHA-256 of the visual extractor's weights; features of different extractors cannot be compared."""
        digest = hashlib.sha256()
        for name, value in self.backbone.visual_extractor.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _tensors(
        self, studies: Sequence[Sequence[Image.Image]], priors: Sequence[Sequence[Image.Image]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Images (B, N, 3, H, W) on the device, normalised, absent views zero; and the view mask (B, N) on the CPU.

        Those of the study before are the second half of the views.
        """
        pixels = torch.stack([self.transform.blank(self.slots) for _ in studies])
        view_mask = torch.zeros(len(studies), self.slots, dtype=torch.bool)
        for row, images in enumerate(studies):
            assert 1 <= len(images) <= self.num_views
            prior = priors[row] if len(priors) and self.slots > self.num_views else ()
            for view, image in (*enumerate(images), *enumerate(prior, start=self.num_views)):
                pixels[row, view] = self.transform.pixels(image)
                view_mask[row, view] = True
        return self.transform.normalise(pixels.to(self.device), view_mask.to(self.device)), view_mask

    def _report(self, tokens: Tensor, log_probs: Tensor, maps: Tensor | None, pooled: np.ndarray) -> WrittenReport:
        """One row: ``tokens`` (L,) with 0 after the end, ``log_probs`` (L,), ``maps`` (L, N, g, g)."""
        ended = (tokens == 0).nonzero()
        length = int(ended[0]) if len(ended) else len(tokens)
        values = log_probs.tolist()
        words = self.tokenizer.words(tokens[:length].tolist())  # a word of several pieces has their joint probability
        if self.decoding.collapse_repeats:
            words = _without_repeats(words)
        return WrittenReport(
            words=[word for word, _, _ in words],
            log_probs=[sum(values[start:stop]) for _, start, stop in words],
            end_log_prob=values[length] if len(ended) else None,
            maps=None
            if maps is None
            else np.array([maps[start:stop].mean(0).cpu().numpy() for _, start, stop in words]).reshape(
                -1, *maps.shape[1:]
            ),
            pooled=pooled,
        )


def _without_repeats(words: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Words and their positions, of those that immediately repeat themselves one over all their positions."""
    found: list[tuple[str, int, int]] = []
    for word, start, stop in words:
        if found and found[-1][0] == word:
            found[-1] = (word, found[-1][1], stop)
        else:
            found.append((word, start, stop))
    return found
