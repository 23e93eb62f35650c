"""The table of losses: `loss_type` to what it does. A new loss is a file here and a line in the table."""

from __future__ import annotations

from shoal.algorithm.losses.dapo import DAPO
from shoal.algorithm.losses.grpo import GRPO
from shoal.algorithm.losses.records import ImportanceSamplingLevel, Loss, LossSettings, TokenLoss

LOSSES: dict[str, Loss] = {"grpo": GRPO, "dapo": DAPO}

__all__ = ["LOSSES", "ImportanceSamplingLevel", "Loss", "LossSettings", "TokenLoss"]
