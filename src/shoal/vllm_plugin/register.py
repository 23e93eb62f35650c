"""Entry point of group `vllm.general_plugins`: vLLM calls it in every process it starts, sometimes more than once."""

from shoal import vllm_compat

BACKEND = "shoal"


def register() -> None:
    """Make `--weight-transfer-config '{"backend": "shoal"}'` known to this process."""
    vllm_compat.register_weight_transfer(BACKEND, "shoal.vllm_plugin.receiver", "ShoalWeightReceiver")
