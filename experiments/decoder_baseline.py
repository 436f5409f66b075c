"""A captioner of torch.nn.TransformerDecoder that shares features and scores with the backbones: what they are held to.

Frozen EfficientNet-Lite0 patches, one linear layer, one decoder layer, AdamW with a cosine, all captions, beam search.

  python experiments/decoder_baseline.py data/flickr8k/annotation.json data/flickr8k/images --out results/baseline
"""

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from modules.data.images import ImageFolder
from modules.data.transforms import eval_transform
from modules.evaluation import score
from modules.layers.visual_extractor import VisualExtractor

WORDS = re.compile(r"[a-z0-9']+")
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
def patches_of(paths, size, grid):
    """(N, S, 1280) float16 of the images at ``paths``, as main_train.py's frozen extractor gives them."""
    extractor = VisualExtractor("tf_efficientnet_lite0", pretrained=True, frozen=True, image_size=size, grid=grid)
    look, images = eval_transform(size, extractor.mean, extractor.std), ImageFolder(paths[0].parent)
    pixels = (torch.stack([look(images(path.name)) for path in paths[at : at + 32]]) for at in range(0, len(paths), 32))
    return torch.cat([extractor(part.unsqueeze(1))[0].half() for part in pixels])


def main():
    """Train, test, write generated.json and scores.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotation", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    numbers = {"image_size": 224, "feature_grid": 4, "length": 20, "threshold": 3, "width": 256, "beam": 3}
    for name, value in (numbers | {"epochs": 5, "batch_size": 64, "seed": 1, "lr": 1e-3}).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="default %(default)s")
    flags = parser.parse_args()
    torch.manual_seed(flags.seed)
    splits = json.loads(flags.annotation.read_text(encoding="utf-8"))
    flags.out.mkdir(parents=True, exist_ok=True)

    def patches(split):
        file = flags.out / f"{split}_{flags.image_size}_{flags.feature_grid}.pt"
        if not file.is_file():
            paths = [flags.images / one["image_path"][0] for one in splits[split]]
            torch.save(patches_of(paths, flags.image_size, flags.feature_grid), file)
        return torch.load(file, weights_only=True, mmap=True)

    pairs = [(at, WORDS.findall(text.lower())) for at, one in enumerate(splits["train"]) for text in one["captions"]]
    counts = Counter(word for _, words in pairs for word in words)
    known = ["<pad>", "<start>", "<end>", "<unk>", *sorted(word for word, n in counts.items() if n >= flags.threshold)]
    ids = {word: at for at, word in enumerate(known)}
    coded = [[START, *(ids.get(word, UNK) for word in words), END][: flags.length] for _, words in pairs]
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(one) for one in coded], batch_first=True)
    images, seen = torch.tensor([at for at, _ in pairs]), patches("train")
    model = Captioner(len(known), flags.width, flags.length)
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
    generated = [" ".join(known[at] for at in model.search(one.float(), flags.beam)) for one in patches("test")]
    scores = score([one["captions"] for one in splits["test"]], generated, cleaner="coco").scores["model"]
    result = {"flags": {name: str(value) for name, value in vars(flags).items()}, "scores": scores}
    result |= {"unique_share": len(set(generated)) / len(generated), "cpu_seconds_per_step": per_step}
    (flags.out / "scores.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "flags"}, indent=1))


if __name__ == "__main__":
    main()
