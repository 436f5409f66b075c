"""Which scores a run computes, as flags; importing it needs no package."""

from dataclasses import dataclass

from modules.evaluation.metric_table import RADEVAL
from modules.runtime.settings import setting


@dataclass(frozen=True)
class ScoringSettings:
    """Scores in addition to the sentence metrics, and the programs and models that some of them need."""

    meteor: bool = setting(True, "scores", "METEOR (needs Java); false leaves it out")
    meteor_timeout: float = setting(
        120.0,
        "scores",
        "seconds without an answer after which METEOR's Java counts as hung, and METEOR is null",
        low=1.0,
        effect=False,
    )
    clinical: bool = setting(True, "scores", "clinical scores of labels by rules (radiology data sets only)")
    chexbert_path: str = setting("", "scores", "chexbert.pth: clinical scores of CheXbert's labels too")
    chexbert_encoder: str = setting(
        "bert-base-uncased",
        "scores",
        "folder with config.json and vocab.txt of CheXbert's BERT, or a hub id to download them from",
        remote=True,
    )
    bertscore_path: str = setting("", "scores", "folder of a text encoder: BERTScore with it too")
    bertscore_layer: int = setting(
        0, "scores", "hidden layer that BERTScore compares; 0: the published tool's for this architecture", low=0
    )
    radgraph_path: str = setting("", "scores", "folder of a RadGraph model: RadGraph F1 too, by the package radgraph")
    radgraph_python: str = setting(
        "",
        "scores",
        "Python interpreter that has the package radgraph; default: this one, whatever a checkpoint says",
        typed_only=True,
    )
    radeval: str = setting(
        "",
        "scores",
        f"scores of the package radeval, by commas: {', '.join(RADEVAL)}; with --radeval_python and, but for rouge, "
        "with weights",
    )
    radeval_python: str = setting(
        "",
        "scores",
        "Python interpreter that has the package radeval; default: this one, whatever a checkpoint says",
        typed_only=True,
    )
    radeval_weights: str = setting(
        "",
        "scores",
        "folder of radeval's weights, as its downloads fill ~/.cache; default: ~/.cache, whatever a checkpoint says",
        typed_only=True,
    )
    floors: bool = setting(
        True, "scores", "score two training-free baselines: the commonest report, and the nearest training image's"
    )
