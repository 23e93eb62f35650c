"""`GRPOTrainer`: a `transformers.Trainer` whose batches are written by vLLM engines as it goes.

Everything happens at one seam, `get_batch_samples`, which transformers calls once for each optimizer step: where no
batch is at hand, rank 0 collects its completions, every rank receives them and takes its share as packed micro-batches.
After the batch's last step the new weights are published. The rest (callbacks, checkpoints, schedulers, precision) is
inherited.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

from shoal.algorithm.objective import grpo_objective
from shoal.algorithm.seeds import sample_seed
from shoal.config import GRPOConfig
from shoal.data.prompts import PromptSource
from shoal.engines.fleet import StartProgress
from shoal.errors import ConfigError, NoEngineError
from shoal.observe.ledger import TimeLedger
from shoal.rollout.collector import GroupRequest
from shoal.trainer.blocks import compile_blocks, compiles_blocks
from shoal.trainer.checkpoints import last_complete_checkpoint, save_last_step
from shoal.trainer.engine_side import EngineSide, Sources
from shoal.trainer.factory import draw_blueprint, make_publisher, make_sources, start_rollouts, write_engine_adapter
from shoal.trainer.groups import num_tokens, speed_metrics, training_sequences
from shoal.trainer.held_batch import HeldBatch, Part
from shoal.trainer.inputs import check_inputs
from shoal.trainer.model import is_sharded, load_policy, short_name, stop_token_ids
from shoal.trainer.packing_limit import PackingLimit
from shoal.trainer.policy_logprobs import PolicyLogprobs
from shoal.trainer.progress import print_start_progress
from shoal.trainer.record import RunRecord
from shoal.trainer.reference import ReferencePolicy
from shoal.trainer.rollouts import Rollouts
from shoal.trainer.sharding import (
    backward_keywords,
    check_precision,
    check_sharding,
    gradient_exchange,
    whole_state_dict,
)
from shoal.trainer.shared_devices import SharedDevice, share_device
from shoal.trainer.step import (
    largest_pass,
    objective_settings,
    parts_of_rank,
    sampling_filters,
    spread,
    to_device,
    truncation,
)
from shoal.trainer.step_callback import StepCallback
from shoal.trainer.step_log import StepLog
from shoal.trainer.token_budget import GpuMemory
from shoal.types import CompletionLike, MicroBatch, Prompt, Rollout, SamplingSettings, ScoredGroup
from shoal.types import Sequence as TrainingSequence
from shoal.weights.publisher import WeightPublisher

_ROLLOUT_TIMEOUT_FACTOR = 10.0  # a step may take this many times as long as one completion


class GRPOTrainer(Trainer):  # type: ignore[misc]
    """Train a language model with GRPO; the arguments are TRL's.

    Engines start with the first call of `train` or `evaluate`, and end with `close`, with an error, or with the
    process. All settings, the dataset and the reward functions are checked in the constructor, before anything starts.

    Args:
        model: A folder, a hub id, or a causal language model.
        reward_funcs: One function or several; see `shoal.rewards` for the convention.
        args: Settings; None for the defaults, in a folder named after the model.
        train_dataset: With a column `prompt` of text or of conversations; other columns are handed to the rewards.
        eval_dataset: The same, for `evaluate`.
        processing_class: The tokenizer; None for the model's own.
        callbacks: transformers callbacks.
        optimizers: As in `transformers.Trainer`.
        peft_config: Train an adapter of this kind instead of all weights.

    Raises:
        ShoalError: Something cannot work: a setting, the dataset, a reward function, the devices.
    """

    _tag_names = ("shoal", "grpo")
    control: Any  # transformers' TrainerControl

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]],
        args: GRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: Any = None,
    ) -> None:
        args = args or GRPOConfig(output_dir=f"{short_name(model)}-GRPO")
        inputs = check_inputs(
            model,
            reward_funcs,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=processing_class,
            peft_config=peft_config,
        )
        self._judge, self._prompts = inputs.judge, inputs.prompts
        self._exchange, self._plan = inputs.exchange, inputs.plan
        policy = inputs.policy
        self._logprobs = PolicyLogprobs(
            policy, temperature=args.temperature, truncation=truncation(args), fused=args.fused_logprobs
        )
        reload = (lambda: self._logprobs.adapt(load_policy(model, args))) if isinstance(model, str) else None
        self._reference = ReferencePolicy(policy, reload=reload) if args.beta > 0 else None
        self._stop_token_ids = stop_token_ids(policy, inputs.tokenizer)
        self._objective = objective_settings(args)
        self._held = HeldBatch(
            num_parts=args.parts_per_batch,
            num_iterations=args.num_iterations,
            wants_old_logprobs=self._objective.old_from == "policy",
        )
        self._step_log = StepLog()
        self._record = RunRecord(args)
        self._is_evaluating = False
        self._step_is_empty = False
        self.last_evaluation: tuple[ScoredGroup, ...] = ()
        """What `evaluate` was last about, completion by completion; on rank 0 only."""
        self.ledger = TimeLedger()
        self._engines = EngineSide(
            ranks=self._exchange,
            ledger=self.ledger,
            make_sources=self._make_sources,
            start=self._start_rollouts,
            make_publisher=self._make_publisher,
            shared=self._shared_device(args),
        )
        self.engine_start_progress: StartProgress = print_start_progress
        """Told how far the engines are while they start; replace it to show it differently."""

        super().__init__(
            model=policy,
            args=args,
            data_collator=_no_collation,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=inputs.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss carries the step's one denominator; transformers must not divide it again.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = True
        check_sharding(self.accelerator)
        check_precision(self.accelerator, args)
        if self._reference is not None:
            self._reference.shard(self.accelerator)
        self._limit = PackingLimit(args, self._exchange, GpuMemory(args.device))
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sharded(policy)):
            self._limit.find(policy, self.accelerator, longest=self._prompts.max_sequence_tokens)
        self.add_callback(StepCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see `transformers.Trainer.train`. If it fails or is interrupted, the engines are ended.

        `resume_from_checkpoint=True` takes the newest checkpoint that is complete.

        Raises:
            ConfigError: There is no such checkpoint.
            NoEngineError: No engine is left, and none can be restarted. A checkpoint has been saved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(Path(self.args.output_dir)))
        if compiles_blocks(self.model, self.args, is_deepspeed=self.is_deepspeed_enabled):
            compile_blocks(self.model)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except NoEngineError:
            save_last_step(
                Path(self.args.output_dir),
                self.state.global_step,
                self._exchange,
                lambda: self._save_checkpoint(self.model_wrapped, None),
            )
            self.close()
            raise
        except BaseException:
            self.close()
            raise

    def begin_training(self) -> None:
        """Forget what an earlier call of `train` has left: completions, and what the engines hold."""
        self._held.clear()
        self.forget_published()

    def get_train_dataloader(self) -> DataLoader[int]:
        """Return a loader that only counts: which prompts a step takes follows from its number (`PromptSchedule`)."""
        steps = self._prompts.batches_per_epoch * self.args.steps_per_batch
        ticks = steps * self.args.gradient_accumulation_steps
        # In batches of one: a resumed run skips through the loader's batch sampler, which batch_size=None has none of.
        return DataLoader(range(ticks), batch_size=1, collate_fn=_no_collation)  # type: ignore[arg-type]

    # ---- one step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[int], num_batches: int, device: torch.device
    ) -> tuple[list[list[MicroBatch]], None]:
        """Return this rank's share of an optimizer step, packed; where need be, have completions written for it."""
        ticks = list(itertools.islice(epoch_iterator, num_batches))
        if not ticks:
            return [], None
        step = self.state.global_step
        if self._held.serves(step):
            self._train_began = time.monotonic()
        else:
            self._held.fill(step, self._new_batch(step), self._old_logprobs)
        part = self._held.part(step)
        self._step_is_empty = part.is_empty
        return spread(part.micro_batches, len(ticks)), None

    def _new_batch(self, step: int) -> list[Part]:
        """Have a batch of completions written, rewarded and dealt out to its optimizer steps. A collective."""
        unwrapped, longest = self.accelerator.unwrap_model(self.model), self._prompts.max_sequence_tokens
        if self._limit.tokens is None:  # only now is the model divided
            self._limit.find(unwrapped, self.accelerator, longest=longest, wrapped=self.model_wrapped)
        report = self._engines.refresh(step, always=False)
        if report is not None and self._engines.sleeps:
            wake = report.phases.get("wake", 0.0)
            self._step_log.add({"seconds/wake": wake, "seconds/publish": report.seconds - wake})
        number = self._held.number(step)
        sequences = self._exchange.sequences(self._engines.during(lambda: self._write_batch(number)))
        self._engines.rest()
        self._step_log.add(self._engines.take_handover())
        self._train_began = time.monotonic()
        self._limit.measure(unwrapped, self.optimizer, longest=longest, is_fused=self._logprobs.is_fused)
        assert self._limit.tokens is not None, "found above, or in the constructor"
        parts = parts_of_rank(sequences, self.args, number=number, max_tokens=self._limit.tokens)
        self._limit.watch(unwrapped, largest=largest_pass(parts))
        return parts

    def _write_batch(self, number: int) -> list[TrainingSequence]:
        """Collect a batch's groups and turn them into training sequences. Rank 0 only."""
        step = self.state.global_step
        prompts = self._prompts.batch(number)
        began = time.monotonic()
        with self.ledger.phase("generate"):
            groups = self.score(
                prompts,
                num_generations=self.args.num_generations,
                temperature=self.args.temperature,
                seed_step=step,
            )
        seconds = time.monotonic() - began
        judged = self._judge.compare(groups)
        self._judge.count_empty(judged)
        self.state.num_input_tokens_seen += num_tokens(groups)
        self._step_log.add(
            self._judge.metrics(judged)
            | {"num_tokens": float(self.state.num_input_tokens_seen)}
            | speed_metrics(groups, seconds)
            | self._engines.take_counts()
        )
        self._record.write_completions(step, judged, self._judge.names)
        return training_sequences(judged, self.args)

    def score(
        self, prompts: Sequence[Prompt], *, num_generations: int, temperature: float, seed_step: int
    ) -> tuple[ScoredGroup, ...]:
        """Have the engines' weights complete and the rewards judge some prompts. Rank 0 only.

        Args:
            prompts: What to complete.
            num_generations: Completions for each.
            temperature: 0 for greedy.
            seed_step: Takes the place of the step in the samples' seeds.
        """
        request = GroupRequest(
            prompts=tuple(prompts),
            num_generations=num_generations,
            sampling=SamplingSettings(
                temperature=temperature,
                max_tokens=self.args.max_completion_length,
                stop_token_ids=self._stop_token_ids,
                **sampling_filters(self.args),
            ),
            seed=lambda prompt, sample: sample_seed(self.args.seed, seed_step, prompt.row, sample),
            step=self.state.global_step,
        )
        return self._engines.collect(request, timeout_s=self.args.vllm_request_timeout_s * _ROLLOUT_TIMEOUT_FACTOR)

    async def _score_group(
        self, prompt: Prompt, rollouts: tuple[Rollout, ...], completions: tuple[CompletionLike, ...]
    ) -> ScoredGroup:
        return await self._judge.score(prompt, rollouts, completions, self.state)

    @torch.no_grad()
    def _old_logprobs(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Return the logprobs of a part of the batch before the first update on it, `[N]`. A collective."""
        self.model_wrapped.train()
        self._decide_logprobs(self.model_wrapped)
        with self.compute_loss_context_manager():
            return self._logprobs.of_policy(self.model_wrapped, to_device(micro_batch, self.args.device)).logprobs

    def training_step(
        self, model: nn.Module, inputs: list[MicroBatch], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward on each micro-batch; how gradients are exchanged, see `gradient_exchange`."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        self._decide_logprobs(model)
        total = torch.zeros((), device=self.args.device)
        ends_step = self.accelerator.sync_gradients  # as transformers has set it for the whole call
        for index, micro_batch in enumerate(inputs):
            is_last = ends_step and index == len(inputs) - 1
            with gradient_exchange(self.accelerator, model, ends_step=is_last):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, to_device(micro_batch, self.args.device))
                self.accelerator.backward(loss, **backward_keywords(self.accelerator))
            total += loss.detach()
        return total

    def _decide_logprobs(self, model: nn.Module) -> None:
        self._logprobs.decide(
            model,
            vocabulary=int(self.accelerator.unwrap_model(model).get_input_embeddings().num_embeddings),
            device=self.args.device,
            all_agree=lambda agrees: not int(self._exchange.sum(torch.tensor([0 if agrees else 1]))),
        )

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return a micro-batch's share of the step's loss, times the number of ranks.

        Gradients are averaged over ranks (DDP, FSDP), while the shares are to be summed.
        """
        if return_outputs:
            raise NotImplementedError("GRPOTrainer computes logprobs only and keeps no outputs")
        ref_logprobs = None
        if self._reference is not None:
            reference, context = self._reference.model(model, self.accelerator.unwrap_model(model))
            with torch.no_grad(), context:
                ref_logprobs = self._logprobs.of_reference(reference, inputs)
        policy = self._logprobs.of_policy(model, inputs)
        self._held.keep(policy.logprobs)
        objective = grpo_objective(
            inputs,
            policy.logprobs,
            old_logprobs=inputs.old_logprobs,
            ref_logprobs=ref_logprobs,
            settings=self._objective,
            entropy=policy.entropy,
        )
        self._step_log.add_objective(objective.metrics)
        return objective.loss * float(self.args.world_size)

    def skip_empty_step(self) -> None:
        """Have the optimizer leave the weights alone if nothing of the step is in the loss, which all ranks agree on.

        Momentum and weight decay would move them even with a gradient of 0; without any, an optimizer passes over a
        parameter. DeepSpeed has stepped by now, and a loss scaler (fp16) needs gradients: there it is a gradient of 0.
        """
        if self._step_is_empty and self.accelerator.scaler is None:
            self.optimizer.zero_grad(set_to_none=True)

    def publish_after_step(self) -> None:
        """Publish the weights that the optimizer's step has made, if engines are to write with them now.

        Engines that sleep get them when they are woken, and none gets those between two steps on one batch.
        Nothing changes the weights until then, and what is done meanwhile (a checkpoint, say) has the whole device. All
        ranks call it.
        """
        self._limit.end_step()
        self._step_log.end_step(self.args.world_size)
        seconds = time.monotonic() - self._train_began
        self._step_log.add({"seconds/train": seconds})
        self.ledger.add("train", seconds)
        if self._engines.sleeps or self._held.serves(self.state.global_step):
            return
        report = self._engines.publish(self.state.global_step)
        self._step_log.add({"seconds/publish": report.seconds})

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Have the current weights complete every prompt of the dataset, and return the metrics of the rewards.

        `num_generations_eval` and `eval_temperature` apply; the default is `eval_reward` for the mean reward and so on.
        """
        source = self._prompts.evaluation(eval_dataset)
        if self._limit.tokens is None and not self.is_in_train:
            raise ConfigError(
                "evaluate() before train() has no divided model to publish from: accelerate divides it when training "
                "begins. Set eval_on_start=True, or evaluate in one process."
            )
        # Outside of training, whoever holds the model may have changed it since the last publish.
        self._engines.refresh(self.state.global_step, always=not self.is_in_train)
        evaluated = self._engines.during(lambda: self._evaluate_prompts(source))
        metrics: dict[str, float] = self._exchange.json(
            lambda: {f"{metric_key_prefix}_{name}": value for name, value in evaluated().items()}
        )
        self._engines.rest()
        self._is_evaluating = True
        try:
            self.log(dict(metrics))
        finally:
            self._is_evaluating = False
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_prompts(self, source: PromptSource) -> dict[str, float]:
        num_generations = self.args.num_generations_eval or self.args.num_generations
        temperature = self.args.temperature if self.args.eval_temperature is None else self.args.eval_temperature
        with self.ledger.phase("evaluate"):
            groups = self.score(
                [source.get(row) for row in range(len(source))],
                num_generations=num_generations,
                temperature=temperature,
                seed_step=-1,
            )
        self.last_evaluation = groups
        return self._judge.metrics(self._judge.compare(groups))

    # ---- what is saved and logged ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as `from_pretrained` reads it. All ranks call it; sharded models are gathered on rank 0.

        Checkpoints made during training are in the form that accelerate's `state_dict_type` says.
        """
        with nullcontext() if _internal_call else whole_state_dict(self.accelerator):
            super().save_model(output_dir, _internal_call)

    def _load_best_model(self) -> None:
        """Load it, and have it published before the engines write again: the step's number does not tell."""
        super()._load_best_model()
        self.forget_published()

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log, with everything that happened since the last time when it is the training that logs."""
        if not self._is_evaluating:
            logs.update(self._step_log.take())
        super().log(logs, start_time)
        if self.is_world_process_zero():
            self._record.log(self.state.global_step, logs)
            if not self._is_evaluating:
                self._record.print_completions(self.state.global_step)

    def floating_point_ops(self, inputs: Any) -> int:
        """Estimate the operations of a training step: 6 for each parameter and token."""
        tokens = sum(int(micro_batch.num_tokens) for micro_batch in inputs)
        return 6 * tokens * int(self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True))

    # ---- the engines ----

    @property
    def rollouts(self) -> Rollouts | None:
        """The running engines; None before they start, and on ranks other than 0."""
        return self._engines.rollouts

    @property
    def publisher(self) -> WeightPublisher | None:
        """What publishes the weights; None before the engines start."""
        return self._engines.publisher

    def forget_published(self) -> None:
        """Have the weights published before the engines write again, whatever version they hold."""
        self._engines.forget()

    def close(self) -> None:
        """End the engines and worker processes. A later `train` or `evaluate` starts them again."""
        self._engines.close()
        self._judge.close()

    # ---- what the engines need; each is replaced by `shoal.testing` where no engine is wanted ----

    def _make_sources(self) -> Sources:
        model = self.accelerator.unwrap_model(self.model)
        sources = make_sources(model, self.args)
        write_engine_adapter(model, self.args, is_writer=self.is_world_process_zero())
        return sources

    def _make_publisher(self, sources: Sources, rollouts: Rollouts | None) -> WeightPublisher:
        return make_publisher(sources, rollouts, ranks=self._exchange, args=self.args)

    def _start_rollouts(self) -> Rollouts:
        model = self.accelerator.unwrap_model(self.model)
        return start_rollouts(
            draw_blueprint(self._plan, model=model, args=self.args, max_model_len=self._prompts.max_sequence_tokens),
            model=model,
            tokenizer=self.processing_class,
            args=self.args,
            score=self._score_group,
            on_progress=self.engine_start_progress,
        )

    def _shared_device(self, args: GRPOConfig) -> SharedDevice | None:
        return share_device(self._plan.engines, args, self._exchange, lambda: self.optimizer)


def _no_collation(rows: Any) -> Any:
    return rows
