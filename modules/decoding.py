"""Search for reports, token by token: beam search, greedy choice and sampling.

Shapes: B studies, K hypotheses (beams or samples) per study, L = max_seq_length, V words (ids 1..V); id 0 is
begin, end and padding at once.
"""

from dataclasses import dataclass

SAMPLE_METHODS = ("beam_search", "greedy", "sample")


@dataclass(frozen=True)
class DecodingOptions:
    """How reports are generated; the names are those of the command-line flags.

    ``sample_method`` is ``beam_search``, ``greedy`` (arg max) or ``sample`` (multinomial). ``sample_n`` reports are
    returned per study. ``group_size`` > 1 is diverse beam search (Vijayakumar et al., arXiv 1610.02424) with
    ``diversity_lambda``. ``block_trigrams`` acts on greedy choice and sampling only.
    """

    sample_method: str = "beam_search"
    beam_size: int = 3
    max_seq_length: int = 60
    temperature: float = 1.0
    sample_n: int = 1
    group_size: int = 1
    diversity_lambda: float = 0.5
    block_trigrams: bool = True

    def __post_init__(self):
        if self.sample_method not in SAMPLE_METHODS:
            raise ValueError(f"sample_method {self.sample_method!r}: expected one of {', '.join(SAMPLE_METHODS)}")
        for name in ("beam_size", "max_seq_length", "sample_n", "group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature}: expected more than 0")
        if self.diversity_lambda < 0:
            raise ValueError(f"diversity_lambda {self.diversity_lambda}: expected at least 0")
        if self.sample_method == "beam_search":
            if self.beam_size % self.group_size:
                raise ValueError(f"group_size {self.group_size}: must divide beam_size {self.beam_size}")
            if self.sample_n > self.beam_size:
                raise ValueError(f"sample_n {self.sample_n}: at most beam_size {self.beam_size} in beam search")
