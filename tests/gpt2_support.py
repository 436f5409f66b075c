"""A GPT-2 of the smallest size, saved as transformers saves it, with byte pairs learned from a few reports."""

from pathlib import Path

import torch

REPORTS = (
    "the heart is normal . the lungs are clear .",
    "heart size is enlarged . no pleural effusion .",
    "there is a small left pleural effusion . the heart is normal .",
)
SIZES = {"d_model": 16, "num_heads": 2, "gpt2_layers": 2, "gpt2_positions": 48}
SIZE_FLAGS = [part for name, value in SIZES.items() for part in (f"--{name}", str(value))]
SPECIAL = ["<|endoftext|>", "<?", "+="]


def save_bpe(folder: Path, special: list[str] = SPECIAL, size: int = 300) -> None:
    """vocab.json and merges.txt; the special tokens stand last, as GPT-2's end does, so that id 0 is a letter."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        REPORTS,
        trainers.BpeTrainer(
            vocab_size=size - len(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(special)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def save_gpt2(folder: Path, num_ids: int, *, safe: bool = True) -> None:
    """config.json and weights, as safetensors or as pytorch_model.bin."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = GPT2Model(
        GPT2Config(
            vocab_size=num_ids,
            n_embd=SIZES["d_model"],
            n_head=SIZES["num_heads"],
            n_layer=SIZES["gpt2_layers"],
            n_positions=SIZES["gpt2_positions"],
        )
    )
    model.save_pretrained(folder)
    if not safe:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
