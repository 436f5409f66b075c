"""The settings of ITHN: flags of the same names, and what an Objective is built from."""

from dataclasses import dataclass, fields, replace
from typing import Any

from modules.ithn.contrastive_forms import CONTRASTIVE_FORMS, FORMS, OPTIONS
from modules.ithn.synthesis import DRAWING_NEIGHBOURS, STRATEGIES, SYNTHESISED
from modules.ithn.variants import CONTRASTIVE_FEATURES, CONTRASTIVE_TARGETS, NEGATIVES_AS, VARIANTS, Variant
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
        "what an anchor pays: " + "; ".join(f"{name}: {form.meaning}" for name, form in FORMS.items()),
        choices=CONTRASTIVE_FORMS,
    )
    detach_negative: bool | None = setting(
        None,
        "ITHN",
        "hold the harder negative constant; default true (released variant, and mined reports as columns: false)",
    )
    renormalise_negative: bool | None = setting(
        None, "ITHN", "divide the synthesised negative by its norm; default true (released: false)"
    )
    previous_epoch_start: bool = setting(False, "ITHN", "start the synthesis from the previous epoch's negative")
    clamp_segment: bool = setting(False, "ITHN", "keep the projection between the negative and the positive")
    mask_identical: bool = setting(False, "ITHN", "leave out off-diagonal pairs of the same study or the same text")

    negatives_as: str = setting(
        "average",
        "beyond ITHN",
        "columns: hard negatives are further columns of the softmax, as in NegCLIP and VSE++; average: they enter the "
        "mean of three similarities, Eq. 11",
        choices=NEGATIVES_AS,
    )
    queue_size: int = setting(1024, "beyond ITHN", "samples that --strategy mochi_queue keeps", low=1)
    queue_hardest: int = setting(
        64,
        "beyond ITHN",
        "hardest ones of them that are mixed: as many mixtures of two, an eighth with the anchor",
        low=1,
    )
    positive_prior: float = setting(
        0.1, "beyond ITHN", "tau+ of --contrastive_form debiased and hardness_weighted", low=0.0, high=0.99
    )
    hardness_beta: float = setting(1.0, "beyond ITHN", "beta of --contrastive_form hardness_weighted", low=0.0)
    triplet_margin: float = setting(0.2, "beyond ITHN", "margin of the triplet forms", low=0.0)
    contrastive_targets: str = setting(
        "own",
        "beyond ITHN",
        "labels or text: soft targets by the likeness of the studies' labels (MedCLIP) or of the reports' words "
        "(tf-idf); own: the study's own report",
        choices=CONTRASTIVE_TARGETS,
    )
    target_temperature: float = setting(
        1.0, "beyond ITHN", "divides the likeness before the softmax of soft targets; MedCLIP has 1", low=1e-3
    )
    same_label_weight: float = setting(
        1.0,
        "beyond ITHN",
        "how often a study with the same labels counts as a negative: above 1 as in WCL, 0 leaves it out",
        low=0.0,
    )
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
        row, form = STRATEGIES[self.strategy], FORMS[self.contrastive_form]
        averaged = row.synthesise is not None and not self.has_columns and form.of_anchor is not None
        if self.on_encoder and (averaged or self.released):
            without = " or ".join(name for name, row in STRATEGIES.items() if row.synthesise is None)
            raise InputError(
                f"--contrastive_features encoder: needs --strategy {without}, --negatives_as columns "
                "or --contrastive_form paper_triplet, and the paper's variant; with the mean of similarities, Eq. 11, "
                "it did not leave a second minimum in a trial (docs/experiments/phantom.md)"
            )
        if self.negatives_as == "columns" and row.synthesise is None:
            raise InputError(f"--negatives_as columns: --strategy {self.strategy} has no negatives besides the batch's")
        if self.has_columns and self.released:
            raise InputError("--ithn_variant released averages similarities: it has no negatives as columns")
        if form.of_anchor is None and (row.synthesise is None or self.has_columns):
            raise InputError(
                f"--contrastive_form {self.contrastive_form}: compares a study with its own hard negative alone; give "
                "a strategy that has one, without --negatives_as columns"
            )
        if self.contrastive_targets != "own" and self.contrastive_form != "standard":
            raise InputError(
                f"--contrastive_targets {self.contrastive_targets}: soft targets are those of a cross entropy; give "
                "--contrastive_form standard"
            )
        if self.same_label_weight not in (0, 1) and not form.weighs:
            weighing = " or ".join(name for name, form in FORMS.items() if form.weighs)
            raise InputError(
                f"--same_label_weight {self.same_label_weight:g}: weights negatives of --contrastive_form {weighing}; "
                f"with {self.contrastive_form} they count (1) or are left out (0)"
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
    def has_columns(self) -> bool:
        """Whether hard negatives are columns of the softmax."""
        return self.strategy != OFF and (self.negatives_as == "columns" or STRATEGIES[self.strategy].as_columns)

    @property
    def needs_labels(self) -> bool:
        """Whether the contrastive terms ask for the labels of every study."""
        return self.ithn != "off" and (self.contrastive_targets == "labels" or self.same_label_weight != 1)

    @property
    def idle_options(self) -> dict[str, tuple[str, ...]]:
        """Settings without effect, by the choice that does not read them."""
        own = FORMS[self.contrastive_form].options
        return {
            f"--contrastive_form {self.contrastive_form}": tuple(name for name in OPTIONS if name not in own),
            "--contrastive_targets own": ("target_temperature",) if self.contrastive_targets == "own" else (),
            f"--strategy {self.strategy}": self._idle_of_strategy() if self.strategy != OFF else (),
        }

    def _idle_of_strategy(self) -> tuple[str, ...]:
        row = STRATEGIES[self.strategy]
        read_by = {
            ("queue_size", "queue_hardest"): row.has_queue,
            ("num_neighbours",): row.draws_neighbour,
            ("alpha",): self.strategy in SYNTHESISED,
            ("cosine_weight", "detach_negative", "renormalise_negative"): row.synthesise is not None,
            ("negatives_as",): row.synthesise is not None and not row.as_columns,
        }
        return tuple(name for names, read in read_by.items() if not read for name in names)

    @property
    def on_encoder(self) -> bool:
        """Whether the contrastive terms work on the encoder's output."""
        return self.contrastive_features == "encoder"

    @property
    def variant(self) -> Variant:
        """The choices of --ithn_variant, with the settings that were given in their place."""
        mined = self.has_columns and self.strategy not in SYNTHESISED  # NegCLIP and VSE++ train the negative report too
        given: dict[str, Any] = {
            "ce_weight": self.ce_weight,
            "detach_negative": False if mined and self.detach_negative is None else self.detach_negative,
            "renormalise_negative": self.renormalise_negative,
        }
        return replace(
            VARIANTS[self.ithn_variant], **{name: value for name, value in given.items() if value is not None}
        )


def _names(fact: str) -> str:
    return " or ".join(name for name, row in STRATEGIES.items() if getattr(row, fact))
