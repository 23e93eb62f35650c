"""Prompts from datasets, with a real (tiny) tokenizer of transformers: token ids, columns, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.data.prompts import PromptSource
from shoal.errors import ConfigError, DatasetError

LETTERS = "abcdefghijklmnopqrstuvwxyz <>?"
TEMPLATE = (
    "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    "{% if loud %}z{% endif %}{% if add_generation_prompt %}?{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter, its id the letter's place in LETTERS."""
    model = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token=" "))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(text: str) -> tuple[int, ...]:
    """The token ids of a text."""
    return tuple(LETTERS.index(letter) for letter in text)


def source(rows: list[dict[str, Any]], tokenizer: Any, limit: int = 100, **kwargs: Any) -> PromptSource:
    """A source of these rows."""
    return PromptSource(datasets.Dataset.from_list(rows), tokenizer, max_prompt_tokens=limit, **kwargs)


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


@settings(deadline=None, max_examples=15)
@given(texts=st.lists(st.text(LETTERS, min_size=1, max_size=9), min_size=1, max_size=5))
def test_every_text_row_has_its_own_tokens(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = source([{"prompt": text} for text in texts], tokenizer)
    assert len(prompts) == len(texts)
    for row, text in enumerate(texts):
        assert prompts.get(row).token_ids == tuple(tokenizer(text)["input_ids"]) == ids(text)
        assert (prompts.get(row).row, prompts.get(row).prompt) == (row, text)


def test_rows_keep_their_tokens_across_tokenising_batches(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["ab"[: 1 + row % 2] + LETTERS[row % 26] for row in range(600)]
    prompts = source([{"prompt": text} for text in texts], tokenizer)
    assert [prompts.get(row).token_ids for row in range(600)] == [ids(text) for text in texts]


def test_a_conversation_goes_through_the_chat_template_up_to_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = [*user("hi"), {"role": "assistant", "content": "yo"}, *user("ab")]
    prompts = source([{"prompt": conversation}, {"prompt": user("a")}], tokenizer)
    assert prompts.get(0).token_ids == ids("<hi><yo><ab>?")
    assert prompts.get(1).token_ids == ids("<a>?")
    assert prompts.get(0).prompt == conversation


def test_the_chat_template_gets_the_users_arguments(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = source([{"prompt": user("a")}], tokenizer, chat_template_kwargs={"loud": True})
    assert prompts.get(0).token_ids == ids("<a>z?")


def test_reward_functions_get_every_other_column_but_the_reserved_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "a", "answer": 4, "level": "easy", "completion": "x", "completion_ids": [1]}
    assert source([row], tokenizer).get(0).columns == {"answer": 4, "level": "easy"}


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_does_not_exist_is_refused(row: int, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(IndexError, match=f"row {row} is not in the dataset, which has rows 0 to 1"):
        source([{"prompt": "a"}] * 2, tokenizer).get(row)


def test_an_empty_dataset_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match="no rows"):
        PromptSource(datasets.Dataset.from_dict({"prompt": []}), tokenizer, max_prompt_tokens=9)


def test_a_dataset_without_prompts_is_refused_with_the_columns_it_has(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match="its columns: question, answer"):
        source([{"question": "a", "answer": "b"}], tokenizer)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (datasets.Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), "is a stream.*materialise"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": ["a"]})}), r"splits \(train\)"),
        ([{"prompt": "a"}], "is a list, not a datasets.Dataset"),
    ],
)
def test_what_is_not_one_map_style_dataset_is_refused(
    dataset: Any, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptSource(dataset, tokenizer, max_prompt_tokens=9)


@pytest.mark.parametrize("bad", [None, [], [{"role": None, "content": "a"}]])
def test_a_bad_prompt_among_conversations_is_named_by_row(bad: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match=r"Row 1 has the prompt .* neither text nor a conversation"):
        source([{"prompt": user("a")}, {"prompt": bad}], tokenizer)


@pytest.mark.parametrize("bad", [3, ["a", "b"]])
def test_a_column_of_the_wrong_type_is_refused(bad: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match=re.escape(f"Row 0 has the prompt {bad!r} of type {type(bad).__name__}")):
        source([{"prompt": bad}], tokenizer)


def test_a_missing_text_is_named_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match="Row 300 has the prompt None"):
        source([{"prompt": "a"}] * 300 + [{"prompt": None}], tokenizer)


def test_a_prompt_without_tokens_is_named_by_row(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DatasetError, match=r"row 1 has no tokens \(2 of 3 rows\)"):
        source([{"prompt": "a"}, {"prompt": ""}, {"prompt": ""}], tokenizer)


def test_a_prompt_that_is_too_long_is_named_by_row_length_and_limit(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "aaa"}, {"prompt": "aaaa"}, {"prompt": "aaaaaa"}]
    assert len(source(rows, tokenizer, limit=6)) == 3
    with pytest.raises(DatasetError, match=r"row 1 has 4 tokens, more than the 3.*2 of 3 rows.*longest has 6"):
        source(rows, tokenizer, limit=3)
