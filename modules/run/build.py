"""Builds the parts of a run from its Config: device, visual extractor, backbone, objective, search."""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from models import backbone_class, owner_of
from models.base import Backbone
from modules.config import Config
from modules.data.dataset_specs import PRIOR_IMAGE, TEXTS
from modules.data.datasets import list_samples
from modules.data.tokenizers import clean_report
from modules.decoding.options import DecodingOptions
from modules.evaluation.tester import Predictions, Tester
from modules.ithn.objective import Objective
from modules.ithn.settings import OFF, ITHNSettings
from modules.ithn.weights import load_published_state
from modules.layers.hub_encoders import describe_encoder, find_encoder, is_hub_name
from modules.layers.visual_extractor import VisualExtractor
from modules.run.data import Data, backbone_settings, clusters, score_tag
from modules.run.descriptions import require_described
from modules.run.vocabulary import AnyTokenizer
from modules.runtime import distributed
from modules.runtime.environment import choose_device, choose_precision
from modules.runtime.errors import InputError
from modules.runtime.kernels import choose_kernels, prefers_channels_last
from modules.runtime.launch import process_device
from modules.runtime.run_log import Bar
from modules.runtime.settings import is_local_only, part_of

logger = logging.getLogger("ithn")
# What a model has while it is built and its checkpoint lacks: classifiers, heads of ITHN, empty biases.
MORE_TENSORS, MORE_ELEMENTS = 2_000, 2**27


