"""The settings of ITHN: flags of the same names, and what an Objective is built from."""

from dataclasses import dataclass, fields, replace
from typing import Any

from modules.ithn.synthesis import DRAWING_NEIGHBOURS, STRATEGIES
from modules.ithn.variants import CONTRASTIVE_FEATURES, CONTRASTIVE_FORMS, VARIANTS, Variant
from modules.runtime.errors import InputError
from modules.runtime.settings import check_value, setting

OFF = "off"  # in place of a strategy: the plain backbone, whatever the other settings say (--ithn off)


@dataclass(frozen=True)
class ITHNSettings:
    """What is added to a backbone's cross entropy; construction raises InputError for what does not fit together."""

    ithn: str = setting(
        "auto",
        "ITHN",
        "auto: on where hard negatives are given (--negative_index, or neg_report in the annotation) or --strategy or "
        "--ithn_variant is given, else the plain backbone",
        choices=("auto", "on", "off"),
    )
    negative_index: str = setting("", "ITHN", "index written by scripts/mine_hard_negatives.py")
    strategy: str = setting(
        "ithn",
        "ITHN",
        "how the harder negative is made: " + "; ".join(f"{name}: {row.meaning}" for name, row in STRATEGIES.items()),
        choices=tuple(STRATEGIES),
    )
    ithn_variant: str = setting(
        "paper", "ITHN", "the paper's equations, or the released code's departures from them", choices=tuple(VARIANTS)
    )
    alpha: float = setting(
        0.01,
        "ITHN",
        "hardness is 1 - exp(-alpha * (epoch - 1)), epochs counted from 1; released: 1 - exp(-alpha * epoch)",
        low=0.0,
    )
    num_neighbours: int = setting(
        5, "ITHN", f"neighbours that --strategy {' or '.join(DRAWING_NEIGHBOURS)} draws from", low=1
    )
    embedding_dim: int = setting(512, "ITHN", "width of the joint embedding", low=1)
    ce_weight: float | None = setting(None, "ITHN", "weight of the cross entropy; default 1 (released: 0.7)", low=0.0)
    contrastive_weight: float = setting(
        0.1, "ITHN", "beta of Eq. 13, weight of the contrastive loss; 0 leaves it out", low=0.0
    )
    cosine_weight: float = setting(0.2, "ITHN", "gamma of Eq. 13, weight of the cosine loss; 0 leaves it out", low=0.0)
    contrastive_form: str = setting(
        "standard",
        "ITHN",
        "decoupled: Eq. 8 as printed, with the positive left out of the denominator",
        choices=CONTRASTIVE_FORMS,
    )
    detach_negative: bool | None = setting(
        None, "ITHN", "hold the synthesised negative constant; default true (released: false)"
    )
    renormalise_negative: bool | None = setting(
        None, "ITHN", "divide the synthesised negative by its norm; default true (released: false)"
    )
    previous_epoch_start: bool = setting(False, "ITHN", "start the synthesis from the previous epoch's negative")
    clamp_segment: bool = setting(False, "ITHN", "keep the projection between the negative and the positive")
    mask_identical: bool = setting(False, "ITHN", "leave out off-diagonal pairs of the same study or the same text")

    contrastive_features: str = setting(
        "extractor",
        "beyond ITHN",
        "encoder: image features come from the transformer encoder's output, reports are read under another study's "
        "image, and the contrastive terms do not train the decoder; extractor: as published",
        choices=CONTRASTIVE_FEATURES,
    )

    def __post_init__(self) -> None:
        for item in fields(ITHNSettings):
            if (item.name, getattr(self, item.name)) != ("strategy", OFF):
                check_value(item.name, getattr(self, item.name), item.metadata)
        if self.ithn == "off":
            self._check_without_ithn()
        elif self.strategy != OFF:
            self._check_together()

    def _check_without_ithn(self) -> None:
        for name, given in (("ithn_variant", self.released), ("contrastive_features", self.on_encoder)):
            if given:
                raise InputError(f"--{name} {getattr(self, name)} has no effect with --ithn off; leave one of them out")

    def _check_together(self) -> None:
        row = STRATEGIES[self.strategy]
        if self.on_encoder and (row.synthesise is not None or self.released):
            raise InputError(
                "--contrastive_features encoder: needs --strategy contrastive and the paper's variant; with harder "
                "negatives Eq. 11 did not leave its second minimum in a trial (docs/EXPERIMENTS.md)"
            )
        if self.clamp_segment and (not row.is_projection or self.released):
            raise InputError(
                f"--clamp_segment true: needs --strategy {_names('is_projection')} and the paper's variant, not "
                f"--strategy {self.strategy} --ithn_variant {self.ithn_variant}"
            )
        if self.previous_epoch_start and not row.is_step:
            raise InputError(
                f"--previous_epoch_start true: needs --strategy {_names('is_step')}, not {self.strategy}, "
                "which takes no step from a starting point"
            )

    @property
    def released(self) -> bool:
        """Whether the released code's departures from the paper are asked for."""
        return self.ithn_variant == "released"

    @property
    def on_encoder(self) -> bool:
        """Whether the contrastive terms work on the encoder's output."""
        return self.contrastive_features == "encoder"

    @property
    def variant(self) -> Variant:
        """The choices of --ithn_variant, with the settings that were given in their place."""
        given: dict[str, Any] = {
            "ce_weight": self.ce_weight,
            "detach_negative": self.detach_negative,
            "renormalise_negative": self.renormalise_negative,
        }
        return replace(
            VARIANTS[self.ithn_variant], **{name: value for name, value in given.items() if value is not None}
        )


def _names(fact: str) -> str:
    return " or ".join(name for name, row in STRATEGIES.items() if getattr(row, fact))
