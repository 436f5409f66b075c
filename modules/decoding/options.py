"""How reports are decoded: the settings of every search. Torch-free, as the command line is derived from it."""

from dataclasses import dataclass, fields

from modules.runtime.errors import InputError
from modules.runtime.settings import check_value, setting

EVERY_SEARCH = 2  # of block_trigrams: beams too


@dataclass(frozen=True)
class DecodingOptions:
    """How reports are decoded; construction raises InputError for values that do not go together.

    ``group_size`` > 1 is diverse beam search (Vijayakumar et al., arXiv 1610.02424); ``guidance`` > 0 decodes away from
    the mean training image (modules/decoding/guidance.py).
    """

    max_seq_length: int = setting(60, "data", "longest report in tokens, begin and end included", low=3, high=4096)
    sample_method: str = setting(
        "beam_search", "decoding", "how reports are decoded", choices=("beam_search", "greedy", "sample")
    )
    beam_size: int = setting(3, "decoding", "beams", low=1, high=1000)
    group_size: int = setting(1, "decoding", "groups of diverse beam search", low=1)
    diversity_lambda: float = setting(0.5, "decoding", "penalty of diverse beam search", low=0.0)
    temperature: float = setting(1.0, "decoding", "divides the log-probabilities", low=1e-6)
    sample_n: int = setting(
        1, "decoding", "reports drawn per study with --sample_method sample; the likeliest is kept", low=1, high=5000
    )
    top_p: float = setting(
        1.0,
        "decoding",
        "--sample_method sample: draw among the fewest likeliest tokens that together have this probability",
        low=1e-6,
        high=1.0,
    )
    block_trigrams: int = setting(
        1,
        "decoding",
        "penalise repeated trigrams: 1 in greedy decoding and sampling, as published; 2 in beam search too",
        choices=(0, 1, EVERY_SEARCH),
    )
    no_repeat_ngram_size: int = setting(
        0, "decoding", "every search: no n-gram of so many tokens twice in a report; 0: any", low=0, high=4096
    )
    repetition_penalty: float = setting(
        1.0,
        "decoding",
        "every search: multiplies the log-probabilities of tokens that the report already has",
        low=0.01,
        high=1000.0,
    )
    min_length: int = setting(0, "decoding", "every search: fewest tokens of a report before its end", low=0, high=4095)
    length_penalty: float = setting(
        0.0,
        "decoding",
        "reports are ranked by their log-probability divided by length ** length_penalty: above 0 favours long ones; "
        "beams compete without it until they end",
        low=-10.0,
        high=10.0,
    )
    decoding_graph: bool = setting(
        True,
        "decoding",
        "on a GPU: capture a step as a CUDA graph and replay it, one launch a token; where it cannot be captured, the "
        "log says so",
        effect=False,
    )
    collapse_repeats: bool = setting(
        False,
        "decoding",
        "write a word that immediately repeats itself once, as VisualGPT's evaluation does before scoring",
    )
    suppress_unk: bool = setting(
        True,
        "decoding",
        "never write <unk>, which counts as a hit where a reference has a rare word; main_test.py: false for published "
        "checkpoints, whose figures were made with <unk>",
        before=False,
    )
    guidance: float = setting(
        0.0,
        "decoding",
        "weight of what the image adds: words are ranked by log p(w | image) + "
        "guidance * (log p(w | image) - log p(w | mean training image)), among the words at least a tenth "
        "as likely as the likeliest; 0: by log p(w | image), as published",
        low=0.0,
    )

    def __post_init__(self) -> None:
        for item in fields(DecodingOptions):
            check_value(item.name, getattr(self, item.name), item.metadata)
        if self.min_length >= self.max_seq_length:
            raise InputError(f"--min_length {self.min_length}: must be below --max_seq_length {self.max_seq_length}")
        if self.top_p < 1 and self.sample_method != "sample":
            raise InputError(f"--top_p {self.top_p}: needs --sample_method sample")
        if self.sample_method != "beam_search" and self.group_size > 1:
            raise InputError(f"--group_size {self.group_size}: groups need --sample_method beam_search")
        if self.sample_method == "greedy" and self.sample_n > 1:
            raise InputError(f"--sample_n {self.sample_n}: greedy has one answer, use --sample_method sample")
        if self.sample_method == "beam_search":
            if self.beam_size % self.group_size:
                raise InputError(f"--beam_size {self.beam_size} cannot be divided by --group_size {self.group_size}")
            if self.sample_n > self.beam_size:
                raise InputError(f"--sample_n {self.sample_n}: at most --beam_size {self.beam_size} in beam search")

    @property
    def idle_options(self) -> dict[str, tuple[str, ...]]:
        """Settings without effect, by the choice that does not read them."""
        beams = self.sample_method == "beam_search"
        return {
            f"--sample_method {self.sample_method}": () if beams else ("beam_size", "diversity_lambda"),
            "--group_size 1": ("diversity_lambda",) if self.group_size == 1 else (),
        }

    @property
    def has_rules(self) -> bool:
        """Whether words already written change the probabilities of the next."""
        trigrams = self.block_trigrams == EVERY_SEARCH or (self.block_trigrams and self.sample_method != "beam_search")
        return bool(trigrams or self.no_repeat_ngram_size or self.min_length or self.repetition_penalty != 1)

    @property
    def num_hypotheses(self) -> int:
        """K, the hypotheses that are decoded side by side for each study."""
        return self.beam_size if self.sample_method == "beam_search" else self.sample_n
