"""Which runs of a table are done, cut short, missing or made with other settings, and how main_train.py is called."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.config import NO_EFFECT_ON_RESULTS, OLDER_VALUES, Config
from modules.evaluation.settings import ScoringSettings
from modules.flags import parse_flags, resolve_config, stage_settings
from modules.ithn.synthesis import NEEDING_NEGATIVES
from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from scripts.experiments.files import DataSet, Row, Table

RESULTS, RECORD, CHECKPOINT, BEST = "results.json", "experiment.json", "current_checkpoint.pth", "model_best.pth"
START = "start_sha256"  # in RECORD: of the model that training started from
DONE, CUT, MISSING, CHANGED, UNAVAILABLE = "done", "cut", "missing", "changed", "not available"
UNTESTED = "to be tested again"  # trained as wanted, scored by other flags
# Flags that act after training: the best model is tested again, not trained again.
SCORING = frozenset(item.name for item in dataclasses.fields(ScoringSettings))
# Files that training starts from: what is in them counts, wherever they lie.
INPUT_FILES = ("label_path", "init_protypes_path", "visual_extractor_weights")
FILES = "files_sha256"
SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class Index:
    """Hard negatives that rows of one data set share."""

    path: Path
    ann_path: str
    dataset_name: str
    text_encoder: str
    top_k: int


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    row: Row
    seed: int
    folder: Path
    flags: tuple[str, ...]  # of main_train.py
    settings: Mapping[str, Any]  # what decides the results
    epochs: int
    index: Index | None  # to be mined first, where it is not there
    state: str
    reason: str = ""
    weights: Path | None = None  # best model of another row's run, which this one is tested on
    start: Path | None = None  # best model of another row's run, which this one's training starts from

    @property
    def model(self) -> str:
        """Backbone, "" where it is not available."""
        return self.settings.get("model_name", "")

    @property
    def name(self) -> str:
        """Row and seed, as messages name them."""
        return f"{self.row.name} seed {self.seed}"


def plan(
    table: Table,
    datasets: Mapping[str, DataSet],
    out: Path,
    *,
    overrides: Iterable[str],
    text_encoder: str,
    models: Collection[str],
) -> list[Run]:
    """Every run of the table in its order, each with its state; InputError for flags that main_train.py refuses."""
    indices: dict[str, Index] = {}
    resolved: dict[str, Config] = {}
    runs = []
    # Settings go on from those of the model that a row starts from or is tested on.
    for row in sorted(table.rows, key=lambda row: (bool(row.trained_as), bool(row.starts_from))):
        if row.dataset not in datasets:
            raise InputError(
                f"row {row.name}: data set {row.dataset!r} is none of {', '.join(datasets)}; "
                "--datasets FILE names a file with others"
            )
        dataset = datasets[row.dataset]
        model = _model_of((*dataset.flags, *row.flags, *overrides))
        if model not in models:
            reason = f"--model_name {model}: the backbones here are {', '.join(models)}"
            runs += [
                Run(row, seed, _folder(out, row, seed), (), {}, 0, None, UNAVAILABLE, reason) for seed in row.seeds
            ]
            continue
        flags = (*dataset.flags, *dataset.model_flags.get(model, ()), *row.flags, *overrides)
        given, config = _resolve(row, flags, saved=resolved.get(row.starts_from or row.trained_as))
        resolved[row.name] = config
        sha256 = file_sha256(config.ann_path)
        if _needs_index(config, given):
            encoder = text_encoder or table.text_encoder or dataset.text_encoder
            _add_index(indices, out, row.dataset, config, encoder, sha256)
            wanted = str(indices[row.dataset].path)
        else:
            wanted = config.negative_index
        runs += [_run(row, seed, out, flags, config, sha256, wanted) for seed in row.seeds]
    order = [row.name for row in table.rows]
    runs.sort(key=lambda run: order.index(run.row.name))
    # A row that draws from more neighbours than the rows before it makes the shared index deeper.
    return [_with_index(run, indices[run.row.dataset]) if run.row.dataset in indices else run for run in runs]


def changed_line(runs: Iterable[Run]) -> str | None:
    """One line that names the first run whose folder was made with other settings, or None."""
    changed = [run for run in runs if run.state == CHANGED]
    if not changed:
        return None
    more = f" (and {len(changed) - 1} more: --dry_run lists them)" if len(changed) > 1 else ""
    return (
        f"{changed[0].name}{more}: {changed[0].folder} was made with other settings: {changed[0].reason}; give "
        "another --out, or --redo_changed to put the old folder aside and run again"
    )


def fingerprint(settings: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that differ where the settings do."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_json(path: Path) -> dict[str, Any]:
    """An object that this project wrote; InputError where the file is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to run this again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected an object; delete it to run this again")
    return content


