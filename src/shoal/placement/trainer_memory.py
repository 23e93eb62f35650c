"""What a trainer process keeps on its device, part by part, at the moment when it is most.

The weights are float32 unless the settings say otherwise and so are gradients and Adam's two moments; with
`precision="bf16"` autocast computes in bfloat16 (`trainer/model.py`, `trainer/forward.py`). The bytes of a block are
those of the tensors that autograd keeps, found by listing them; `tests/placement/test_memory_measured.py` compares all
this with the peak of real training steps on a CPU, `test_measured_on_gpus.py` with those of H200s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from shoal.placement.architecture import Architecture

Method: TypeAlias = Literal["full", "lora"]
Sharding: TypeAlias = Literal["ddp", "fsdp2", "zero3"]
Precision: TypeAlias = Literal["bf16", "fp32"]
Dtype: TypeAlias = Literal["float32", "bfloat16"]

_FLOAT, _HALF = 4, 2
_ADAM_BYTES = 2 * _FLOAT
# Logits taken up at once, of algorithm/logprobs.py and algorithm/lm_head.py, which this room may not import.
_CHUNK_ELEMENTS = 1 << 25
_TILE_ELEMENTS = 1 << 24
_TILES = 4  # float32 tiles' worth of temporaries; where there are kernels, one 16-bit tile of as many elements
_MASK_BYTES = 1 + _FLOAT  # booleans, and what scaled_dot_product_attention turns them into
_IN_FLIGHT_BLOCKS = 2  # FSDP2 gathers the next block while one computes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSetup:
    """How the trainer processes hold and train the model.

    Attributes:
        method: All weights, or a LoRA adapter beside frozen ones.
        lora_rank: Of the adapter.
        lora_targets: Matrices that it adapts; None for all of every block.
        sharding: DDP (also for one process), FSDP2, or DeepSpeed ZeRO-3.
        num_ranks: Trainer processes.
        precision: `"bf16"`: autocast computes in bfloat16. `"fp32"`: float32 throughout.
        dtype: Of the weights; an adapter's are float32 whatever it is.
        checkpoints: Gradient checkpointing: blocks are computed again in the backward pass.
        recomputed: How many of them, the first ones; None for all. Without `checkpoints` none.
        compiled: Blocks are compiled one by one (`regional_compilation`).
        lean: Whether kept blocks, if compiled, make what is cheap again. None: where others are computed again, which
            is when the trainer does so if it is told how many.
        micro_batch_tokens: Tokens of a packed forward pass.
        is_masked: Attention takes a mask of tokens x tokens (on CPUs), not the lengths of the sequences.
        keeps_logits: Logits of a whole micro-batch exist at once (`fused_logprobs=False`); else a tile of them does.
    """

    method: Method = "full"
    lora_rank: int = 16
    lora_targets: frozenset[str] | None = None
    sharding: Sharding = "ddp"
    num_ranks: int = 1
    precision: Precision = "bf16"
    dtype: Dtype = "float32"
    checkpoints: bool = True
    recomputed: int | None = None
    compiled: bool = True
    lean: bool | None = None
    micro_batch_tokens: int = 8192
    is_masked: bool = False
    keeps_logits: bool = False

    @property
    def compute_bytes(self) -> int:
        """Of a number that the forward pass computes with."""
        return _HALF if self.precision == "bf16" else _FLOAT

    @property
    def casts_weights(self) -> bool:
        """Whether autocast makes copies of float32 weights; FSDP2 and ZeRO-3 gather them in bfloat16 instead."""
        return self.precision == "bf16" and self.dtype == "float32" and self.sharding == "ddp"

    @property
    def weight_bytes(self) -> int:
        """Of a number of the model's weights."""
        return _FLOAT if self.dtype == "float32" else _HALF

    def num_recomputed(self, model: Architecture) -> int:
        """Return how many of the model's blocks are computed again."""
        if not self.checkpoints:
            return 0
        return model.num_layers if self.recomputed is None else min(self.recomputed, model.num_layers)

    def is_lean(self, model: Architecture) -> bool:
        """Whether kept blocks make what is cheap again."""
        return self.compiled and (self.num_recomputed(model) > 0 if self.lean is None else self.lean)

    def trainable(self, model: Architecture) -> int:
        """Return how many parameters are trained."""
        if self.method == "full":
            return model.num_parameters
        return model.lora_parameters(self.lora_rank, self.lora_targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerMemory:
    """Bytes on one trainer's device at the moment when they are most.

    Attributes:
        weights: The parameters.
        copies: What autocast made of them, or what was gathered of them.
        gradients: With DDP's buckets, where there are several processes.
        optimizer: Adam's moments, and ZeRO's float32 weights.
        activations: What the backward pass needs of the forward pass, and what it makes of it.
        logprobs: Logits, their gradient, the chunk that is worked on, and a new gradient of the output's matrix.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    logprobs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.copies + self.gradients + self.optimizer + self.activations + self.logprobs

    @property
    def resting(self) -> int:
        """What stays between steps, gradients freed."""
        return self.weights + self.optimizer


def estimate_trainer_memory(model: Architecture, setup: TrainerSetup) -> TrainerMemory:
    """Estimate one trainer's memory.

    A step is most either at the end of the forward pass, or when the logits or their matrix are differentiated,
    or in the backward pass of the last block, or in that of the embedding; what is returned belongs to that moment.
    Gradients are there at all of them: they add up over a step's micro-batches.
    """
    weights, gradients, optimizer = _held(model, setup)
    head, block = _logprobs(model, setup), _block_backward(model, setup)
    all_copies, kept_copies = _copies(model, setup)
    kept, final = _kept_activations(model, setup), _final_norm(model, setup)
    logits_of_forward = _logit_elements(model, setup) * setup.compute_bytes if setup.keeps_logits else 0
    moments = (
        (all_copies, kept + final, logits_of_forward),
        (kept_copies, kept + final, head),
        (kept_copies, kept + final, _output_matrix(model, setup)),
        (kept_copies, kept + block, 0),
        (0, 0, setup.weight_bytes * model.embedding_parameters if setup.method == "full" else 0),
    )
    copies, activations, logprobs = max(moments, key=sum)
    return TrainerMemory(
        weights=weights,
        copies=copies,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logprobs=logprobs,
    )


def saved_bytes_per_token(model: Architecture, setup: TrainerSetup) -> int:
    """Return what autograd keeps of one block for each token, if the block is not computed again."""
    if setup.compiled:
        return _saved_compiled(model, setup)
    hidden, query, kv, norms = model.hidden, model.query_width, model.kv_width, model.norms_per_block
    compute = setup.compute_bytes
    # Normalisations compute in float32; what they normalised is kept for the gradient of their weights. Autocast casts
    # what comes out of them once for each matrix; in a model that is bfloat16 throughout the residual stream is too,
    # and the matrices share one output.
    trains_norms = setup.method == "full"
    if setup.casts_weights:
        per_norm = (_FLOAT + _FLOAT * trains_norms) * hidden
        inputs = (3 + 2 * max(1, model.experts_per_token)) * _HALF * hidden
    elif setup.precision == "bf16":
        per_norm, inputs = (_FLOAT + _HALF * trains_norms) * hidden, 2 * _HALF * hidden
    else:
        per_norm, inputs = (_FLOAT + _FLOAT * trains_norms) * hidden, 2 * _FLOAT * hidden
    heads = (_FLOAT + compute) * (query + kv) if model.normalises_heads else 0
    attention = compute * (2 * query + 2 * kv) + _FLOAT * model.num_heads
    mlp = 4 * compute * model.intermediate * max(1, model.experts_per_token)
    return norms * per_norm + inputs + heads + attention + mlp


def _saved_compiled(model: Architecture, setup: TrainerSetup) -> int:
    """Return the same of a compiled block, in which what is cheap is made again of what the products need.

    The block's input, the norms' outputs and that of attention's last product; queries and keys before their own norm;
    what attention takes and gives; gate, up and their product. Found by listing what torch 2.13's partitioner keeps.
    Lean blocks make the norms' outputs and the product again.
    """
    hidden, query, compute = model.hidden, model.query_width, setup.compute_bytes
    is_lean = setup.is_lean(model)
    stream = _stream_bytes(setup) * hidden
    rows = (1 if is_lean else model.norms_per_block + 1) * compute * hidden
    heads = compute * (query + model.kv_width) if model.normalises_heads else 0
    # Keys and values are as wide as queries where the kernel does not group heads (trainer/attention.py), which what
    # was measured with torch 2.11 agrees with. Beside them a float32 number for each head.
    attention = 4 * compute * query + _FLOAT * model.num_heads
    mlp = (2 if is_lean else 3) * compute * model.intermediate * max(1, model.experts_per_token)
    return stream + rows + heads + attention + mlp


def _held(model: Architecture, setup: TrainerSetup) -> tuple[int, int, int]:
    """Return weights, gradients and optimizer of one rank."""
    total, trainable = model.num_parameters, setup.trainable(model)
    frozen = total if setup.method == "lora" else 0
    ranks = setup.num_ranks
    if setup.sharding == "zero3" and setup.precision == "bf16":
        # 18 bytes a parameter: bfloat16 weights; float32 gradients, weights and moments (DeepSpeed's
        # estimate_zero3_model_states_mem_needs_all_live).
        held = _HALF * (frozen + trainable), _FLOAT * trainable, (_FLOAT + _ADAM_BYTES) * trainable
    else:
        # Gradients and moments are of their weights' type; PEFT makes an adapter float32.
        of_trained = _FLOAT if setup.method == "lora" else setup.weight_bytes
        held = (
            setup.weight_bytes * frozen + of_trained * trainable,
            of_trained * trainable,
            2 * of_trained * trainable,
        )
    if setup.sharding == "ddp":
        # DDP's buckets hold a second copy of all gradients unless gradient_as_bucket_view is set, which accelerate
        # leaves off.
        weights, gradients, optimizer = held
        return weights, gradients * (2 if ranks > 1 else 1), optimizer
    weights, gradients, optimizer = (-(-value // ranks) for value in held)
    return weights, gradients, optimizer


def _copies(model: Architecture, setup: TrainerSetup) -> tuple[int, int]:
    """Return the bytes of weights made for computing: at the end of the forward pass, and in the backward pass."""
    if setup.sharding != "ddp":
        compute, block = setup.compute_bytes, model.largest_block_parameters
        ends = model.embedding_parameters * (1 if model.is_tied else 2)
        if setup.sharding == "fsdp2":
            # The root's own parameters stay gathered; the gradient of a block is whole until it is scattered.
            gathered = compute * (ends + _IN_FLIGHT_BLOCKS * block)
            return gathered, gathered + compute * (block if setup.method == "full" else 0)
        largest = _FLOAT * max(model.embedding_parameters, *(linear.num_parameters for linear in model.dense_mlp))
        return largest, largest
    if not setup.casts_weights:
        return 0, 0
    blocks = _HALF * (_all_matrices(model) - model.embedding_parameters)
    head = _HALF * model.embedding_parameters
    of_blocks = 0 if setup.is_lean(model) else blocks
    kept = head + of_blocks * (model.num_layers - setup.num_recomputed(model)) // model.num_layers
    # Autocast remembers what it has cast of trained weights until the forward pass ends; of frozen ones it does not,
    # nor does a compiled block, which casts for itself.
    return (head + blocks if setup.method == "full" and not setup.compiled else kept), kept


def _kept_activations(model: Architecture, setup: TrainerSetup) -> int:
    """Return what is kept of the blocks from the forward pass."""
    tokens = setup.micro_batch_tokens
    stream = _stream_bytes(setup) * model.hidden * tokens
    mask = _MASK_BYTES * tokens**2 if setup.is_masked else 0
    recomputed = setup.num_recomputed(model)
    kept = (model.num_layers - recomputed) * saved_bytes_per_token(model, setup) * tokens
    return recomputed * stream + kept + mask


def _block_backward(model: Architecture, setup: TrainerSetup) -> int:
    """Return what the backward pass of the last block holds beyond what was kept: gradients, and what is made again.

    Where some blocks are kept, the last one is, and they are gone when the backward pass comes to the others.
    """
    tokens = setup.micro_batch_tokens
    is_recomputed = setup.num_recomputed(model) == model.num_layers
    beyond_input = saved_bytes_per_token(model, setup) - _stream_bytes(setup) * model.hidden
    again = beyond_input * tokens if is_recomputed else 0
    # The stream's gradient, and in the MLP those of the product and of one of its factors, beside one temporary.
    gradients = _stream_bytes(setup) * model.hidden + 3 * setup.compute_bytes * model.intermediate
    return again + gradients * tokens


def _final_norm(model: Architecture, setup: TrainerSetup) -> int:
    """Return what the last normalisation keeps, and the rows that logits are computed of."""
    normalised = 2 * _FLOAT if setup.method == "full" else _FLOAT
    return (normalised + 2 * setup.compute_bytes) * model.hidden * setup.micro_batch_tokens


def _logprobs(model: Architecture, setup: TrainerSetup) -> int:
    """Return what is there while logits are differentiated: they, their gradient, and a chunk of the softmax.

    Or a few tiles, the gradient of the hidden states, and that of the matrix, which are summed over tiles.
    """
    elements = _logit_elements(model, setup)
    if not setup.keeps_logits:
        each = setup.compute_bytes  # the kernels leave 16-bit products as they are; elsewhere tiles become float32
        tiles = _TILES * each * min(elements, _TILE_ELEMENTS)
        matrix = setup.weight_bytes * model.embedding_parameters if setup.method == "full" else 0
        return tiles + _FLOAT * model.hidden * setup.micro_batch_tokens + matrix
    # accelerate makes float32 of the model's outputs.
    return 2 * _FLOAT * elements + _FLOAT * min(elements, max(_CHUNK_ELEMENTS, model.vocabulary))


def _output_matrix(model: Architecture, setup: TrainerSetup) -> int:
    """Return what is there while the gradient of kept logits becomes that of the matrix, before it is added up."""
    if not setup.keeps_logits:
        return 0
    cast = _HALF if setup.casts_weights else 0
    matrix = (setup.weight_bytes + cast) * model.embedding_parameters if setup.method == "full" else 0
    return (_FLOAT + cast) * _logit_elements(model, setup) + matrix


def _logit_elements(model: Architecture, setup: TrainerSetup) -> int:
    return setup.micro_batch_tokens * model.vocabulary


def _stream_bytes(setup: TrainerSetup) -> int:
    """Return the bytes of a number of the residual stream: the embedding's type, which autocast leaves alone."""
    return _HALF if setup.precision == "bf16" and not setup.casts_weights else _FLOAT


def _all_matrices(model: Architecture) -> int:
    block = sum(linear.inputs * linear.outputs for linear in model.attention)
    dense = sum(linear.inputs * linear.outputs for linear in model.dense_mlp)
    experts = model.num_experts * sum(linear.inputs * linear.outputs for linear in model.expert)
    mlps = model.num_dense * dense + model.num_moe_layers * experts
    return model.num_layers * block + mlps + model.embedding_parameters
