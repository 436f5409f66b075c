"""The weights that a new training starts from (--load), and what its self-critical stage is rewarded for."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.config import Config
from modules.data.captions import references
from modules.data.datasets import ReportDataset
from modules.data.tokenizers import clean_report
from modules.ithn.objective import Objective
from modules.run import build as compose
from modules.run.resuming import own_settings, own_tokenizer
from modules.runtime.errors import InputError
from modules.training.checkpoint import FORMAT, load_checkpoint
from modules.training.checkpoint_folder import CheckpointFolder
from modules.training.rewards import Reward, training_frequencies
from modules.training.self_critical import SelfCritical

logger = logging.getLogger("ithn")
FREQUENCIES = "document_frequencies.json"


@dataclass
class Start:
    """A checkpoint whose weights a new run starts from; ours brings settings and vocabulary too."""

    path: str
    content: dict[str, Any]

    @property
    def is_ours(self) -> bool:
        return self.content.get("format") == FORMAT

    @property
    def settings(self) -> dict[str, Any]:
        """Flags beneath those given; where it is not ours there are none."""
        return own_settings(self.content, self.path) if self.is_ours else {}

    @property
    def tokenizer(self) -> compose.AnyTokenizer | None:
        return own_tokenizer(self.content, self.path) if self.is_ours else None


def find_start(given: Mapping[str, Any], folder: CheckpointFolder) -> Start | None:
    """What --load names; InputError where the new run would be written over it."""
    path = given.get("load")
    if not path:
        return None
    if "save_dir" not in given or Path(path).resolve().parent == folder.path.resolve():
        raise InputError(
            f"--load {path}: the run that starts from it needs a folder of its own; give another --save_dir"
        )
    return Start(path, load_checkpoint(path))


def require_weights(config: Config, starts_somewhere: bool) -> None:
    """InputError for a self-critical stage without trained weights."""
    if config.self_critical and not starts_somewhere:
        raise InputError(
            "--self_critical: it goes on from a model that writes reports already; train with cross "
            "entropy first, then give --load results/RUN/model_best.pth and another --save_dir"
        )


def objective_kind(config: Config) -> type[Objective]:
    """The objective of the stage."""
    return SelfCritical if config.self_critical else Objective


def equip(config: Config, data: compose.Data, objective: Objective, dataset: ReportDataset, folder: Path) -> None:
    """Tell a self-critical objective what is rewarded; others need nothing."""
    if not isinstance(objective, SelfCritical):
        return
    texts: dict[str, dict[str, None]] = {}
    for study in dataset.studies:
        own = texts.setdefault(study.study_id, {})
        own.update(dict.fromkeys(clean_report(text, data.tokenizer.cleaner) for text in references(study)))
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
        labelled=bool(compose.score_tag(config)),
    )
    logger.info(
        "self-critical: %d samples of each study, reward %s, baseline %s, learning rates %g and %g",
        config.scst_samples,
        config.scst_reward,
        config.scst_baseline,
        config.lr_ve,
        config.lr_ed,
    )
