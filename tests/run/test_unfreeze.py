"""--unfreeze in a run: the frozen stages stay as they were, also after a resumption."""

import pytest
import torch

from modules.flags import parse_flags
from modules.run.training import run_training
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint


def test_a_resumed_run_goes_on_with_the_same_part(train):
    folder = train("--unfreeze", "last:1", "--ithn", "off", "--lr_ve", 1e-2)
    before = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    argv = ["--save_dir", str(folder), "--resume", "auto", "--epochs", "2"]
    with pytest.raises(InputError, match="--unfreeze norm: the run of --resume .* began with last:1"):
        run_training(*parse_flags([*argv, "--unfreeze", "norm"], "main_train.py", ""))
    run_training(*parse_flags(argv, "main_train.py", ""))
    after = load_checkpoint(folder / "current_checkpoint.pth")["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name]) and "visual_extractor" in name}
    assert changed and all(name.startswith("visual_extractor.model.7.") for name in changed)
