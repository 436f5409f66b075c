"""A run's checkpoints and its training records: the real features that inspect_negatives.py looks among."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modules.data.datasets import ReportDataset
from modules.flags import resolve_config
from modules.ithn.losses import normalise
from modules.ithn.synthesis import SYNTHESISED
from modules.labels.labeler import label_reports
from modules.mining.index import HardNegativeIndex
from modules.run.build import build_objective, load_weights, prepare_device
from modules.run.data import build_dataset, build_split_loader, cache_features, check_images, read_data
from modules.run.resuming import own_settings
from modules.run.vocabulary import tokenizer_from_state
from modules.runtime.environment import file_sha256
from modules.runtime.errors import InputError
from modules.runtime.run_log import Bar
from modules.training.checkpoint import FORMAT, load_checkpoint
from scripts.research.negative_positions import Bank, harder_negatives, moves, positions, similarities, spread
from scripts.research.negative_readings import Reading, agreement, changed, read

# Settings that the checkpoints of one run have in common.
COMMON = ("model_name", "dataset_name", "views", "seed", "ithn_variant", "alpha", "embedding_dim")
# Of a run's settings those that a look at it must not follow.
UNUSED = {
    "on_bad_image": "stop",
    "image_cache": "",
    "precision": "float32",
    "previous_epoch_start": False,
    "resume": "",
    "load": "",
}


class Inspection:
    """The model and the records; ``look`` measures one checkpoint of ``paths``, which are in the order of their epochs.

    ``given`` are flags above the checkpoints' own, ``samples`` how many training records are looked at. InputError
    for checkpoints of several runs, without a joint embedding or without hard negatives.
    """

    def __init__(self, paths: Sequence[str], given: Mapping[str, Any], samples: int | None):
        self.paths = in_order_of_epochs(paths)
        content = load_checkpoint(self.paths[0])
        settings = own_settings(content, self.paths[0])
        config = resolve_config(given, settings | UNUSED)
        if config.on_encoder:
            raise InputError(
                f"--load {self.paths[0]}: trained with --contrastive_features encoder, where no negative "
                "is synthesised; give checkpoints trained with ITHN"
            )
        if not config.negative_index:
            raise InputError(
                f"--load {self.paths[0]}: trained without an index of hard negatives (strategy "
                f"{content['strategy']}); give --negative_index FILE, which "
                "scripts/mine_hard_negatives.py makes"
            )
        if samples and config.shards:
            raise InputError("--samples: --shards are read as a whole; give --shards '' and --image_dir")
        self.clamp_segment = config.clamp_segment
        # Strategies have the same two projections: which of them the run was trained with makes no difference here.
        config = replace(config, ithn="on", strategy="prior", clamp_segment=False)
        self.device = prepare_device(config)
        data = read_data(config, tokenizer=tokenizer_from_state(content["vocabulary"]))
        check_images(config, data, ("train",))
        self.objective = build_objective(config, data, self.device, pretrained=False).eval()
        extractor = self.objective.backbone.visual_extractor
        load_weights(self.objective, content["state_dict"], self.paths[0])
        cache_features(config, data, extractor, self.device)
        rows, neighbours = choose_records(data.index, samples, config.seed)
        studies = [data.annotation.splits["train"][row] for row in rows]
        self.dataset = build_dataset(config, data, "train", augment=False, extractor=extractor, studies=studies)
        self.loader = build_split_loader(config, self.dataset, self.device, shuffle=False)
        self.anchor, self.negative = sample_pairs(self.dataset, neighbours)
        self.labels = self._labels() if config.dataset.clinical else None
        synthetic = " (synthetic data)" if data.annotation.synthetic else ""
        self.name = f"{config.model_name} on {config.dataset_name}{synthetic}, trained with {content['strategy']}"
        self.described = {
            "strategy": content["strategy"],
            "variant": config.ithn_variant,
            "alpha": config.alpha,
            "clamp_segment": self.clamp_segment,
            "bank": len(self.dataset),
            "anchors": len(self.anchor),
            "samples": samples,
            "seed": config.seed,
            "synthetic": data.annotation.synthetic,
            "annotation_sha256": data.annotation.sha256,
            "vocabulary_sha256": data.tokenizer.sha256,
            "negative_index_sha256": file_sha256(config.negative_index),
        }
        self.notes = [
            f"the bank holds {len(self.dataset)} training samples; ũ is made for {len(self.anchor)} of them",
            "u⁻ is the nearest neighbour's report with its own image: a row of the bank",
            "in evaluation mode, without augmentation; ũ starts from u⁻ and is renormalised",
        ]

    def look(self, path: str, grid: Sequence[float]) -> dict:
        """All numbers of the checkpoint ``path``, at its own hardness and at those of ``grid``."""
        content = load_checkpoint(path)
        load_weights(self.objective, content["state_dict"], path)
        epoch = content["epoch"]
        hardness = self.objective.hardness(epoch)
        with contextlib.closing(self.loader):
            bank, hidden, mean = self._embed(f"features of epoch {epoch}")
        states = [hidden[row] for row in self.negative.tolist()]
        unmoved = read(self.objective.backbone.log_probs, states, device=self.device)
        wanted = [(True, hardness), *((False, value) for value in grid)]
        synthesised = [
            {"strategy": strategy, "hardness": value, "own_hardness": own}
            | self._synthesise(bank, mean, states, unmoved, strategy, value)
            for own, value, strategy in Bar(
                [(*which, strategy) for which in wanted for strategy in SYNTHESISED], f"negatives of epoch {epoch}"
            )
        ]
        return {
            "epoch": epoch,
            "hardness": hardness,
            **similarities(bank),
            "reading_of_negative": self._judge(unmoved),
            "synthesised": synthesised,
        }

    def _synthesise(
        self, bank: Bank, mean: Tensor, states: Sequence[Tensor], unmoved: Reading, strategy: str, hardness: float
    ) -> dict:
        """Where one strategy's u~ lie, and what is read from the hidden states of u- moved there."""
        harder = harder_negatives(bank, strategy, hardness, clamp_segment=self.clamp_segment)
        weight = self.objective.text_projection.linear1.weight.detach().double().cpu()
        own_mean = mean[bank.negative]
        shift = moves(harder - bank.report[bank.negative], own_mean, weight)
        moved = read(self.objective.backbone.log_probs, states, shift, device=self.device)
        length = torch.stack([torch.linalg.vector_norm(report, dim=1).mean() for report in states])
        reached = (normalise((own_mean + shift) @ weight.T) * harder).sum(1)
        return {
            **positions(bank, harder),
            "decoder": {
                "words_changed": changed(unmoved, moved),
                **self._judge(moved),
                "reached": spread(reached),
                "move": spread(torch.linalg.vector_norm(shift, dim=1) / length),
            },
        }

    @torch.no_grad()
    def _embed(self, description: str) -> tuple[Bank, dict[int, Tensor], Tensor]:
        """The bank, the hidden states (T, D) of its rows that are somebody's u-, and the means (M, D) behind all u."""
        wanted = set(self.negative.tolist())
        order, images, reports, means, hidden = [], [], [], [], {}
        for batch in Bar(self.loader, description):
            batch = batch.to(self.device)
            found = self.objective.embed(batch.positive)
            for row, index in enumerate(batch.sample_index.tolist()):
                if index in wanted:
                    hidden[index] = found.hidden[row][batch.positive.token_mask[row, 1:]].cpu()
            for kept, values in (
                (order, batch.sample_index),
                (images, found.image),
                (reports, found.report),
                (means, found.mean),
            ):
                kept.append(values.cpu())
        rows = torch.cat(order).argsort()
        z, u, mean = (torch.cat(parts)[rows].double() for parts in (images, reports, means))
        key = torch.tensor([self.dataset.report_keys[row] for row, _ in self.dataset.samples])
        return Bank(normalise(z), normalise(u), key, self.anchor, self.negative), hidden, mean

    def _labels(self) -> dict[str, np.ndarray]:
        """Rule-based labels (N, 14) of the reports of u and u-, as the decoder is taught them: cleaned and cut."""
        tokenizer, last = self.dataset.tokenizer, self.dataset.max_seq_length
        labels = label_reports(
            [tokenizer.decode(tokenizer.encode(study.report)[1:last]) for study in self.dataset.studies]
        )
        record = np.array([row for row, _ in self.dataset.samples])
        return {"u": labels[record[self.anchor]], "negative": labels[record[self.negative]]}

    def _judge(self, reading: Reading) -> dict[str, float]:
        if self.labels is None:
            return {"probability": reading.probability}
        texts = [self.dataset.tokenizer.decode(words.tolist()) for words in reading.words]
        found: dict[str, float] = {"probability": reading.probability}
        for whose, labels in self.labels.items():
            found[f"f1_{whose}"], found[f"f1_findings_{whose}"] = agreement(labels, texts)
        return found


