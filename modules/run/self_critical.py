"""What the self-critical stage is rewarded for: a metric against the reports of the training split."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path

from modules.config import Config
from modules.data.captions import references
from modules.data.datasets import list_samples
from modules.data.tokenizers import clean_report
from modules.evaluation.labeler_fit import misfit
from modules.run.data import Data, score_tag
from modules.runtime.errors import InputError
from modules.runtime.settings import part_of
from modules.training.rewards import Reward, training_frequencies
from modules.training.self_critical import SelfCritical
from modules.training.settings import SelfCriticalSettings

logger = logging.getLogger("ithn")
FREQUENCIES = "document_frequencies.json"


def self_critical_objective(config: Config, data: Data, folder: Path) -> Callable[..., SelfCritical]:
    """A function with the arguments of Objective that makes the stage's objective; ``folder`` keeps its statistics.

    InputError where a clinical reward has no meaning on these data.
    """
    texts: dict[str, dict[str, None]] = {}
    studies = data.annotation.splits["train"]
    for study in studies:
        own = texts.setdefault(study.study_id, {})
        own.update(dict.fromkeys(clean_report(text, data.tokenizer.cleaner) for text in references(study)))
    if config.scst_reward == "clinical_f1" and (reason := misfit([study.report for study in studies])):
        raise InputError(f"--scst_reward clinical_f1: {reason}; choose another, such as CIDEr")
    frequencies = None
    if config.scst_reward == "CIDEr":
        frequencies = training_frequencies(folder / FREQUENCIES, [list(own) for own in texts.values()])
    reward = Reward(
        config.scst_reward,
        [list(texts[studies[row].study_id]) for row, _ in list_samples(studies, config.views)],
        frequencies=frequencies,
        java_timeout=config.meteor_timeout,
    )
    logger.info(
        "self-critical: %d samples of each study, reward %s, baseline %s",
        config.scst_samples,
        config.scst_reward,
        config.scst_baseline,
    )
    return functools.partial(
        SelfCritical,
        stage=part_of(config, SelfCriticalSettings),
        reward=reward,
        decode=data.tokenizer.decode_batch,
        max_seq_length=config.max_seq_length,
        labelled=bool(score_tag(config)),
    )
