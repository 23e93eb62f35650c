"""What a vLLM server says of itself."""

from __future__ import annotations

import pytest

from shoal.engines.vllm_metrics import parse_metrics
from shoal.types import EngineReport

PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="policy"} 3.0
vllm:num_requests_waiting{engine="0",model_name="policy"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="policy",reason="capacity"} 77.0
vllm:kv_cache_usage_perc{engine="0",model_name="policy"} 0.25
vllm:num_preemptions_total{engine="0",model_name="policy"} 4.0
vllm:num_preemptions_created{engine="0",model_name="policy"} 1.7e+09
vllm:prompt_tokens_total{engine="0",model_name="policy"} 100.0
vllm:prompt_tokens_created{engine="0",model_name="policy"} 1.7e+09
vllm:generation_tokens_total{engine="0",model_name="policy"} 1.5e+03
vllm:request_generation_tokens_bucket{engine="0",le="1.0",model_name="policy"} 9.0
"""


def test_the_page_of_one_engine() -> None:
    assert parse_metrics(PAGE) == EngineReport(running=3, waiting=2, kv_usage=0.25, num_preemptions=4, num_tokens=1600)


def test_data_parallel_engines_of_one_server_count_together() -> None:
    both = PAGE + PAGE.replace('engine="0"', 'engine="1"').replace("0.25", "0.75")
    assert parse_metrics(both) == EngineReport(running=6, waiting=4, kv_usage=0.5, num_preemptions=8, num_tokens=3200)


def test_a_server_that_does_not_count_its_tokens_has_none_to_compare() -> None:
    page = "vllm:num_requests_running 1.0\nvllm:num_requests_waiting 0.0\n"
    assert parse_metrics(page) == EngineReport(running=1, waiting=0, num_tokens=None)


@pytest.mark.parametrize(
    "page",
    ["", "{}", "<html>a proxy</html>", "vllm:num_requests_running 1.0", PAGE.replace("3.0", "many"), "\x00\xff" * 50]
    + [PAGE.replace("3.0", value) for value in ("NaN", "+Inf", "-Inf")],
)
def test_something_else_is_nothing(page: str) -> None:
    assert parse_metrics(page) is None
