"""Make XProNet's initial prototypes: k-means over the training set's image and report features, label by label.

A study's feature is the mean over its patches (of all views), concatenated with its report's embedding. The training
studies of each of the 14 classes are clustered separately; as published, half of a class's prototypes come from
mirrored images. Report embeddings are scaled to the root mean square of the image features, which would otherwise
outweigh them.

  python scripts/build_prototypes.py --label_path labels.csv --out data/iu_xray/init_prototypes.safetensors
  python scripts/build_prototypes.py ... --text_encoder tfidf            needs no weights of a text encoder

Pass the file to main_train.py as --init_protypes_path; the other flags it needs are printed at the end.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.config import Config
from modules.flags import Parser, add_flags, boolean
from modules.labels.rules import CLASSES
from modules.runtime.errors import InputError, run_entry_point
from modules.runtime.output_files import Output, check_outputs, contains
from modules.runtime.settings import part_of

# Flags with the meaning they have in main_train.py.
SHARED = (
    "ann_path",
    "image_dir",
    "dataset_name",
    "visual_extractor",
    "visual_extractor_pretrained",
    "visual_extractor_weights",
    "image_size",
    "batch_size",
    "num_workers",
    "seed",
    "device",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from modules.mining.text_encoders import ENCODER_HELP, RADBERT

    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_flags(parser, SHARED, defaults=True)
    add("--label_path", required=True, metavar="FILE", help=Config.__dataclass_fields__["label_path"].metadata["help"])
    add("--label_columns", default="", metavar="ORDER", help="as in main_train.py; a pickle needs it")
    add("--out", required=True, type=Path, metavar="FILE", help="file to write (.safetensors), readable by you alone")
    add("--num_protype", type=int, default=20, metavar="N", help="prototypes of each class; default %(default)s")
    add(
        "--mirrored",
        type=boolean,
        default=True,
        metavar="{true,false}",
        help="half of them from mirrored images; default true, as published",
    )
    add("--text_encoder", default=RADBERT, metavar="NAME", help=f"{ENCODER_HELP}; default %(default)s")
    add("--pooling", default="mean", choices=("mean", "first"), help="of the encoder's tokens; default %(default)s")
    add("--max_length", type=int, default=512, metavar="T", help="tokens read of a report; default %(default)s")
    add(
        "--tfidf_width",
        type=int,
        default=768,
        metavar="W",
        help="singular vectors that tf-idf is reduced to, at most; default %(default)s",
    )
    return parser


def image_features(config: Config, data, device, mirrored: bool) -> list:
    """(N, C) pooled visual features of the training studies; with ``mirrored`` also those of the mirrored images."""
    import numpy as np
    import torch

    from modules.run.build import build_extractor
    from modules.run.data import build_dataset, build_split_loader, check_images
    from modules.runtime.run_log import Bar

    check_images(config, data, ("train",))
    extractor = build_extractor(config, device, pretrained=True).to(device).eval()
    dataset = build_dataset(config, data, "train", augment=False, extractor=extractor)
    loader = build_split_loader(config, dataset, device, shuffle=False)
    sides: list[list] = [[], []] if mirrored else [[]]
    with torch.inference_mode():
        for batch in Bar(loader, "image features"):
            pair = batch.to(device).positive
            for number, side in enumerate(sides):
                images = pair.images.flip(-1) if number else pair.images
                side.append(extractor(images, pair.view_mask)[2].float().cpu().numpy())
    return [np.concatenate(side) for side in sides]


def text_features(arguments: argparse.Namespace, reports: list[str], device: str) -> tuple:
    """(N, W) embeddings of the reports, and the encoder's description."""
    import numpy as np
    from scipy import sparse

    from modules.mining.text_encoders import EncoderOptions, build_text_encoder
    from modules.mining.transformer_encoder import TransformerEncoder

    options = dataclasses.replace(part_of(arguments, EncoderOptions), device=device)
    encoder = build_text_encoder(arguments.text_encoder, options)
    if options.pooling != "mean" and not isinstance(encoder, TransformerEncoder):
        print(f"note: --pooling {options.pooling} has no effect with --text_encoder {arguments.text_encoder}")
    rows = {text: row for row, text in enumerate(dict.fromkeys(reports))}
    vectors = encoder.encode(list(rows), progress=True)
    if sparse.issparse(vectors):
        from sklearn.decomposition import TruncatedSVD

        width = min(arguments.tfidf_width, *vectors.shape)
        vectors = TruncatedSVD(width, random_state=arguments.seed).fit_transform(vectors)
    return np.asarray(vectors, np.float32)[[rows[text] for text in reports]], encoder.describe()