def _model_of(flags: tuple[str, ...]) -> str:
    """Looked up by hand: the flags of a backbone that is not here may be unknown too."""
    model = Config.__dataclass_fields__["model_name"].default
    for number, word in enumerate(flags):
        if word in ("--model_name", "--backbone") and number + 1 < len(flags):
            model = flags[number + 1]
        elif word.startswith(("--model_name=", "--backbone=")):
            model = word.partition("=")[2]
    return model.lower()


def _resolve(row: Row, flags: tuple[str, ...], saved: Config | None) -> tuple[Mapping[str, Any], Config]:
    """The flags given, and the settings; ``saved`` are those of the other row's model that is loaded."""
    for own in ("seed", "save_dir", "resume", "record_dir", *(["load"] if saved else [])):
        if any(word.split("=")[0] == f"--{own}" for word in flags):
            raise InputError(f"row {row.name}: --{own} is set for each run by this script; take it out of the flags")
    try:
        given, _ = parse_flags(flags, "main_train.py", "")
        return given, resolve_config(given, stage_settings(given, dataclasses.asdict(saved)) if saved else None)
    except InputError as error:
        raise InputError(f"row {row.name}: {error}") from error


def _needs_index(config: Config, given: Mapping[str, Any]) -> bool:
    return config.ithn != "off" and config.strategy in NEEDING_NEGATIVES and "negative_index" not in given


def _add_index(indices: dict[str, Index], out: Path, dataset: str, config: Config, encoder: str, sha256: str) -> None:
    top_k = max(config.num_neighbours, indices[dataset].top_k if dataset in indices else 0)
    # The k nearest are the first k of more, so the name, which is compared, leaves k out.
    name = f"{dataset}-{re.sub(r'[^A-Za-z0-9.]+', '-', encoder).strip('-')}-{sha256[:8] or 'new'}.safetensors"
    path = out / "hard_negatives" / f"top{top_k}" / name
    indices[dataset] = Index(path, config.ann_path, config.dataset_name, encoder, top_k)


def _folder(out: Path, row: Row, seed: int) -> Path:
    return out / row.name / f"seed{seed}"


def _run(row: Row, seed: int, out: Path, flags: tuple[str, ...], config: Config, sha256: str, index: str) -> Run:
    folder = _folder(out, row, seed)
    settings = _settings(dataclasses.asdict(config) | {"seed": seed, "negative_index": index}, sha256)
    settings[FILES] = {name: digest for name in INPUT_FILES if (digest := file_sha256(getattr(config, name)))}
    weights, start = (out / name / f"seed{seed}" / BEST if name else None for name in (row.trained_as, row.starts_from))
    state, reason = _state(folder, settings, weights)
    if start and state in (DONE, CUT, UNTESTED) and _started_elsewhere(folder, start):
        state, reason = CHANGED, f"row {row.starts_from}, which it started from, was trained anew since"
    flags = (
        *flags,
        "--seed",
        str(seed),
        "--save_dir",
        str(folder),
        "--record_dir",
        str(out / "records"),
        "--exp_name",
        f"{row.label}, {row.dataset + ', ' if row.name != row.whole else ''}seed {seed}",
    )
    return Run(row, seed, folder, flags, settings, 0 if weights else config.epochs, None, state, reason, weights, start)


