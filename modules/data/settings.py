"""The settings of the data: where they lie and how they are read. Torch-free, as --help reads them."""

from dataclasses import dataclass

from modules.data.dataset_specs import CLEANER_NAMES, CONTEXTS, DATASETS, SECTIONS
from modules.runtime.cores import AUTO
from modules.runtime.settings import setting


@dataclass(frozen=True)
class DataSettings:
    """Where the data lies and how it is read."""

    image_dir: str = setting(
        "data/iu_xray/images/", "data", "folder that the image paths of the annotation start from", effect=False
    )
    detection_features: str = setting(
        "",
        "data",
        "HDF5 file of region features, <image id>_features (n, width) each, "
        "which the backbone is given instead of images",
        exported=True,
    )
    max_detections: int = setting(
        50, "data", "regions of an image that are read from --detection_features", low=1, high=10_000, exported=True
    )
    shards: str = setting(
        "",
        "data",
        "images in tar shards made by scripts/make_shards.py, instead of --image_dir: their "
        "folder, or an address that fsspec reads (https://, s3://)",
        remote=True,
    )
    follow_links: bool = setting(False, "data", "follow links below --image_dir that lead out of it", effect=False)
    ann_path: str = setting("data/iu_xray/annotation.json", "data", "annotation.json in R2Gen's schema", effect=False)
    dataset_name: str = setting(
        "iu_xray",
        "data",
        f"{', '.join(DATASETS)} (modules/data/dataset_specs.py), or the name in the dataset.json beside --ann_path, "
        "which is then the default; names records and pages, decides what the next flags leave open",
        exported=True,
    )
    language: str = setting(
        "en", "data", "language of the reports; clinical labels are made for en alone", exported=True
    )
    cleaner: str = setting(
        "",
        "data",
        "rules of report cleaning; any: for every language; default: the data set's",
        choices=("", *CLEANER_NAMES),
        exported=True,
        vocabulary=True,
    )
    max_views: int = setting(
        0,
        "data",
        "images of a study that are read with --views paired, frontal ones first where the annotation names views; 0: "
        "as many as the data set says, in the annotation's order",
        low=0,
        high=64,
        exported=True,
    )
    captions: bool | None = setting(
        None,
        "data",
        "every caption of an image is a training sample, all of them are references; default: as the data set says",
        exported=True,
    )
    data_licence: str = setting(
        "", "data", "licence of the data, for the cards of exported models", effect=False, exported=True
    )
    views: str = setting(
        "paired",
        "data",
        "paired: a study's views together (R2GenCMN); separate: each image is a "
        "sample with the study's report (the ITHN paper)",
        choices=("paired", "separate"),
        exported=True,
    )
    report_sections: str = setting(
        "",
        "data",
        "sections of the annotation that are the report; both: each after its name; default: the field report",
        choices=("", *SECTIONS, "both"),
        exported=True,
    )
    context: str = setting(
        "",
        "data",
        f"what the model is given beside the images, separated by commas: {', '.join(CONTEXTS)} (docs/TRAINING.md)",
        exported=True,
        shapes=True,
    )
    threshold: int = setting(
        3, "data", "a token enters the vocabulary from this training count on", low=1, exported=True, vocabulary=True
    )
    num_workers: int = setting(
        2,
        "data",
        "processes that read images; auto: one for each core of this process, 16 at most",
        low=0,
        high=1024,
        effect=False,
        auto=AUTO,
    )
    worker_timeout: float = setting(
        50.0,
        "data",
        "seconds without an answer after which the processes that read images count as hung; 0: never",
        low=0.0,
        effect=False,
    )
    batch_size: int = setting(16, "data", "samples per step, of each process", low=1, high=2**16)
    eval_batch_size: int = setting(
        0,
        "data",
        "studies of each process whose reports are written together, in validation and main_test.py; 0: --batch_size",
        low=0,
        high=2**16,
        effect=False,
    )
    drop_last: bool = setting(
        False, "data", "leave out an epoch's last, incomplete training batch, as XProNet does", train_only=True
    )
    image_size: int = setting(224, "data", "side of the network's input in pixels", low=32, high=2048, exported=True)
    flip: bool = setting(
        True, "data", "random horizontal flip in training, as in R2GenCMN; mirrors left and right", train_only=True
    )
    jpeg_draft: bool = setting(
        False,
        "data",
        "decode JPEG files at the smallest of 1/2, 1/4 and 1/8 of their size that is not below the resized image's: "
        "faster, with slightly other pixels; kept in the checkpoint",
        exported=True,
    )
    image_cache: str = setting(
        "",
        "data",
        "folder for the images as resized bytes, made once, in one file per split that "
        "only its owner can read; saves decoding them in every epoch",
        effect=False,
    )
    length_bucketing: bool = setting(
        False,
        "data",
        "training batches of reports of similar length: less padding, but the "
        "contrastive loss then compares reports of similar length",
        train_only=True,
    )
    on_bad_image: str = setting(
        "stop",
        "data",
        "what an unreadable image does: stop the run, or be replaced by another sample (the run stops above 1 %%)",
        choices=("stop", "skip"),
    )

    def mining_flags(self) -> dict[str, str]:
        """The flags with which scripts/mine_hard_negatives.py reads the training samples that a run reads."""
        flags = {"dataset_name": self.dataset_name, "report_sections": self.report_sections}
        if self.captions is not None:
            flags["captions"] = str(self.captions).lower()
        return flags | ({"cleaner": self.cleaner} if self.cleaner else {})
