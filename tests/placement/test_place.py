"""Who gets which device: the rules one by one, then what holds for every plan and every refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import PlacementError
from shoal.placement.devices import hypothetical_gpus
from shoal.placement.parse import parse_devices
from shoal.placement.plan import place, place_trainers
from shoal.placement.records import PlacementPlan, PlacementRequest
from shoal.placement.suggest import suggest
from shoal.testing.placement import plan_on


def engines_of(plan: PlacementPlan) -> list[list[str]]:
    return [[device.label for device in engine.devices] for engine in plan.engines]


def refusal_of(num_gpus: int, **changes: object) -> str:
    with pytest.raises(PlacementError) as refusal:
        plan_on(num_gpus, **changes)
    return str(refusal.value)


def test_auto_gives_engines_every_gpu_that_the_trainer_leaves() -> None:
    plan = plan_on(8, num_trainer_processes=2, tensor_parallel_size=2)
    assert [device.label for device in plan.trainers] == ["cuda:0", "cuda:1"]
    assert engines_of(plan) == [["cuda:2", "cuda:3"], ["cuda:4", "cuda:5"], ["cuda:6", "cuda:7"]]
    assert plan.warnings == ()


def test_with_nothing_left_engines_share_the_trainers_gpus_and_a_warning_says_so() -> None:
    plan = plan_on(2, num_trainer_processes=2)
    assert engines_of(plan) == [["cuda:0"], ["cuda:1"]]
    assert all(engine.colocated for engine in plan.engines)
    assert "Launch 1 trainer process " in plan.warnings[0]


def test_a_single_gpu_is_shared_and_the_warning_names_the_memory_setting() -> None:
    plan = plan_on(1)
    assert plan.engines[0].colocated
    assert "vllm_gpu_memory_utilization" in plan.warnings[0]


def test_colocation_that_was_asked_for_is_not_warned_about() -> None:
    plan = plan_on(2, num_trainer_processes=2, vllm_devices="colocate")
    assert [engine.colocated for engine in plan.engines] == [True, True]
    assert plan.warnings == ()


def test_an_explicit_list_is_obeyed_in_its_order() -> None:
    assert engines_of(plan_on(8, vllm_devices="cuda:7,4-6", tensor_parallel_size=2)) == [
        ["cuda:7", "cuda:4"],
        ["cuda:5", "cuda:6"],
    ]


def test_an_explicit_list_that_overlaps_the_trainer_is_warned_about_with_what_to_set() -> None:
    plan = plan_on(4, vllm_devices="0,3")
    assert [engine.colocated for engine in plan.engines] == [True, False]
    assert 'Set vllm_devices="auto"' in plan.warnings[0]
    assert "cuda:1, cuda:2 will be idle" in plan.warnings[1]


def test_fewer_engines_than_fit_leave_gpus_idle_with_a_warning() -> None:
    plan = plan_on(4, num_engines=1)
    assert [device.label for device in plan.idle] == ["cuda:2", "cuda:3"]
    assert "leave vllm_num_engines unset" in plan.warnings[0]


def test_two_engines_on_two_cores_get_one_core_each() -> None:
    plan = plan_on(0)
    assert [engine.cpu_cores for engine in plan.engines] == [(0,), (1,)]
    assert plan.warnings == ()


def test_one_core_gets_one_engine() -> None:
    assert [engine.cpu_cores for engine in plan_on(0, cpu_cores=(5,)).engines] == [(5,)]


def test_workers_of_a_cpu_engine_share_its_cores() -> None:
    plan = plan_on(0, tensor_parallel_size=2)
    assert engines_of(plan) == [["cpu", "cpu"], ["cpu", "cpu"]]
    assert [engine.cpu_cores for engine in plan.engines] == [(0,), (1,)]


def test_cores_are_divided_as_evenly_as_they_come_out() -> None:
    plan = plan_on(0, vllm_devices="cpu:3", cpu_cores=(2, 3, 5, 7, 11))
    assert [engine.cpu_cores for engine in plan.engines] == [(2,), (3, 5), (7, 11)]


def test_more_cpu_engines_than_cores_are_warned_about() -> None:
    assert "Set vllm_num_engines=2" in plan_on(0, num_engines=3).warnings[0]


def test_pipeline_stages_on_cpus_are_warned_about() -> None:
    assert "vllm_pipeline_parallel_size=1" in plan_on(0, pipeline_parallel_size=2).warnings[0]


def test_a_size_that_does_not_divide_lists_the_gpus_and_what_would_fit() -> None:
    assert refusal_of(8, num_trainer_processes=5, tensor_parallel_size=2) == (
        "vllm_tensor_parallel_size=2 cannot split the 3 GPUs left for rollouts (cuda:5, cuda:6, cuda:7): every engine "
        'takes 2, and 3 is not a multiple of that.\nSet vllm_devices="cuda:6,cuda:7", or set '
        "vllm_tensor_parallel_size=1, or set vllm_tensor_parallel_size=3."
    )


def test_a_gpu_that_does_not_exist_is_refused_with_those_that_do() -> None:
    message = refusal_of(2, vllm_devices="cuda:1,cuda:9")
    assert "names cuda:9" in message
    assert "(cuda:0, cuda:1)" in message


def test_gpus_on_a_host_without_are_refused() -> None:
    assert "no GPU" in refusal_of(0, vllm_devices="cuda:0")


def test_heads_that_do_not_divide_are_refused_with_the_sizes_that_do() -> None:
    message = refusal_of(3, tensor_parallel_size=2, num_attention_heads=9)
    assert "only the sizes 1, 3, 9 do" in message
    assert "set vllm_tensor_parallel_size=1" in message.replace("Set", "set")


@pytest.mark.parametrize(("kv_heads", "fits"), [(2, True), (4, True), (8, True), (1, True), (3, False), (6, False)])
def test_fewer_key_value_heads_than_workers_fit_when_they_are_copied_evenly(kv_heads: int, fits: bool) -> None:
    changes = {"tensor_parallel_size": 4, "num_attention_heads": 24, "num_key_value_heads": kv_heads}
    if fits:
        assert len(plan_on(5, **changes).engines) == 1
    else:
        assert f"{kv_heads} key/value heads" in refusal_of(5, **changes)


def test_more_stages_than_layers_are_refused() -> None:
    assert "2 layers" in refusal_of(4, pipeline_parallel_size=3, num_hidden_layers=2)


def test_more_engines_than_fit_are_refused() -> None:
    assert "set vllm_num_engines=3" in refusal_of(4, num_engines=5).replace("Set", "set")


def test_an_explicit_list_and_a_number_of_engines_that_contradict_each_other_are_refused() -> None:
    assert "contradict" in refusal_of(4, vllm_devices="2,3", num_engines=1)
    assert "contradicts" in refusal_of(0, vllm_devices="cpu:2", num_engines=1)


def test_more_trainer_processes_than_gpus_are_refused() -> None:
    assert "3 trainer processes cannot be placed on 2 GPUs" in refusal_of(2, num_trainer_processes=3)


SPECS = st.one_of(
    st.sampled_from(["auto", "auto", "colocate", "cpu", "cpu:1", "cpu:3", "4-7", "gpu1", ""]),
    st.lists(st.integers(0, 9), min_size=1, max_size=6).map(lambda indices: ",".join(map(str, indices))),
)
REQUESTS = st.builds(
    PlacementRequest,
    num_trainer_processes=st.integers(0, 9),
    vllm_devices=SPECS,
    tensor_parallel_size=st.integers(0, 9),
    pipeline_parallel_size=st.sampled_from([0, 1, 1, 1, 2, 3, 5]),
    num_engines=st.one_of(st.none(), st.none(), st.integers(0, 9)),
    num_attention_heads=st.sampled_from([None, 1, 9, 12, 14, 32]),
    num_key_value_heads=st.sampled_from([None, 1, 2, 3, 8]),
    num_hidden_layers=st.sampled_from([None, 1, 2, 30]),
    cpu_cores=st.lists(st.integers(0, 15), min_size=1, max_size=5, unique=True).map(lambda cores: tuple(sorted(cores))),
)


def accepted(num_gpus: int, request: PlacementRequest) -> PlacementPlan | None:
    try:
        return place(hypothetical_gpus(range(num_gpus)), request)
    except PlacementError:
        return None


@settings(max_examples=150)
@given(num_gpus=st.integers(0, 9), request=REQUESTS)
def test_what_holds_for_every_plan(num_gpus: int, request: PlacementRequest) -> None:
    plan = accepted(num_gpus, request)
    if plan is None:
        return
    on_engines = [device for engine in plan.engines for device in engine.devices if device.kind == "cuda"]
    assert plan.engines
    assert len(plan.trainers) == request.num_trainer_processes
    assert all(len(engine.devices) == request.num_workers for engine in plan.engines)
    assert len(set(on_engines)) == len(on_engines), "a GPU serves one engine"
    assert len({engine.name for engine in plan.engines}) == len(plan.engines)
    for engine in plan.engines:
        assert engine.colocated == bool({d for d in engine.devices if d.kind == "cuda"} & set(plan.trainers))
        assert bool(engine.cpu_cores) == (engine.devices[0].kind == "cpu")
    used = {device for device in (*plan.trainers, *on_engines) if device.kind == "cuda"}
    assert used.isdisjoint(plan.idle)
    assert used | set(plan.idle) == set(hypothetical_gpus(range(num_gpus)))
    assert plan == accepted(num_gpus, request), "the same arguments give the same plan"


@given(num_gpus=st.integers(0, 9), request=REQUESTS)
def test_cores_go_to_one_engine_each_and_all_are_used_where_there_are_enough(
    num_gpus: int, request: PlacementRequest
) -> None:
    plan = accepted(num_gpus, request)
    if plan is None or not plan.engines[0].cpu_cores:
        return
    given_out = [core for engine in plan.engines for core in engine.cpu_cores]
    if len(plan.engines) <= len(request.cpu_cores):
        assert given_out == list(request.cpu_cores)
        sizes = [len(engine.cpu_cores) for engine in plan.engines]
        assert max(sizes) - min(sizes) <= 1
    else:
        assert set(given_out) == set(request.cpu_cores)


@given(num_gpus=st.integers(1, 9), request=REQUESTS)
def test_auto_never_overlaps_the_trainer_while_something_is_left(num_gpus: int, request: PlacementRequest) -> None:
    plan = accepted(num_gpus, replace(request, vllm_devices="auto"))
    if plan is not None:
        left = num_gpus > request.num_trainer_processes
        assert all(engine.colocated is not left for engine in plan.engines)


@given(num_gpus=st.integers(1, 9), request=REQUESTS)
def test_an_explicit_list_is_used_to_the_last_gpu_and_no_other_is(num_gpus: int, request: PlacementRequest) -> None:
    plan = accepted(num_gpus, request)
    if plan is None or (spec := parse_devices(request.vllm_devices)).kind != "cuda":
        return
    assert tuple(device.index for engine in plan.engines for device in engine.devices) == spec.indices


@settings(max_examples=150)
@given(num_gpus=st.integers(0, 9), request=REQUESTS)
def test_every_refusal_names_a_change_that_is_accepted(num_gpus: int, request: PlacementRequest) -> None:
    devices = hypothetical_gpus(range(num_gpus))
    try:
        place(devices, request)
    except PlacementError as refusal:
        suggestions = suggest(devices, request)
        assert suggestions
        for suggestion in suggestions:
            assert suggestion.text.lower() in str(refusal).lower()
            assert place(devices, suggestion.request).engines


def test_where_engines_are_elsewhere_every_gpu_is_the_trainers() -> None:
    plan = place_trainers(hypothetical_gpus(range(4)), 4)
    assert [device.label for device in plan.trainers] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert (plan.engines, plan.idle, plan.warnings) == ((), (), ())
    plan = place_trainers(hypothetical_gpus(range(4)), 3)
    assert [device.label for device in plan.idle] == ["cuda:3"]
    assert "cuda:3 will be idle: the engines are elsewhere" in plan.warnings[0]
    assert [device.label for device in place_trainers((), 2).trainers] == ["cpu", "cpu"]
    with pytest.raises(PlacementError, match="5 trainer processes cannot be placed on 4 GPUs"):
        place_trainers(hypothetical_gpus(range(4)), 5)
