"""What the models that flags name are, read once when a run begins and kept in its checkpoints."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.flags import resolve_config
from modules.layers.hub_encoders import describe_encoder, find_encoder, is_hub_name, read_description
from modules.runtime import distributed
from modules.runtime.errors import InputError
from modules.runtime.input_files import read_json
from modules.runtime.settings import is_local_only

logger = logging.getLogger("ithn")


def require_described(name: str, description: str) -> None:
    """InputError where a checkpoint names a model of a folder or the hub without saying what it is."""
    if is_local_only(name) and not description:
        raise InputError(
            f"--visual_extractor {name}: named by a checkpoint that lacks its description, visual_extractor_config; "
            "no folder is read and nothing is downloaded on a file's word"
        )


def with_descriptions(given: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The flags ``given`` with descriptions of the models that they name: of an hf: visual extractor, whose image size
    is the default, and of a --decoder.

    ``saved`` are the settings of a checkpoint. InputError where a model cannot be had, or does not do.
    """
    return _with_decoder(_with_encoder(given, saved), saved)


def _with_decoder(given: dict[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    config = resolve_config(given, saved)
    name, described = config.decoder, config.decoder_config
    if config.model_name != "hf" or (described and not described.endswith(".json")) or not (described or name):
        return given
    from models.encoder_decoder_language import describe_language
    from modules.data.bpe_tokenizer import find_gpt2

    if is_local_only(name) and not described:
        raise InputError(f"--decoder {name}: named by a checkpoint that lacks its description, decoder_config")
    where = f"--decoder_config {described}" if described else f"--decoder {name}"
    try:
        if described:
            path = Path(described)
        else:
            with distributed.main_process_first():
                path = find_gpt2(name, "--decoder") / "config.json"
        return given | {"decoder_config": describe_language(read_json(path), where)}
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def _with_encoder(given: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    config = resolve_config(given, saved)
    name = config.visual_extractor
    if not is_hub_name(name) or config.visual_extractor_config or config.detection_features:
        return dict(given)
    require_described(name, "")
    try:
        with distributed.main_process_first():
            folder = find_encoder(name)
        found = describe_encoder(folder)
        look = read_description(found)
    except ValueError as error:
        raise InputError(f"--{str(error).removeprefix('--')}") from error
    size = {} if "image_size" in {**given, **(saved or {})} else {"image_size": look.size}
    shown = ", ".join(f"{part} {' '.join(f'{value:g}' for value in getattr(look, part))}" for part in ("mean", "std"))
    logger.info("%s: made for images of %d pixels; %s", name, look.size, shown)
    return {**given, **size, "visual_extractor_config": found}