def in_order_of_epochs(paths: Sequence[str]) -> list[str]:
    """``paths`` sorted by the epochs in the files; InputError unless they are checkpoints of one run with heads."""
    first, epochs = {}, {}
    for path in paths:
        content = load_checkpoint(path)
        if content.get("format") != FORMAT:
            raise InputError(f"--load {path}: no checkpoint of main_train.py: it says neither epoch nor settings")
        settings = own_settings(content, path)
        if not any(name.startswith("img_projection.") for name in content["state_dict"]):
            raise InputError(
                f"--load {path}: trained with --ithn off, so it has no joint embedding of images and "
                "reports, and nothing to look at here"
            )
        common = {name: settings.get(name) for name in COMMON} | {"vocabulary": content.get("vocabulary_sha256")}
        first = first or common
        for name in common:
            if common[name] != first[name]:
                raise InputError(
                    f"--load {path}: its {name} is {common[name]}, that of {paths[0]} is {first[name]}; "
                    "give checkpoints of one run"
                )
        if content["epoch"] in epochs:
            raise InputError(
                f"--load {path}: of epoch {content['epoch']}, as {epochs[content['epoch']]} is; give one of them"
            )
        epochs[content["epoch"]] = path
    return [epochs[epoch] for epoch in sorted(epochs)]


