"""Adapters in real vLLM engines: written in place, they are what vLLM's own loading makes of them, bit for bit.

In CI in an engine with two workers; `pytest --all` has it done in one with a single worker too.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from shoal.testing import greedy_texts, tiny_tokenizer
from shoal.wire.plan import SlicePlan

pytestmark = pytest.mark.engine

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_TOKENS = 32
EOS = 2
PROMPTS = (tuple(range(70, 90)), (5,), tuple(3 + (7 * i) % 250 for i in range(60)))


@dataclass(frozen=True)
class Engine:
    """An engine that was started with adapter `folders[0]`, and the trainer's model."""

    llm: Any
    policy: Any
    folders: list[Path]

    def call(self, name: str, *args: object) -> list[Any]:
        return list(self.llm.collective_rpc(name, args=args))

    def load(self, folder: Path) -> None:
        """Have vLLM load an adapter its own way, in place of the one in use."""
        from vllm.lora.request import LoRARequest

        assert self.llm.llm_engine.add_lora(LoRARequest("policy-adapter", 1, str(folder), load_inplace=True))

    def publish(self, folder: Path) -> None:
        self.call("shoal_publish", str(folder))
        self.llm.reset_prefix_cache()

    def text(self) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        answers = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS],
            SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, stop_token_ids=[EOS], ignore_eos=True),
            use_tqdm=False,
            lora_request=LoRARequest("policy-adapter", 1, str(self.folders[0])),
        )
        return [list(answer.outputs[0].token_ids) for answer in answers]


