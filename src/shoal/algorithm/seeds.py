"""Derive the seed of each sample from where it stands in the run."""

from __future__ import annotations

import hashlib
import struct


def sample_seed(run_seed: int, step: int, row: int, sample: int) -> int:
    """Hash where a sample stands in the run into its seed, in `[0, 2**31)`.

    The hash is a fixed function of the four numbers (unlike `hash`, which differs between processes), so a resumed run,
    and a sample that is issued again on another engine, use the seed of the first time.

    Args:
        run_seed: The run's seed.
        step: The generation step, from 0.
        row: The prompt's row in the dataset; a step has each row at most once.
        sample: Which of the prompt's completions, from 0.
    """
    digest = hashlib.blake2b(struct.pack("<4q", run_seed, step, row, sample), digest_size=8).digest()
    # 31 bits: vLLM takes 64, but NumPy's legacy generator and some samplers take no more than a positive int32.
    return int.from_bytes(digest, "little") % 2**31