def prepare_device(config: Config) -> torch.device:
    """The device of this process, with kernels chosen for speed or, by flag, for repeatability.

    InputError where --n_gpu 0 and --device disagree.
    """
    if config.n_gpu == 0 and config.device.startswith("cuda"):
        raise InputError(f"--n_gpu 0: asks for the CPU, --device {config.device} for a GPU; leave one of them out")
    device = choose_device("cpu" if config.n_gpu == 0 else process_device(config.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    choose_kernels(tf32=config.tf32, deterministic=config.deterministic)
    torch.manual_seed(config.seed)
    return device


def with_precision(config: Config, device: torch.device) -> Config:
    """``config`` with the --precision that auto means on ``device``."""
    return dataclasses.replace(config, precision=choose_precision(config.precision, device))


def _requests_for(name: str) -> contextlib.AbstractContextManager:
    """Where a checkpoint says ``name``, the libraries keep to what is on this machine."""
    if not is_local_only(name):
        return contextlib.nullcontext()
    from modules.runtime.hub import without_requests

    return without_requests()


def build_extractor(config: Config, device: torch.device, *, pretrained: bool) -> VisualExtractor:
    """The visual extractor, without weights unless ``pretrained``; InputError for an unknown name or misfit."""
    name, description = config.visual_extractor, config.visual_extractor_config
    weights = config.visual_extractor_weights if pretrained else None
    pretrained = pretrained and config.visual_extractor_pretrained
    folder = None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    try:
        with _requests_for(name):
            if is_hub_name(name) and (pretrained or not description):
                require_described(name, description)
                folder = find_encoder(name)
                description = description or describe_encoder(folder)
            return VisualExtractor(
                name,
                pretrained=pretrained,
                weights=weights,
                batch_norm=config.batch_norm,
                channels_last=prefers_channels_last(capability, config.precision, config.tf32),
                frozen=config.freeze_visual_extractor,
                unfreeze=config.unfreeze,
                image_size=config.image_size,
                pooling=config.image_feature,
                grid=config.feature_grid,
                description=description,
                folder=folder,
            )
    except ValueError as error:
        if is_local_only(name) and ":" in name and not is_hub_name(name):
            raise InputError(
                f"--visual_extractor {name}: named by a checkpoint and not on this machine; nothing is downloaded on a "
                f"file's word: fetch it with 'hf download {name.partition(':')[2]}' if you trust it"
            ) from error
        raise _flagged(config, error) from error


def _flagged(config: Config, error: ValueError) -> InputError:
    """The same line; where it begins with the name of a setting, with that of its flag (InputErrors have it)."""
    flag = "--" if hasattr(config, str(error).split(" ")[0].rstrip(":")) else ""
    return InputError(f"{flag}{error}")


def document_frequencies(data: Data) -> torch.Tensor:
    """Inverse document frequency (V,) of every token id in the training reports, begin and end without weight."""
    reports = data.annotation.splits["train"]
    counts = torch.zeros(data.tokenizer.num_ids)
    for study in reports:
        counts[list(set(data.tokenizer.encode(study.report)))] += 1
    idf = ((1 + len(reports)) / (1 + counts)).log()
    idf[list({*data.tokenizer.special_ids})] = 0
    return idf


def build_objective(
    config: Config,
    data: Data,
    device: torch.device,
    *,
    pretrained: bool,
    make: Callable[..., Objective] = Objective,
    of: "StoredWeights | None" = None,
) -> Objective:
    """Backbone and losses, on ``device``; ``make`` takes the arguments of Objective.

    InputError where they are to be those ``of`` a checkpoint and its settings do not fit its tensors.
    """
    settings = dataclasses.replace(part_of(config, ITHNSettings), strategy=data.strategy)
    if of is not None:
        features = data.features.shape if config.detection_features else None
        require_fitting(config, data.tokenizer, of, ithn=settings, features=features)
    if config.detection_features:
        from modules.data.detection_features import DetectionExtractor

        extractor: nn.Module = DetectionExtractor(*data.features.shape)
    else:
        with distributed.main_process_first():
            extractor = build_extractor(config, device, pretrained=pretrained)
    backbone = build_backbone(config, extractor, data.tokenizer, pretrained=pretrained)
    if config.activation_checkpointing:
        try:
            backbone.recompute_activations()
        except ValueError as error:
            raise InputError(f"--activation_checkpointing true: --model_name {config.model_name}: {error}") from error
    samples = len(list_samples(data.annotation.splits["train"], config.views))
    more = (
        {"idf": document_frequencies(data)} if settings.contrastive_targets == "text" and data.strategy != OFF else {}
    )
    objective = make(backbone, settings, n_samples=samples, **more)
    # What is shared out later may be larger than the device.
    (extractor if shares_parameters(config) else objective).to(device)
    if config.sync_bn:
        from modules.training.sync_norm import with_common_statistics

        return with_common_statistics(objective)
    return objective


def shares_parameters(config: Config) -> bool:
    """Whether --shard_parameters has an effect, as there are several processes."""
    return config.shard_parameters and distributed.is_distributed()


def build_backbone(config: Config, extractor: nn.Module, tokenizer: AnyTokenizer, *, pretrained: bool) -> Backbone:
    """The backbone that --model_name names, with the flags that it asks for; InputError where they do not fit."""
    kind = backbone_class(config.model_name)
    searched = (
        kind.session is not Backbone.session and kind.search is Backbone.search and kind.generate is Backbone.generate
    )
    if not searched and (config.guidance or config.sample_method == "sample"):
        flag = f"--guidance {config.guidance:g}" if config.guidance else "--sample_method sample"
        raise InputError(
            f"{flag}: --model_name {config.model_name} writes reports by a generate() of its own, not by a session() "
            "that can be guided or sampled"
        )
    options: dict[str, Any] = {}
    for resource in kind.resources:
        options |= RESOURCES[resource](config, tokenizer, pretrained)
    if pretrained and "decoder" in kind.resources:  # a trained model writes as it was trained
        _require_positions(config, extractor)
    settings = backbone_settings(config)
    try:
        backbone = kind(visual_extractor=extractor, num_ids=tokenizer.num_ids, settings=settings, **options)
    except ValueError as error:
        raise _flagged(config, error) from error
    backbone.unk_id = tokenizer.unk_id
    if config.contexts:
        from modules.layers.context_memory import ContextMemory

        texts = any(name in TEXTS for name in config.contexts)
        backbone.study_context = ContextMemory(
            backbone.image_dim, backbone.report_dim, texts=texts, prior_images=PRIOR_IMAGE in config.contexts
        )
    return backbone


def gpt2_options(config: Config, tokenizer: AnyTokenizer, pretrained: bool) -> dict[str, Any]:
    """Special ids, and the weights of --gpt2_path unless a checkpoint provides them; InputError where they misfit."""
    if config.max_seq_length > config.gpt2_positions:
        raise InputError(
            f"--max_seq_length {config.max_seq_length}: at most the decoder's --gpt2_positions {config.gpt2_positions}"
        )
    begin, end, padding = tokenizer.special_ids
    weights = None
    if pretrained and config.gpt2_path:
        weights = _gpt2_weights(config, tokenizer)
    elif pretrained:
        logger.info("--gpt2_path is empty: the decoder starts from random weights")
    return {"begin_id": begin, "end_id": end, "pad_token": padding, "gpt2": weights}


def _gpt2_weights(config: Config, tokenizer: AnyTokenizer) -> dict[str, Any]:
    from modules.data.bpe_tokenizer import BpeTokenizer, find_gpt2, read_gpt2

    weights, sizes = read_gpt2(find_gpt2(config.gpt2_path))
    wrong = {name: value for name, value in sizes.items() if getattr(config, name) != value}
    if wrong:
        raise InputError(
            f"--gpt2_path {config.gpt2_path}: its sizes differ from the flags; give "
            + " ".join(f"--{name} {value}" for name, value in wrong.items())
        )
    rows = len(weights["wte.weight"])
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.num_ids != rows:
        raise InputError(
            f"--gpt2_path {config.gpt2_path}: {rows} token embeddings, but its BPE files have "
            f"{tokenizer.num_ids} tokens"
        )
    if not isinstance(tokenizer, BpeTokenizer):
        logger.warning("GPT-2 with a word vocabulary: its token embeddings do not fit and start at random")
        del weights["wte.weight"]
    return weights


def _decoder_options(config: Config, tokenizer: AnyTokenizer, pretrained: bool) -> dict[str, Any]:
    """Special ids of the decoder's own vocabulary, and the folder of its weights unless a checkpoint provides them.

    InputError where it is none, or has too few positions.
    """
    from models.encoder_decoder_language import positions, read_language
    from modules.data.bpe_tokenizer import BpeTokenizer, find_gpt2

    try:
        most = positions(read_language(config.decoder_config or '{"model_type": "gpt2"}')[1])
    except ValueError as error:
        raise InputError(f"--{error}") from error
    if most is not None and config.max_seq_length > most:
        raise InputError(f"--max_seq_length {config.max_seq_length}: the decoder has positions for {most} tokens")
    own = isinstance(tokenizer, BpeTokenizer)
    begin, end, _ = tokenizer.special_ids if isinstance(tokenizer, BpeTokenizer) else (0, 0, 0)
    folder = find_gpt2(config.decoder, "--decoder") if pretrained and config.decoder else None
    if folder is not None and not own:
        logger.warning("--decoder with a word vocabulary: its token embeddings do not fit and start at random")
    if pretrained and folder is None and (config.freeze_decoder or config.lora_rank):
        logger.warning("without --decoder, what is frozen of the decoder stays as it was drawn at random")
    return {"begin_id": begin, "end_id": end, "keeps_vocabulary": own, "folder": folder}


def _require_positions(config: Config, extractor: Any) -> None:
    """InputError where a decoder that reads the visual tokens before the report has too few positions for both."""
    from models.encoder_decoder_language import LANGUAGES, positions, read_language

    kind, language = read_language(config.decoder_config or '{"model_type": "gpt2"}')
    most = positions(language)
    if most is None or not LANGUAGES[kind].prefix:
        return
    views = 1 if config.views == "separate" or config.detection_features else config.dataset.max_views
    views *= 2 if PRIOR_IMAGE in config.contexts else 1
    visual = views * extractor.patches_per_view
    if visual + config.max_seq_length > most:
        raise InputError(
            f"--max_seq_length {config.max_seq_length}: before a report the decoder reads {views} x "
            f"{extractor.patches_per_view} visual tokens, but has positions for {most} tokens in all; give a "
            f"smaller --feature_grid or --max_views, or a decoder with {visual + config.max_seq_length} positions"
        )


def _prototypes(config: Config, tokenizer: AnyTokenizer, pretrained: bool) -> dict[str, Any]:
    """The class of normal studies, and the initial prototypes unless a checkpoint provides them."""
    from modules.data.prototype_files import load_prototypes
    from modules.labels.study_labels import NO_FINDING

    classes = clusters(config)
    if config.num_cluster != len(classes):
        raise InputError(
            f"--num_cluster {config.num_cluster}: the labels have {len(classes)} classes with a cluster "
            f"of prototypes each; give --num_cluster {len(classes)}"
        )
    initial = None
    if pretrained and config.init_protypes_path:
        initial = load_prototypes(
            config.init_protypes_path,
            classes,
            num_protype=config.num_protype,
            d_img_ebd=config.d_img_ebd,
            d_txt_ebd=config.d_txt_ebd,
        )
    return {"no_finding": classes.index(NO_FINDING), "init_prototypes": initial}


# What a backbone may ask for in ``resources``: constructor arguments that are made of files or of the vocabulary.
RESOURCES: dict[str, Callable[[Config, AnyTokenizer, bool], dict[str, Any]]] = {
    "prototypes": _prototypes,
    "gpt2": gpt2_options,
    "decoder": _decoder_options,
}


def decoding_options(config: Config) -> DecodingOptions:
    """How reports are decoded."""
    return part_of(config, DecodingOptions)


def build_tester(
    config: Config,
    tokenizer: AnyTokenizer,
    objective: Objective,
    device: torch.device,
    score: Callable[[Predictions], Mapping] | None,
    training_studies: Iterable | None = None,
) -> Tester:
    """Generates and scores a split's reports; ``score`` maps predictions to metrics, in the main process only.

    ``training_studies`` are the batches whose mean image --guidance needs.
    """
    return Tester(
        objective,
        tokenizer=tokenizer,
        decoding=decoding_options(config),
        device=device,
        precision=config.precision,
        clean=lambda report: clean_report(report, tokenizer.cleaner),
        score=score,
        progress=Bar,
        score_tag=score_tag(config),
        collapse_repeats=config.collapse_repeats,
        seed=config.seed,
        training_studies=training_studies,
    )


class StoredWeights(NamedTuple):
    """The state dict of a checkpoint of this project, and the path of its file."""

    weights: Mapping[str, torch.Tensor]
    path: str


def require_fitting(
    config: Config,
    tokenizer: AnyTokenizer,
    of: StoredWeights,
    *,
    ithn: ITHNSettings | None = None,
    features: tuple[int, int] | None = None,
) -> None:
    """InputError unless a checkpoint has the tensors of the model that its own settings describe.

    Nothing is allocated on their word: the model is first built on the meta device, whose tensors have shapes and no
    bytes, and no further than the checkpoint has tensors. ``ithn``: as for Objective. ``features`` (R, C): of
    --detection_features.
    """
    try:
        with torch.device("meta"), _parameters_within(of), warnings.catch_warnings(action="ignore"):
            if features is not None:
                from modules.data.detection_features import DetectionExtractor

                extractor: nn.Module = DetectionExtractor(*features)
            else:
                extractor = build_extractor(config, torch.device("meta"), pretrained=False)
            backbone = build_backbone(config, extractor, tokenizer, pretrained=False)
            load_weights(Objective(backbone, ithn, n_samples=1), of.weights, of.path)
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # sizes that no tensor can have
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {of.path}: its settings describe no model: {reason}") from error


@contextlib.contextmanager
def _parameters_within(of: StoredWeights) -> Iterator[None]:
    """InputError as soon as modules built in the block have more or larger parameters than the checkpoint."""
    most = MORE_TENSORS + len(of.weights)
    left = MORE_ELEMENTS + sum(value.numel() for value in of.weights.values())
    found = 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal found, left
        found, left = found + 1, left - (0 if parameter is None else parameter.numel())
        if found > most or left < 0:
            raise InputError(
                f"checkpoint {of.path}: its settings describe a larger model than its {len(of.weights)} tensors; it "
                "was edited, or is damaged"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def load_weights(objective: Objective, weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Load a checkpoint's ``weights``, of any shape, this project's or published.

    InputError where they do not fit, or are not finite.
    """
    entry = objective.backbone.vocabulary_entry
    # Trained on several GPUs, the published codes save the wrapper's names.
    here, there = (
        next(
            (value.shape[0] for name, value in state.items() if name.removeprefix("module.") == entry and value.dim()),
            None,
        )
        for state in (objective.backbone.state_dict(), weights)
    )
    if there is not None and here != there:
        raise InputError(
            f"checkpoint {path}: made for a vocabulary of {there - 1} words, but this annotation gives {here - 1}; "
            "most likely --threshold or --dataset_name differ from its training, or the annotation is another version"
        )
    try:
        load_published_state(objective, weights, owner_of)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"checkpoint {path}: {' '.join(str(error).split())[:400]}") from error
    if name := _not_finite(objective):
        raise InputError(
            f"checkpoint {path}: its tensor {name.removeprefix('backbone.')} holds NaN or infinity; the training that "
            "wrote it diverged, or the file was edited: take an earlier checkpoint"
        )


def _not_finite(objective: Objective) -> str | None:
    """The first parameter or running statistic that is not finite; other buffers, as masks, may hold infinity."""
    statistics = [item for item in objective.named_buffers() if item[0].endswith(("running_mean", "running_var"))]
    for name, value in (*objective.named_parameters(), *statistics):
        # The extremes tell without a copy of the tensor; on the meta device there is nothing to look at.
        if value.numel() and not value.is_meta and not torch.stack(value.detach().aminmax()).isfinite().all():
            return name
    return None