@torch.no_grad()
def randomise(policy: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in policy.named_parameters():
        if "lora_" in name:
            value.copy_(0.15 * torch.randn(value.shape, generator=generator))


def save_adapter(policy: Any, folder: Path) -> None:
    """Save the adapter as the trainer is to send it: B scaled already, and a config that scales no more."""
    folder.mkdir(parents=True)
    config = policy.peft_config["default"]
    scaling = config.lora_alpha / config.r
    tensors = {
        name: (value * scaling if "lora_B" in name else value).detach().contiguous()
        for name, value in get_peft_model_state_dict(policy).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=config.r, lora_alpha=config.r, target_modules=LINEAR).save_pretrained(folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        sizes = [1, 2] if metafunc.config.getoption("--all") else [2]
        metafunc.parametrize("engine", sizes, ids=[f"tp{size}" for size in sizes], indirect=True, scope="module")


@pytest.fixture(scope="module")
def engine(
    request: pytest.FixtureRequest, make_served_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("VLLM_CPU_KVCACHE_SPACE", "1"),
            ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
            ("OMP_NUM_THREADS", "1"),
            ("GLOO_SOCKET_IFNAME", "lo"),
            ("VLLM_HOST_IP", "127.0.0.1"),
            ("VLLM_NO_USAGE_STATS", "1"),
            ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
        ):
            patch.setenv(name, value)
        patch.syspath_prepend(str(Path(__file__).parent))
        environment = dict(os.environ)
        from vllm import LLM

        folder = tmp_path_factory.mktemp("adapters")
        base = make_served_model(seed=5)
        base.save_pretrained(folder / "base")
        tiny_tokenizer().save_pretrained(folder / "base")
        policy = get_peft_model(base, LoraConfig(r=4, lora_alpha=10, target_modules=LINEAR))
        folders = []
        for seed in range(4):
            randomise(policy, seed)
            save_adapter(policy, folder / f"adapter-{seed}")
            folders.append(folder / f"adapter-{seed}")
        llm = LLM(
            model=str(folder / "base"),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            tensor_parallel_size=request.param,
            distributed_executor_backend="mp" if request.param > 1 else None,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=8,
            worker_extension_cls="adapter_worker.AdapterWorker",
        )
        running = Engine(llm=llm, policy=policy, folders=folders)
        running.load(folders[0])
        running.call("shoal_learn", str(folders[1]))
        yield running
        llm.llm_engine.engine_core.shutdown()
        # vLLM leaves variables behind, LOCAL_WORLD_SIZE among them, which other tests would take for theirs.
        os.environ.clear()
        os.environ.update(environment)


def test_written_in_place_an_adapter_is_bit_for_bit_what_vllm_loads(engine: Engine) -> None:
    engine.load(engine.folders[1])
    loaded = engine.call("shoal_digests")
    engine.load(engine.folders[0])
    other = engine.call("shoal_digests")
    engine.call("shoal_publish", str(engine.folders[1]))
    assert engine.call("shoal_digests") == loaded
    # The controls: the other adapter differs in every buffer, and a single factor that is missing shows.
    for ours, theirs in zip(loaded, other, strict=True):
        changed = {name for name in ours if ours[name] != theirs[name]}
        assert changed == {name for name in ours if "proj.lora_" in name}
        assert len(changed) == 2 * 2 * 7
    engine.load(engine.folders[0])
    engine.call("shoal_publish", str(engine.folders[1]), "layers.1.mlp.up_proj.lora_B")
    for ours, theirs in zip(loaded, engine.call("shoal_digests"), strict=True):
        assert [name for name in ours if ours[name] != theirs[name]] == [
            "model.layers.1.mlp.gate_up_proj.lora_b_stacked:1"
        ]


def test_after_every_publish_the_text_is_that_of_transformers_with_this_adapter(engine: Engine) -> None:
    engine.load(engine.folders[0])
    engine.llm.reset_prefix_cache()
    seen = []
    for seed, folder in enumerate(engine.folders):
        randomise(engine.policy, seed)
        wanted = greedy_texts(engine.policy, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)
        if seed:
            assert engine.text() == seen[-1]  # the control: until it is published, the text is that of the one before
            engine.publish(folder)
        assert engine.text() == wanted
        seen.append(wanted)
    assert all(a != b for a, b in pairwise(seen))
    with engine.policy.disable_adapter():
        assert greedy_texts(engine.policy, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS) not in seen


def test_what_ends_a_session_of_updates_forgets_the_adapter_and_restoring_it_lets_a_publish_last(
    engine: Engine,
) -> None:
    def text_of(seed: int) -> list[list[int]]:
        randomise(engine.policy, seed)
        return greedy_texts(engine.policy, PROMPTS, max_tokens=NUM_TOKENS, stop_token_id=EOS)

    engine.load(engine.folders[0])
    engine.publish(engine.folders[2])
    engine.call("shoal_finish_weight_update")
    assert engine.text() == text_of(0)  # the publish is undone: the request loaded the adapter of the folder
    engine.call("shoal_finish_weight_update")
    num_workers = len(engine.call("shoal_digests"))
    assert engine.call("shoal_restore") == [True] * num_workers
    engine.publish(engine.folders[2])
    assert engine.call("shoal_restore") == [False] * num_workers
    assert engine.text() == text_of(2)


def test_the_workers_plans_name_every_factor_and_share_what_is_sharded(engine: Engine) -> None:
    plans = [SlicePlan.from_json(text) for text in engine.call("shoal_learn", str(engine.folders[1]))]
    sizes: dict[str, int] = defaultdict(int)
    for plan in plans:
        assert plan.reloaded == () and plan.fills == () and len(plan.by_source) == 2 * 7 * 2
        for piece in plan.slices:
            assert piece.dtype == "float32"
            assert piece.source_region.shape == piece.target_region.shape
            sizes[piece.source] += piece.source_region.num_elements
    num_workers = len(plans)
    for name, value in get_peft_model_state_dict(engine.policy).items():
        row_parallel = "o_proj" in name or "down_proj" in name
        is_shared = row_parallel if "lora_A" in name else not row_parallel
        assert sizes[name] == math.prod(value.shape) * (1 if is_shared else num_workers), name


def test_an_adapter_of_another_shape_is_refused(engine: Engine, make_served_model: Callable[..., Any]) -> None:
    folder = engine.folders[0].parent / f"narrow-{id(engine)}"
    policy = get_peft_model(make_served_model(seed=5), LoraConfig(r=4, target_modules=["q_proj"]))
    save_adapter(policy, folder)
    with pytest.raises(Exception, match=r"factors for model\.layers\.0\.mlp\.down_proj .*trainer's are none"):
        engine.call("shoal_learn", str(folder))
