"""README.md of a shared model: the hub's header, how to use it, what it scored and against what, what it is not for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modules.data.dataset_specs import DATASETS, OTHER
from modules.evaluation.metric_table import CLINICAL_F1, FULL, SCORES, SENTENCE_METRICS, SENTENCE_SCORES
from modules.runtime.hub import shared_name

MODEL = "model"  # its scores' name in results.json
TASK = "image-to-text"
_CLINICAL = {
    CLINICAL_F1.format(average) + FULL: f"Clinical F1, {average}, 14 classes" for average in ("micro", "macro")
}
# The hub's name of a score's kind, by the metric it comes from.
_KINDS = {score.name: metric.name.lower() for metric in SENTENCE_METRICS for score in metric.scores}
_USE = """\
```bash
python scripts/predict.py --load FOLDER chest.png                 # FOLDER: this one, or hf://OWNER/NAME on the hub
python main_test.py --load FOLDER --ann_path annotation.json --image_dir images/ --save_dir results/tested
```

```python
from modules.data.images import open_image
from modules.run.predictor import load_predictor

predictor = load_predictor("FOLDER", {})
[report] = predictor.write([[open_image("chest.png")]])  # a study: a list of its images
print(report.text)
```"""


@dataclass(frozen=True)
class CardFacts:
    """What the person who shares the model says of it; ``language`` is a code such as en, "" where it is not known."""

    dataset: str
    licence: str = "other"
    language: str = ""
    data_licence: str = ""


def model_card(content: Mapping[str, Any], results: Mapping[str, Any], facts: CardFacts) -> str:
    """The card of the checkpoint ``content``; ``results`` are its results.json, empty without a test of it."""
    config = content["config"]
    captions = config.get("captions")
    if captions is None:
        captions = DATASETS.get(config["dataset_name"], OTHER).captions
    what = "captions of images" if captions else "reports of radiographs"
    lines = [
        f"# {config['model_name']} on {facts.dataset}",
        "",
        f"Writes {what}. Backbone `{config['model_name']}`, visual extractor "
        f"`{shared_name(config['visual_extractor'])}`, trained with strategy `{content['strategy']}` to epoch "
        f"{content['epoch']}. "
        "`config.json` has the settings, `vocabulary.json` the words.",
        "",
        "**Research software, no medical device: no report that it writes is fit for care.**",
        "",
        *(["Trained on synthetic images: it says nothing about patients.", ""] if results.get("synthetic") else []),
        "## Use",
        "",
        "With the code that trained it, in its folder:",
        "",
        _USE,
        "",
        "## Data",
        "",
        f"Trained and tested on {facts.dataset}; language of the reports: {facts.language or 'not stated'}; licence of "
        f"the data: {facts.data_licence or 'not stated'}. The weights and the vocabulary come from its reports.",
        "",
        *_score_lines(results),
    ]
    return f"---\n{_header(config, results, facts)}\n---\n\n" + "\n".join(lines)


def _score_lines(results: Mapping[str, Any]) -> list[str]:
    """The scores beside the baselines', their intervals, and what they were computed on."""
    test = results.get("test", {})
    names = _scored(results)
    if not names:
        return ["## Scores", "", "No scores of this checkpoint were found next to it.", ""]
    systems = [MODEL, *(name for name in test if name != MODEL)]
    count = results.get("variety", {}).get(MODEL, {}).get("num_reports")
    headings = ["score", MODEL, "95 % interval", *(f"baseline: {name}" for name in systems[1:])]
    lines = [
        "## Scores",
        "",
        f"One run, test split of {count:,} reports." if isinstance(count, int) else "One run, test split.",
        "",
        "| " + " | ".join(headings) + " |",
        "|---" * len(headings) + "|",
    ]
    for name, label in names.items():
        cells = [_value(test[MODEL][name]), _interval(results, name)]
        cells += [_value(test[system].get(name)) for system in systems[1:]]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    lines += [
        "",
        "Words are scored against references cut to the maximum length, as the R2Gen family does; clinical F1 is that "
        "of labels by rules, uncertain ones as negative, against whole references. A baseline needs no training: what "
        "the model scores above it is what it has learnt from the images. "
        f"Intervals: {results.get('intervals_are', 'not recorded')}; they do not cover other seeds.",
        "",
    ]
    return lines + [line for warning in results.get("warnings", ()) for line in (f"Warning: {warning}.", "")]


def _scored(results: Mapping[str, Any]) -> dict[str, str]:
    """The scores that the card names, of those that the model has."""
    known = {score.name: SCORES[score.name].label for score in SENTENCE_SCORES} | _CLINICAL
    found = results.get("test", {}).get(MODEL, {})
    return {name: label for name, label in known.items() if isinstance(found.get(name), float)}


def _value(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "–"


def _interval(results: Mapping[str, Any], name: str) -> str:
    limits: Sequence[float] | None = results.get("intervals", {}).get(MODEL, {}).get(name)
    return f"{limits[0]:.3f} – {limits[1]:.3f}" if limits else "–"


def _header(config: Mapping[str, Any], results: Mapping[str, Any], facts: CardFacts) -> str:
    """The hub's metadata, with the scores as its model-index."""
    from huggingface_hub import EvalResult, ModelCardData

    name = f"{config['model_name']} on {facts.dataset}"
    scores = [
        EvalResult(
            task_type=TASK,
            task_name="Radiology report generation",
            dataset_name=facts.dataset,
            dataset_type="".join(letter if letter.isalnum() else "_" for letter in facts.dataset.lower()),
            dataset_split="test",
            metric_type=_KINDS.get(score, "f1"),
            metric_name=label,
            metric_value=round(results["test"][MODEL][score], 4),
        )
        for score, label in _scored(results).items()
    ]
    return ModelCardData(
        license=facts.licence,
        language=facts.language or None,
        pipeline_tag=TASK,
        tags=["radiology", "radiology-report-generation", "ithn"],
        model_name=name,
        eval_results=scores or None,
    ).to_yaml()
