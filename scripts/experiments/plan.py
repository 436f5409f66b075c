"""Which runs of a table are done, interrupted, missing or were made with other settings, and their flags."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.config import NO_EFFECT_ON_RESULTS, OLDER_VALUES, Config
from modules.evaluation.settings import ScoringSettings
from modules.flags import flags_in_effect, parse_flags, resolve_config, stage_settings
from modules.ithn.synthesis import NEEDING_NEGATIVES
from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from modules.runtime.input_files import read_json as read_plain_json
from scripts.experiments.files import DataSet, Row, Table

RESULTS, RECORD, CHECKPOINT, BEST = "results.json", "experiment.json", "current_checkpoint.pth", "model_best.pth"
START = "start_sha256"  # in RECORD: of the model that training started from
DONE, CUT, MISSING, CHANGED = "done", "interrupted", "missing", "changed"
UNTESTED = "to be tested again"  # trained as wanted, but scored with other flags
# Flags that act after training: the best model is tested again, not trained again.
SCORING = frozenset(item.name for item in dataclasses.fields(ScoringSettings))
FILES = "files_sha256"  # of what training starts from: their content counts, not their place
INDEX = "negative_index"
UNMADE = "new"  # in the name of an index, in place of the hash of an annotation that does not exist yet
INPUT_FILES = ("label_path", "init_protypes_path", "visual_extractor_weights")
SHOWN_DIFFERENCES = 3
# What the run itself decides, where a row leaves it open: the device's precision, the description and the image size of
# a model of transformers.
LEFT_OPEN = {"precision": "auto", "decoder_config": "", "visual_extractor_config": "", "image_size": 0}


@dataclass(frozen=True)
class Index:
    """Hard negatives that the rows of one data set share."""

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
    settings: Mapping[str, Any]  # what the results depend on
    index: Index | None  # to be mined first
    state: str
    reason: str = ""
    weights: Path | None = None  # best model of another row's run, which this run tests
    start: Path | None = None  # best model of another row's run, from which this run's training starts

    @property
    def model(self) -> str:
        """The backbone."""
        return self.settings["model_name"]

    @property
    def name(self) -> str:
        """Row and seed, as messages name them."""
        return f"{self.row.name} seed {self.seed}"


def plan(
    table: Table, datasets: Mapping[str, DataSet], out: Path, *, overrides: Sequence[str] = (), text_encoder: str = ""
) -> list[Run]:
    """Every run of the table in its order, with its state; InputError for flags that main_train.py would refuse."""
    resolved: dict[str, tuple[tuple[str, ...], Config]] = {}
    indices: dict[str, Index] = {}
    # A row that starts from another row's model, or tests it, inherits its settings.
    for row in sorted(table.rows, key=lambda row: (bool(row.trained_as), bool(row.starts_from))):
        if row.dataset not in datasets:
            raise InputError(
                f"row {row.name}: data set {row.dataset!r} is not one of {', '.join(datasets)}; --datasets FILE names "
                "a file with others"
            )
        dataset = datasets[row.dataset]
        saved = resolved.get(row.starts_from or row.trained_as, (None, None))[1]
        model = _resolve(row, (*dataset.flags, *row.flags, *overrides), saved, complete=False)[1].model_name
        flags = (*dataset.flags, *dataset.model_flags.get(model, ()), *row.flags, *overrides)
        given, config = _resolve(row, flags, saved)
        resolved[row.name] = flags, config
        if config.ithn != "off" and config.strategy in NEEDING_NEGATIVES and "negative_index" not in given:
            encoder = text_encoder or table.text_encoder or dataset.text_encoder
            indices[row.name] = _index(out, row.dataset, config, encoder)
    # The k nearest are the first k of more: rows of one data set share the largest index.
    deepest = {index.path.name: index for index in sorted(indices.values(), key=lambda index: index.top_k)}
    return [
        _run(
            row,
            seed,
            out,
            *resolved[row.name],
            deepest.get(indices[row.name].path.name) if row.name in indices else None,
        )
        for row in table.rows
        for seed in table.seeds
    ]


def changed_line(runs: Iterable[Run]) -> str | None:
    """One line that names the first run whose folder was made with other settings, or None."""
    changed = [run for run in runs if run.state == CHANGED]
    if not changed:
        return None
    more = f" (and {len(changed) - 1} more: --dry_run lists them)" if len(changed) > 1 else ""
    return (
        f"{changed[0].name}{more}: {changed[0].folder} was made with other settings: {changed[0].reason}; give "
        "another --out, or --redo_changed to move the old folder aside and run again"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this project wrote; InputError if the file is damaged."""
    try:
        content = read_plain_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to run this again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected an object; delete it to run this again")
    return content


