"""Micro-batches on their way to a GPU that is busy.

Run on a machine with NVIDIA GPUs: `pytest tests/gpu`.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from shoal.data.micro_batch import build_micro_batch
from shoal.trainer.step import to_device
from shoal.types import Sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]


def test_a_micro_batch_is_sent_without_waiting_for_what_the_gpu_does() -> None:
    sequence = Sequence(
        token_ids=np.arange(100_000),
        prompt_length=10,
        advantage=0.5,
        rollout_logprobs=np.zeros(99_990, np.float32),
        in_loss=True,
    )
    micro_batch = build_micro_batch([sequence], [0.25])
    device = torch.device("cuda:0")
    to_device(micro_batch, device)  # pins memory for the first time
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # cycles: about 2 s
    before = torch.cuda.Event()
    before.record()
    moved = to_device(micro_batch, device)
    assert not before.query()
    torch.cuda.synchronize()
    assert before.query()  # the control
    for field in fields(micro_batch):
        if isinstance(value := getattr(micro_batch, field.name), torch.Tensor):
            assert torch.equal(getattr(moved, field.name).cpu(), value)
