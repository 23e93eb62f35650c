"""The settings of a run, checked before anything starts."""

from shoal.config.grpo_config import GRPOConfig

__all__ = ["GRPOConfig"]
