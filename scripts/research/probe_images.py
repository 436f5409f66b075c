"""How well a linear probe on a frozen visual extractor's features reads the 14 classes from a data set's images.

One logistic regression per class on the mean feature of each view, its strength chosen on the validation split. The
table has each class's positives, the test AUROC and its 95 % interval (1,000 bootstrap draws over studies). A class
needs 10 positives in training and 5 in validation and in test.

  python scripts/research/probe_images.py --ann_path data/phantom/annotation.json --image_dir data/phantom/images \\
      --label_path data/phantom/labels.csv --visual_extractor tf_efficientnet_lite0 --image_size 160 --out probe.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.config import Config
from modules.flags import Parser, add_flags
from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains

# Flags that mean what they mean in main_train.py.
SHARED = (
    "ann_path",
    "image_dir",
    "dataset_name",
    "visual_extractor",
    "visual_extractor_pretrained",
    "visual_extractor_weights",
    "image_size",
    "feature_cache",
    "batch_size",
    "num_workers",
    "seed",
    "device",
)
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # inverse of the L2 penalty
NEEDED = {"train": 10, "val": 5, "test": 5}  # positives, and negatives
DRAWS = 1000


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_flags(parser, SHARED, defaults=True)
    add("--label_path", required=True, metavar="FILE", help=Config.__dataclass_fields__["label_path"].metadata["help"])
    add("--label_columns", default="", metavar="ORDER", help="as in main_train.py; a pickle needs it")
    add("--out", type=Path, metavar="FILE", help="JSON file for the table and where it comes from")
    return parser


def pooled_features(config: Config, data, device) -> dict:
    """split -> (N, C) float32, the mean over a view's patches, the views side by side."""
    import numpy as np
    import torch

    from modules.run.build import build_extractor
    from modules.run.data import build_dataset, build_split_loader, cache_features
    from modules.runtime.run_log import Bar

    extractor = build_extractor(config, device, pretrained=True).to(device).eval()
    cache_features(config, data, extractor, device)
    features = {}
    with torch.inference_mode():
        for split in NEEDED:
            dataset = build_dataset(config, data, split, augment=False, extractor=extractor)
            loader = build_split_loader(config, dataset, device, shuffle=False)
            rows = []
            for batch in Bar(loader, f"features of {split}"):
                pair = batch.to(device).positive
                patches, _, _ = extractor(pair.images, pair.view_mask)  # (B, views * S, C)
                views = patches.unflatten(1, (-1, extractor.patches_per_view)).mean(2)
                rows.append(views.flatten(1).float().cpu().numpy())
            features[split] = np.concatenate(rows)
    return features


def probe(features: dict, labels: dict, seed: int) -> dict:
    """AUROC on test with its interval for one class; ``labels`` is split -> (N,) bool."""
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fitted = []
    for strength in STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
        model.fit(features["train"], labels["train"])
        fitted.append((roc_auc_score(labels["val"], model.decision_function(features["val"])), strength, model))
    _, strength, model = max(fitted, key=lambda entry: entry[0])
    scores, truth, rng = model.decision_function(features["test"]), labels["test"], np.random.default_rng(seed)
    draws = []
    while len(draws) < DRAWS:
        chosen = rng.integers(len(truth), size=len(truth))
        if 0 < truth[chosen].sum() < len(truth):
            draws.append(roc_auc_score(truth[chosen], scores[chosen]))
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"auroc": float(roc_auc_score(truth, scores)), "low": float(low), "high": float(high), "C": strength}


def table(found: dict[str, dict]) -> str:
    """Markdown, the commonest class first."""
    lines = ["| class | positives train / test | AUROC | 95 % |", "|---|---|---|---|"]
    for name, row in sorted(found.items(), key=lambda item: -item[1]["positives"]["train"]):
        score = f"{row['auroc']:.3f} | {row['low']:.3f} to {row['high']:.3f}" if "auroc" in row else "too few | "
        lines.append(f"| {name} | {row['positives']['train']} / {row['positives']['test']} | {score} |")
    return "\n".join(lines)


def main() -> None:
    """Look at every image once, fit, write."""
    arguments = build_parser().parse_args()
    own = contains('"classes":', '"annotation_sha256":', '"labels_sha256":')
    check_outputs(
        [Output("--out", arguments.out, "a table of this program", own)],
        [(f"--{name}", getattr(arguments, name)) for name in ("ann_path", "label_path", "visual_extractor_weights")],
    )
    config = Config(**{name: getattr(arguments, name) for name in SHARED}, ithn="off", freeze_visual_extractor=True)

    from modules.labels.study_labels import read_labels
    from modules.run.build import prepare_device
    from modules.run.data import read_data
    from modules.runtime.environment import provenance
    from modules.runtime.records import write_results
    from modules.runtime.run_log import Bar

    device = prepare_device(config)
    data = read_data(config)
    given = read_labels(arguments.label_path, columns=arguments.label_columns)
    labels = {split: given.of(data.annotation.splits[split]) > 0 for split in NEEDED}
    features = pooled_features(config, data, device)
    if len({rows.shape[1] for rows in features.values()}) > 1:
        raise InputError(f"{arguments.ann_path}: the splits differ in their number of views; a probe needs the same")
    found: dict[str, dict] = {}
    for column, name in enumerate(Bar(CLASSES, "probes")):
        own = {split: rows[:, column] for split, rows in labels.items()}
        enough = all(min(rows.sum(), (~rows).sum()) >= NEEDED[split] for split, rows in own.items())
        found[name] = {"positives": {split: int(rows.sum()) for split, rows in own.items()}}
        if enough:
            found[name] |= probe(features, own, arguments.seed)
    print(table(found))
    if arguments.out:
        content = {
            "classes": found,
            "annotation_sha256": data.annotation.sha256,
            "labels_sha256": given.sha256,
            "synthetic": data.annotation.synthetic,
            **provenance(str(device)),
        }
        write_results(arguments.out, content)


if __name__ == "__main__":
    run_entry_point(main)
