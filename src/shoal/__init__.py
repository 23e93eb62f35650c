"""Shoal: GRPO training while many vLLM engines write the completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.config import GRPOConfig as GRPOConfig
    from shoal.trainer.grpo_trainer import GRPOTrainer as GRPOTrainer

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: vLLM's workers import `shoal.vllm_plugin`, and must not load the trainer with it.
    if name == "GRPOConfig":
        from shoal.config import GRPOConfig

        return GRPOConfig
    if name == "GRPOTrainer":
        from shoal.trainer.grpo_trainer import GRPOTrainer

        return GRPOTrainer
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
