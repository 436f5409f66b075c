"""A captioner of torch.nn.TransformerDecoder that shares features and scores with the backbones: what they are held to.

Frozen EfficientNet-Lite0 patches, one linear layer, one decoder layer, AdamW with a cosine, all captions, beam search.

  python experiments/decoder_baseline.py data/flickr8k/annotation.json data/flickr8k/images --out results/baseline
  python experiments/decoder_baseline.py data/phantom/annotation.json data/phantom/images --out results/phantom_base \\
      --cleaner iu_xray --image_size 128 --feature_grid 0 --max_seq_length 60 --width 64 --epochs 12 --batch_size 32 \\
      --lr 2e-3 --beam_size 1
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from modules.data.annotations import read_annotation
from modules.data.images import ImageFolder
from modules.data.tokenizers import clean_report
from modules.data.transforms import eval_transform
from modules.evaluation import score
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime.errors import run_entry_point

PAD, START, END, UNK = range(4)


class Captioner(nn.Module):
    """Patches (B, S, 1280) and tokens (B, T) to logits (B, T, V)."""

    def __init__(self, words: int, width: int, length: int):
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(1280, width), nn.LayerNorm(width))
        self.word, self.place = nn.Embedding(words, width), nn.Parameter(torch.randn(length, width) * 0.02)
        nn.init.normal_(self.word.weight, std=width**-0.5)  # 1 when scaled: patches must be heard beside words
        layer = nn.TransformerDecoderLayer(width, 8, 2 * width, 0.1, batch_first=True, norm_first=True)
        self.decoder, self.out = nn.TransformerDecoder(layer, 1, nn.LayerNorm(width)), nn.Linear(width, words)

    def forward(self, patches, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        embedded = self.word(tokens) * math.sqrt(self.place.shape[1]) + self.place[: tokens.shape[1]]
        return self.out(self.decoder(embedded, self.visual(patches), tgt_mask=mask, tgt_is_causal=True))

    @torch.no_grad()
    def search(self, patches, beam):
        """The likeliest sentence of an image (S, 1280) by its log-probability per token."""
        beams, best = [(0.0, [START])], (-math.inf, [])
        for _ in range(len(self.place) - 1):
            tokens = torch.tensor([ids for _, ids in beams])
            found = self(patches.expand(len(beams), -1, -1), tokens)[:, -1].log_softmax(-1)
            found[:, [PAD, START, UNK]] = -math.inf
            total = torch.tensor([value for value, _ in beams])[:, None] + found
            scores, flat = total.flatten().topk(beam)
            beams = []
            for value, index in zip(scores.tolist(), flat.tolist(), strict=True):
                ids = [*tokens[index // found.shape[1]].tolist(), index % found.shape[1]]
                if ids[-1] == END:
                    best = max(best, (value / (len(ids) - 1), ids[1:-1]))
                else:
                    beams.append((value, ids))
            if not beams:
                break
        return best[1] if best[0] > -math.inf else beams[0][1][1:]


def update(model, optimizer, patches, tokens):
    """One step of training; returns the loss."""
    logits = model(patches, tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=PAD)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


@torch.no_grad()
def patches_of(folder, studies, size, grid):
    """(N, S, 1280) float16 of all views of the studies, as main_train.py's frozen extractor gives them."""
    extractor = VisualExtractor("tf_efficientnet_lite0", pretrained=True, frozen=True, image_size=size, grid=grid)
    look, images = eval_transform(size, extractor.mean, extractor.std), ImageFolder(folder)
    views = (torch.stack([look(images(name)) for name in one.image_paths]) for one in studies)
    return torch.stack([extractor(one.unsqueeze(1))[0].flatten(0, 1).half() for one in views])


def main():
    """Train, test, write scores.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotation", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cleaner", default="coco", help="as of main_train.py; default %(default)s")
    numbers = {"image_size": 224, "feature_grid": 4, "max_seq_length": 20, "threshold": 3, "width": 256, "beam_size": 3}
    for name, value in (numbers | {"epochs": 5, "batch_size": 64, "seed": 1, "lr": 1e-3}).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    flags = parser.parse_args()
    torch.manual_seed(flags.seed)
    splits = read_annotation(flags.annotation).splits
    flags.out.mkdir(parents=True, exist_ok=True)

    def patches(split):
        file = flags.out / f"{split}_{flags.image_size}_{flags.feature_grid}.pt"
        if not file.is_file():
            torch.save(patches_of(flags.images, splits[split], flags.image_size, flags.feature_grid), file)
        return torch.load(file, weights_only=True, mmap=True)

    train, test = ([one.captions or (one.report,) for one in splits[name]] for name in ("train", "test"))
    pairs = [(at, clean_report(text, flags.cleaner).split()) for at, texts in enumerate(train) for text in texts]
    counts = Counter(word for _, words in pairs for word in words)
    known = ["<pad>", "<start>", "<end>", "<unk>", *sorted(word for word, n in counts.items() if n >= flags.threshold)]
    ids = {word: at for at, word in enumerate(known)}
    coded = [[START, *(ids.get(word, UNK) for word in words), END][: flags.max_seq_length] for _, words in pairs]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in coded], batch_first=True)
    images, seen = torch.tensor([at for at, _ in pairs]), patches("train")
    model = Captioner(len(known), flags.width, flags.max_seq_length)
    optimizer = torch.optim.AdamW(model.parameters(), flags.lr)
    steps = flags.epochs * math.ceil(len(pairs) / flags.batch_size)
    schedule, began = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps), time.process_time()
    for epoch in range(flags.epochs):
        for rows in torch.randperm(len(pairs)).split(flags.batch_size):
            loss = update(model, optimizer, seen[images[rows]].float(), tokens[rows])
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}", flush=True)
    per_step = (time.process_time() - began) / steps
    model.eval()
    generated = [" ".join(known[at] for at in model.search(one.float(), flags.beam_size)) for one in patches("test")]
    if flags.cleaner == "coco":
        scored = score(test, generated, cleaner="coco")
    else:  # reports are one for a study, and cut as in training
        reports, seen_reports = ([text for (text,) in part] for part in (test, train))
        cut = {"max_seq_length": flags.max_seq_length, "threshold": flags.threshold}
        scored = score(reports, generated, cleaner=flags.cleaner, training=seen_reports, **cut)
    result = {"flags": {name: str(value) for name, value in vars(flags).items()}, "scores": scored.scores["model"]}
    result |= {"unique_share": len(set(generated)) / len(generated), "cpu_seconds_per_step": per_step}
    (flags.out / "scores.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "flags"}, indent=1))


if __name__ == "__main__":
    run_entry_point(main)