def check(arguments: argparse.Namespace) -> None:
    """InputError for values out of range, and where --out would replace another file than an earlier output."""
    for flag in ("num_protype", "tfidf_width", "max_length"):
        if getattr(arguments, flag) < 1:
            raise InputError(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    if arguments.mirrored and arguments.num_protype < 2:
        raise InputError(f"--num_protype {arguments.num_protype}: one cannot be halved; add --mirrored false")
    names = ("ann_path", "label_path", "visual_extractor_weights", "text_encoder")
    check_outputs(
        [Output("--out", arguments.out, "a prototypes file of this project", contains("ithn-prototypes"))],
        [(f"--{name}", getattr(arguments, name)) for name in names],
    )


def describe(arguments: argparse.Namespace, widths: dict[str, int], too_few: dict[str, tuple[int, int]]) -> None:
    """Print the classes with too few members, and the flags that go with the file."""
    for name, (count, needed) in too_few.items():
        others = "copies with noise" if count else "drawn around the mean of all studies"
        print(f"{name}: {count} different members for {needed} prototypes; the others are {others}")
    flags = {
        "init_protypes_path": arguments.out,
        "num_cluster": len(CLASSES),
        "num_protype": arguments.num_protype,
        **widths,
    }
    print(f"wrote {arguments.out}; train with " + " ".join(f"--{name} {value}" for name, value in flags.items()))


def main() -> None:
    """Read, embed, cluster, write, report."""
    arguments = build_parser().parse_args()
    check(arguments)
    config = Config(**{name: getattr(arguments, name) for name in SHARED}, ithn="off")

    import torch

    from modules.data.prototype_files import save_prototypes
    from modules.labels.study_labels import NO_FINDING, read_labels
    from modules.prepare.prototype_clusters import make_prototypes
    from modules.run.build import prepare_device
    from modules.run.data import read_data
    from modules.runtime.environment import provenance

    device = prepare_device(config)
    data = read_data(config)
    studies = data.annotation.splits["train"]
    table = read_labels(arguments.label_path, columns=arguments.label_columns)
    labels = table.of(studies)
    labels[labels.sum(axis=1) == 0, CLASSES.index(NO_FINDING)] = 1
    texts, encoder = text_features(arguments, [" ".join(study.report.split()) for study in studies], str(device))
    sides = image_features(config, data, device, arguments.mirrored)
    found = make_prototypes(sides, texts, labels, CLASSES, num=arguments.num_protype, seed=arguments.seed)
    widths = {"d_img_ebd": sides[0].shape[1], "d_txt_ebd": texts.shape[1]}
    save_prototypes(
        arguments.out,
        torch.from_numpy(found.prototypes),
        CLASSES,
        {
            "flags": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
            },
            **widths,
            "text_scale": found.text_scale,
            "text_encoder": encoder,
            "too_few": {
                name: {"different_members": count, "needed": num} for name, (count, num) in found.too_few.items()
            },
            "members": dict(zip(CLASSES, map(int, labels.sum(axis=0)), strict=True)),
            "annotation_sha256": data.annotation.sha256,
            "train_sha256": data.annotation.train_sha256,
            "labels_sha256": table.sha256,
            "synthetic": data.annotation.synthetic,
            **provenance(str(device)),
        },
    )
    describe(arguments, widths, found.too_few)


if __name__ == "__main__":
    run_entry_point(main)