def choose_records(index: HardNegativeIndex, samples: int | None, seed: int) -> tuple[list[int], np.ndarray]:
    """Training records of the bank, ascending, and for each where in that list its negative is, -1 for none.

    ``samples`` records are drawn; the negatives of these join them, without a negative of their own.
    """
    nearest = index.neighbours[:, 0] if index.neighbours.shape[1] else np.full(len(index.neighbours), -1)
    drawn = np.arange(len(nearest))
    if samples is not None:
        drawn = np.random.default_rng(seed).permutation(len(nearest))[:samples]
    rows = np.union1d(drawn, nearest[drawn][nearest[drawn] >= 0])
    negatives = np.full(len(rows), -1)
    known = np.isin(rows, drawn) & (nearest[rows] >= 0)
    negatives[known] = np.searchsorted(rows, nearest[rows[known]])
    return rows.tolist(), negatives


def sample_pairs(dataset: ReportDataset, negatives: np.ndarray) -> tuple[Tensor, Tensor]:
    """Samples (N,) with a hard negative, and the samples (N,) that these are: the same view, or else the first.

    ``negatives`` are rows of the data set's studies, -1 for none. InputError where no study has one.
    """
    number = {sample: index for index, sample in enumerate(dataset.samples)}
    pairs = [
        (index, number.get((int(negatives[row]), view), number.get((int(negatives[row]), 0))))
        for (row, view), index in number.items()
        if negatives[row] >= 0
    ]
    if not pairs:
        raise InputError("--negative_index: none of the records looked at has a hard negative")
    anchor, negative = torch.tensor(pairs).unbind(1)
    return anchor, negative