def _resolve(
    row: Row, flags: tuple[str, ...], saved: Config | None, *, complete: bool = True
) -> tuple[Mapping[str, Any], Config]:
    """The flags given that have an effect, unless they are not ``complete`` yet, and all settings; ``saved`` are those
    of the other row's model that is loaded.
    """
    for own in ("seed", "save_dir", "resume", "record_dir", *(["load"] if saved else [])):
        if any(word.split("=")[0] == f"--{own}" for word in flags):
            raise InputError(f"row {row.name}: --{own} is set for each run by this script; remove it from the flags")
    try:
        given, _ = parse_flags(flags, "main_train.py", "")
        loaded = stage_settings(given, dataclasses.asdict(saved)) if saved else None
        config = resolve_config(given, loaded)
        if not complete:
            return given, config
        left, _ = flags_in_effect(given, config, loaded=saved is not None)
        return left, resolve_config(left, loaded)
    except InputError as error:
        raise InputError(f"row {row.name}: {error}") from error


def _index(out: Path, dataset: str, config: Config, encoder: str) -> Index:
    sha256 = file_sha256(config.ann_path)
    name = f"{dataset}-{re.sub(r'[^A-Za-z0-9.]+', '-', encoder).strip('-')}-{sha256[:8] or UNMADE}.safetensors"
    # The name is one of the settings that are compared, which the number of neighbours is not.
    path = out / "hard_negatives" / f"top{config.num_neighbours}" / name
    return Index(path, config.ann_path, config.dataset_name, encoder, config.num_neighbours)


def _run(row: Row, seed: int, out: Path, flags: tuple[str, ...], config: Config, index: Index | None) -> Run:
    folder = out / row.name / f"seed{seed}"
    path = config.negative_index if index is None else str(index.path)
    settings = comparable_settings(dataclasses.asdict(config) | {"seed": seed, "negative_index": path})
    if config.visual_extractor.startswith("hf:") and not any(word.split("=")[0] == "--image_size" for word in flags):
        settings["image_size"] = LEFT_OPEN["image_size"]
    settings["annotation_sha256"] = file_sha256(config.ann_path)
    # The index that rows share is mined anew where it is missing, and counts by its name.
    files = INPUT_FILES if index or not settings[INDEX] else (*INPUT_FILES, INDEX)
    settings[FILES] = {name: digest for name in files if (digest := file_sha256(getattr(config, name)))}
    weights, start = (out / name / f"seed{seed}" / BEST if name else None for name in (row.trained_as, row.starts_from))
    state, reason = _state(folder, settings, weights)
    if start and state in (DONE, CUT, UNTESTED) and _started_elsewhere(folder, start):
        state, reason = CHANGED, f"row {row.starts_from}, from which it started, has been trained again since"
    label = f"{row.label}, {row.dataset + ', ' if row.name != row.whole else ''}seed {seed}"
    flags += ("--seed", str(seed), "--save_dir", str(folder), "--record_dir", str(out / "records"), "--exp_name", label)
    if index is not None:
        flags += ("--negative_index", str(index.path))
    return Run(row, seed, folder, flags, settings, index, state, reason, weights, start)


def _started_elsewhere(folder: Path, start: Path) -> bool:
    """Whether the run in ``folder`` is known to have started from another model than ``start`` is now."""
    if not start.is_file() or not (folder / RECORD).is_file():
        return False
    now = _sha256(start)
    return read_json(folder / RECORD).get(START, now) != now


