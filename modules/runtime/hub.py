"""Fetches a model from the Hugging Face hub, once, and only what is needed of it."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from modules.runtime.errors import InputError
from modules.runtime.settings import is_local_only

HUB = "hf://"  # before owner/name, where a flag takes paths too: a mistyped path is not asked for
MODEL = "hf:"  # before a folder or owner/name, where a flag takes names of other libraries' models too
_CONFIGURATION = ("*.json", "*.txt", "*.model")  # also the vocabularies of all tokenisers


@contextlib.contextmanager
def without_requests() -> Iterator[None]:
    """The libraries of the hub keep to their caches in the block."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def respelled(name: str) -> str:
    """``name`` without what people add to one of our own names, as in TF-IDF; a hub id with its owner stays."""
    return name if "/" in name else re.sub(r"[^a-z0-9]", "", name.lower())


def shared_name(name: str) -> str:
    """``name`` for others to read: of hf:FOLDER its last part alone, as a path belongs to its machine."""
    where = name.removeprefix(MODEL)
    is_id = where.count("/") <= 1 and not where.startswith((".", "/", "~")) and not Path(where).exists()
    return name if is_id or not name.startswith(MODEL) else MODEL + (Path(where).name or "model")


def cached_model(name: str, *, needs_vocabulary: bool = True) -> Path | None:
    """Folder with the files of hub model ``name`` on this machine; None where they are not (all) here."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _complete([path.name for path in folder.iterdir()], needs_vocabulary) else None


def download_model(
    name: str, *, flag: str, otherwise: str = "", prefix: str = "", needs_vocabulary: bool = True
) -> Path:
    """Folder with the files of hub model ``name``: from the local hub cache, or else downloaded into it.

    Safetensors are taken where the model has them, PyTorch's files otherwise; code files never. InputError where the
    hub cannot be reached or does not have (or give out) the model: it names the ``flag``, whose values are written
    after ``prefix``, and what can be done ``otherwise``.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    named = f"{flag} {prefix}{name}"
    try:
        folder = cached_model(name, needs_vocabulary=needs_vocabulary)
        if folder is not None:
            return folder
    except HFValidationError as error:
        raise InputError(f"{named}: neither a folder nor the id of a hub model (owner/name)") from error
    if is_local_only(name):
        raise InputError(
            f"{named}: named by a checkpoint and not on this machine; nothing is downloaded on a file's word: "
            f"give {named} to have it fetched, or a folder"
        )
    try:
        files = [entry.rfilename for entry in HfApi().model_info(name, timeout=10).siblings]
        weights = _weights(files)
        if not weights:
            raise InputError(f"{named}: the hub model has no safetensors and no PyTorch weights")
        return Path(snapshot_download(name, allow_patterns=[*_CONFIGURATION, *weights]))
    except GatedRepoError as error:
        raise InputError(
            f"{named}: its owner asks for consent on the hub page; then log in with: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(f"{named}: no such model on the hub, nor a folder of that name") from error
    except InputError:
        raise
    except Exception as error:  # connection, proxy, certificate, disk: the client raises many kinds
        raise InputError(
            f"{named}: the weights are not on this machine and cannot be downloaded "
            f"({type(error).__name__}); where there is a network, run 'hf download {name} --local-dir DIR' and give "
            f"'{flag} {prefix}DIR'" + (f"; {otherwise}" if otherwise else "")
        ) from error


def download_files(address: str, names: Sequence[str], *, flag: str) -> Path:
    """Folder with the files ``names`` of hf://owner/name: from the local hub cache, or else downloaded into it.

    InputError where the hub cannot be reached or does not have (or give out) the model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name = address.removeprefix(HUB)
    try:
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(names), local_files_only=True))
        except LocalEntryNotFoundError:
            folder = None
        if folder is None or not all((folder / file).is_file() for file in names):
            folder = Path(snapshot_download(name, allow_patterns=list(names)))
    except HFValidationError as error:
        raise InputError(f"{flag} {address}: expected {HUB}owner/name") from error
    except Exception as error:  # connection, proxy, certificate, no such model, consent, disk
        raise InputError(
            f"{flag} {address}: cannot be downloaded ({type(error).__name__}); where there is a network, run "
            f"'hf download {name} --local-dir DIR' and give '{flag} DIR'"
        ) from error
    if missing := [file for file in names if not (folder / file).is_file()]:
        raise InputError(f"{flag} {address}: has no {missing[0]}; it is not a model of scripts/export.py")
    return folder


def _weights(files: list[str]) -> list[str]:
    """The weight files to take among ``files`` of a model's top folder."""
    kinds = (".safetensors", ("model", "open_clip_model")), (".bin", ("pytorch_model", "open_clip_pytorch_model"))
    for suffix, prefixes in kinds:
        chosen = [name for name in files if name.startswith(prefixes) and name.endswith(suffix)]
        if chosen:
            return chosen
    return []


def _complete(files: list[str], needs_vocabulary: bool) -> bool:
    """Whether a cached folder has all kinds of files: an interrupted download leaves only some."""
    vocabulary = any(name.startswith(("tokenizer.", "vocab", "spiece", "sentencepiece")) for name in files)
    described = "config.json" in files or "open_clip_config.json" in files
    return described and (vocabulary or not needs_vocabulary) and bool(_weights(files))