def _started_elsewhere(folder: Path, start: Path) -> bool:
    """Whether the run in ``folder`` is known to have started from another model than ``start`` is now."""
    if not start.is_file() or not (folder / RECORD).is_file():
        return False
    now = _sha256(start)
    return read_json(folder / RECORD).get(START, now) != now


def _with_index(run: Run, index: Index) -> Run:
    if run.settings.get("negative_index") != index.path.name:
        return run
    return dataclasses.replace(run, index=index, flags=(*run.flags, "--negative_index", str(index.path)))


def _settings(config: Mapping[str, Any], annotation_sha256: str) -> dict[str, Any]:
    """The settings that decide the results; those that ``config`` lacks, being older, as they were then."""
    known = {name: config.get(name, value) for name, value in OLDER_VALUES.items() if name not in NO_EFFECT_ON_RESULTS}
    known["negative_index"] = Path(known["negative_index"]).name if known["ithn"] != "off" else ""
    known["feature_cache"] = bool(known["feature_cache"])  # a cache alters the samples, its folder nothing
    # As JSON gives it back: tuples become lists.
    return json.loads(json.dumps(known)) | {"annotation_sha256": annotation_sha256}


def _state(folder: Path, wanted: Mapping[str, Any], weights: Path | None) -> tuple[str, str]:
    """State of a run's folder, and for CHANGED what differs; ``weights`` are tested there, None: are trained there."""
    if (folder / RESULTS).is_file():
        content = read_json(folder / RESULTS)
        made_from = content.get("provenance", {})
        found = _settings(content.get("config", {}), made_from.get("annotation_sha256", ""))
        found[FILES] = made_from.get(FILES, {})
        state = DONE
        if weights and weights.is_file() and made_from.get("checkpoint_sha256") != _sha256(weights):
            state = UNTESTED  # they were trained anew since
    elif not (folder / CHECKPOINT).is_file():
        return MISSING, ""
    elif not (folder / RECORD).is_file():
        return CHANGED, f"{CHECKPOINT} without {RECORD}: another program started it"
    else:
        found, state = read_json(folder / RECORD).get("settings", {}), CUT
    if not wanted["annotation_sha256"]:  # not made yet: nothing to compare with
        found = dict(found) | {"annotation_sha256": ""}
    found, wanted = _by_content(found, wanted)
    if fingerprint(found) == fingerprint(wanted):
        return state, ""
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if SCORING.issuperset(names) and (state == CUT or (weights or folder / BEST).is_file()):
        return (CUT if state == CUT else UNTESTED), ""
    return CHANGED, _difference(names, found, wanted)


def _sha256(path: Path) -> str:
    """Of a file that several rows are tested on, and that every plan looks at: read once."""
    known = path.stat()
    return _read_sha256(path, known.st_mtime_ns, known.st_size)


@functools.cache
def _read_sha256(path: Path, *_as_it_is: int) -> str:
    return file_sha256(path)


def _by_content(*both: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings with the hash of an input file in place of its path where both sides know it."""
    hashes = [settings.get(FILES, {}) for settings in both]
    shared = [name for name in INPUT_FILES if all(name in known for known in hashes)]
    return [
        {name: value for name, value in settings.items() if name != FILES} | {name: known[name] for name in shared}
        for settings, known in zip(both, hashes, strict=True)
    ]


def _difference(names: Sequence[str], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    shown = [f"{name} {_short(found.get(name))}, now {_short(wanted.get(name))}" for name in names[:SHOWN_DIFFERENCES]]
    more = f"; and {len(names) - SHOWN_DIFFERENCES} more" if len(names) > SHOWN_DIFFERENCES else ""
    return "; ".join(shown) + more


def _short(value: Any) -> str:
    return str(value)[:40]