def comparable_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the results depend on; what an older ``config`` lacks is as it was then."""
    known = {name: config.get(name, value) for name, value in OLDER_VALUES.items() if name not in NO_EFFECT_ON_RESULTS}
    known |= {name: OLDER_VALUES[name] for name in idle_settings(known)}
    known["negative_index"] = Path(known["negative_index"]).name if known["ithn"] != "off" else ""
    known["feature_cache"] = bool(known["feature_cache"])  # a cache changes the samples, its folder does not
    return json.loads(json.dumps(known))  # tuples become lists, as in the files


def idle_settings(known: Mapping[str, Any]) -> set[str]:
    """The names of settings without effect beside the others, as those of the extractor are where it is frozen."""
    with contextlib.suppress(InputError):  # an older file may have what is refused now
        used, _ = flags_in_effect(known, Config(**known | {"adam_betas": tuple(known["adam_betas"])}))
        return known.keys() - used.keys()
    return set()


def _state(folder: Path, wanted: Mapping[str, Any], weights: Path | None) -> tuple[str, str]:
    """State of a run's folder and, for CHANGED, what differs; ``weights`` are tested there, None: are trained there."""
    if (folder / RESULTS).is_file():
        content = read_json(folder / RESULTS)
        made_from = content.get("provenance", {})
        found, state = settings_of(content.get("config", {}), made_from), DONE
        if weights and weights.is_file() and made_from.get("checkpoint_sha256") != _sha256(weights):
            state = UNTESTED  # they have been trained again since
    elif not (folder / CHECKPOINT).is_file():
        return MISSING, ""
    elif not (folder / RECORD).is_file():
        return CHANGED, f"{CHECKPOINT} without {RECORD}: another program started it"
    else:
        found, state = dict(read_json(folder / RECORD).get("settings", {})), CUT
    differing = differences(found, wanted)
    if not differing:
        return state, ""
    if SCORING.issuperset(differing) and (state == CUT or (weights or folder / BEST).is_file()):
        return (CUT if state == CUT else UNTESTED), ""
    return CHANGED, shown(differing, found, wanted)


def settings_of(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What finished results depend on, to be compared with a run's settings."""
    index = {INDEX: sha256} if (sha256 := provenance.get(f"{INDEX}_sha256")) else {}
    files = {FILES: index | provenance.get(FILES, {}), "annotation_sha256": provenance.get("annotation_sha256", "")}
    return comparable_settings(config) | files


def shown(differing: Sequence[str], found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first of the settings that differ, in words."""
    first = []
    for name in differing[:SHOWN_DIFFERENCES]:
        now = "another file" if found.get(name) == wanted.get(name) else f"{wanted.get(name)!s:.40}"
        first.append(f"{name} {found.get(name)!s:.40}, now {now}")
    more = f"; and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
    return "; ".join(first) + more


def differences(found: dict[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ; input files by content where both hashes are known, else by path."""
    hashes = [found.get(FILES, {}), wanted[FILES]]
    names = sorted({*found, *wanted} - {FILES})
    differing = []
    for name in names:
        if name == "annotation_sha256" and not wanted[name]:  # it does not exist yet
            continue
        if name in LEFT_OPEN and wanted.get(name) == LEFT_OPEN[name]:
            continue
        known = all(name in own for own in hashes)
        pair = [own[name] for own in hashes] if known else [found.get(name), wanted.get(name)]
        if name == INDEX and Path(str(pair[1])).stem.endswith(f"-{UNMADE}"):
            pair = [str(value).rpartition("-")[0] for value in pair]
        if pair[0] != pair[1]:
            differing.append(name)
    return differing


def _sha256(path: Path) -> str:
    """Of a file that several rows depend on, and that every plan looks at: read once."""
    known = path.stat()
    return _read_sha256(path, known.st_mtime_ns, known.st_size)


@functools.cache
def _read_sha256(path: Path, *_as_it_is: int) -> str:
    return file_sha256(path)
