"""What the self-critical stage is rewarded for: a metric against the reports of the training split."""

import logging
from pathlib import Path

from modules.config import Config
from modules.data.captions import references
from modules.data.datasets import ReportDataset
from modules.data.tokenizers import clean_report
from modules.evaluation.labeler_fit import misfit
from modules.run.data import Data, score_tag
from modules.runtime.errors import InputError
from modules.training.rewards import Reward, training_frequencies
from modules.training.self_critical import SelfCritical

logger = logging.getLogger("ithn")
FREQUENCIES = "document_frequencies.json"


def equip(config: Config, data: Data, objective: SelfCritical, dataset: ReportDataset, folder: Path) -> None:
    """Tell the objective what is rewarded."""
    texts: dict[str, dict[str, None]] = {}
    for study in dataset.studies:
        own = texts.setdefault(study.study_id, {})
        own.update(dict.fromkeys(clean_report(text, data.tokenizer.cleaner) for text in references(study)))
    if config.scst_reward == "clinical_f1" and (reason := misfit([study.report for study in dataset.studies])):
        raise InputError(f"--scst_reward clinical_f1: {reason}; choose another, such as CIDEr")
    frequencies = None
    if config.scst_reward == "CIDEr":
        frequencies = training_frequencies(folder / FREQUENCIES, [list(own) for own in texts.values()])
    reward = Reward(
        config.scst_reward,
        [list(texts[dataset.studies[row].study_id]) for row, _ in dataset.samples],
        frequencies=frequencies,
        java_timeout=config.meteor_timeout,
    )
    objective.equip(
        reward=reward,
        decode=data.tokenizer.decode_batch,
        max_seq_length=config.max_seq_length,
        samples=config.scst_samples,
        baseline=config.scst_baseline,
        cross_entropy=config.scst_ce_weight,
        labelled=bool(score_tag(config)),
    )
    logger.info(
        "self-critical: %d samples of each study, reward %s, baseline %s, learning rates %g and %g",
        config.scst_samples,
        config.scst_reward,
        config.scst_baseline,
        config.lr_ve,
        config.lr_ed,
    )
