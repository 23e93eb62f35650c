"""A language model and a tokenizer small enough to make on the spot; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Return a tokenizer with one token for each byte, and `<pad>`, `<s>`, `</s>` as 0, 1, 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def tiny_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Return a two-layer Llama with random weights, for `tiny_tokenizer`.

    Args:
        seed: Of the weights.
        dtype: Of the weights.
        overrides: Entries of its `LlamaConfig`.
    """
    settings = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        # Larger than usual, so that random weights prefer some tokens clearly and greedy text has no near ties.
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(settings | overrides)))
    return model.to(dtype)


@torch.no_grad()
def greedy_texts(
    model: Any, prompts: Iterable[Sequence[int]], *, max_tokens: int, stop_token_id: int
) -> list[list[int]]:
    """Return transformers' own greedy completion of each prompt, one at a time, as token ids."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=stop_token_id,
            pad_token_id=0,
        )
        texts.append(output[0, len(prompt) :].tolist())
    return texts
