"""Small copies: on a CPU they are copies and nothing else."""

import torch

from modules.runtime.transfers import Download, upload


def test_what_was_sent_does_not_change_any_more():
    flags = torch.tensor([True, False])
    sent = Download(flags)
    flags.fill_(True)
    assert sent.value().tolist() == [True, False]


def test_uploading_to_the_cpu_is_the_tensor_itself():
    rows = torch.arange(3)
    assert upload(rows, torch.device("cpu")) is rows
