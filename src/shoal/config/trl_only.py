"""Settings of TRL 1.16 that Shoal does not have: accepted at TRL's default, refused otherwise.

They are declared so that a script written for TRL runs as it is, and so that a setting which would be ignored is an
error that says why. The help text of each field is that reason.
"""

# ruff: noqa: RUF009 -- `setting` makes a dataclass field, it is not a shared mutable default.

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from shoal.config.setting import setting
from shoal.errors import ConfigError

_ONE_DISTRIBUTION = (
    "The trainer computes logprobs under temperature, top_k, top_p and min_p; with another filter or penalty the "
    "engine's would refer to another distribution, so every ratio would be wrong."
)
_OTHER_LOSS = "It belongs to a loss_type that Shoal does not have yet."
_NO_ENTROPY = "Entropy terms are not part of Shoal's losses yet."
_NO_REF_SYNC = "The reference model stays fixed."
_NO_TRANSFORMERS = "Completions are always written by vLLM engines."
_LATER = "Not supported yet."

# Values that ask for the same as the default.
_EQUIVALENT: dict[str, tuple[object, ...]] = {
    "generation_kwargs": ({},),
    "pad_to_multiple_of": (None,),
    "router_aux_loss_coef": (0, 0.0),
}


@dataclass
class TrlOnlyFields:
    """Fields with TRL's names and defaults, which must be left at them."""

    router_aux_loss_coef: float | None = setting(None, "The auxiliary loss of MoE models is not added yet.")
    cast_lm_head_to_fp32: bool = setting(False, "Logprobs are computed in float32 from the logits as they are.")
    ds3_gather_for_generation: bool = setting(True, "Weights always go to the engines whole.")
    pad_to_multiple_of: int | str | None = setting("auto", "Sequences are packed and never padded.")
    repetition_penalty: float = setting(1.0, _ONE_DISTRIBUTION)
    generation_kwargs: dict[str, Any] | str | None = setting(None, _ONE_DISTRIBUTION)
    cache_implementation: str | None = setting(None, _NO_TRANSFORMERS)
    use_transformers_continuous_batching: bool = setting(False, _NO_TRANSFORMERS)
    transformers_continuous_batching_config: dict[str, Any] | str | None = setting(None, _NO_TRANSFORMERS)
    use_transformers_paged: bool = setting(False, _NO_TRANSFORMERS)
    vllm_structured_outputs_regex: str | None = setting(None, _ONE_DISTRIBUTION)
    vllm_server_timeout: float = setting(240.0, "Use vllm_startup_timeout_s, for engines that others start too.")
    vllm_group_port: int = setting(51216, "The port for weights is a free one.")
    sapo_temperature_neg: float = setting(1.05, _OTHER_LOSS)
    sapo_temperature_pos: float = setting(1.0, _OTHER_LOSS)
    vespo_k_pos: float = setting(2.0, _OTHER_LOSS)
    vespo_lambda_pos: float = setting(3.0, _OTHER_LOSS)
    vespo_k_neg: float = setting(3.0, _OTHER_LOSS)
    vespo_lambda_neg: float = setting(2.0, _OTHER_LOSS)
    sync_ref_model: bool = setting(False, _NO_REF_SYNC)
    ref_model_mixup_alpha: float = setting(0.6, _NO_REF_SYNC)
    ref_model_sync_steps: int = setting(512, _NO_REF_SYNC)
    top_entropy_quantile: float = setting(1.0, _NO_ENTROPY)
    entropy_coef: float = setting(0.0, _NO_ENTROPY)
    use_adaptive_entropy: bool = setting(False, _NO_ENTROPY)
    entropy_coef_min: float = setting(0.0, _NO_ENTROPY)
    entropy_coef_max: float = setting(1.0, _NO_ENTROPY)
    entropy_coef_delta: float = setting(0.005, _NO_ENTROPY)
    entropy_target: float = setting(0.2, _NO_ENTROPY)
    max_tool_calling_iterations: int | None = setting(None, "Tools are not supported yet.")
    off_policy_mask_threshold: float | None = setting(None, _LATER)
    log_multimodal: bool = setting(True, "Prompts are text only.")
    log_unique_prompts: bool = setting(False, _LATER)
    log_completions_hub_repo: str | None = setting(None, "Completions are written to output_dir only.")
    vllm_importance_sampling_cap: float | None = setting(None, "Use vllm_importance_sampling_clip_max.")


def refuse_trl_only(config: TrlOnlyFields) -> None:
    """Refuse a TRL setting that would be ignored.

    Raises:
        ConfigError: One of them is not at its default.
    """
    for declared in fields(TrlOnlyFields):
        value = getattr(config, declared.name)
        if value != declared.default and value not in _EQUIVALENT.get(declared.name, ()):
            raise ConfigError(
                f"{declared.name}={value!r} is a setting of TRL that Shoal does not support. "
                f"{declared.metadata['help']} Remove it, or leave it at {declared.default!r}."
            )
