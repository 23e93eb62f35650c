"""The numbers that limit a split are found under the names that architectures use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import PlacementError
from shoal.placement.model_shape import read_model_config, shape_from_config


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}, (9, 3, 30)),
        ({"n_head": 12, "n_layer": 6}, (12, 12, 6)),
        ({"num_attention_heads": 2, "text_config": {"num_attention_heads": 16, "num_hidden_layers": 4}}, (16, 16, 4)),
        ({"num_attention_heads": 8, "num_key_value_heads": None}, (8, 8, None)),
        ({}, (None, None, None)),
    ],
)
def test_heads_and_layers_are_found(config: dict[str, Any], shape: tuple[int | None, int | None, int | None]) -> None:
    found = shape_from_config(config)
    assert (found.num_attention_heads, found.num_key_value_heads, found.num_hidden_layers) == shape


def test_a_checkpoint_s_folder_and_its_config_file_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    assert read_model_config(tmp_path) == read_model_config(tmp_path / "config.json") == {"num_attention_heads": 4}


@pytest.mark.parametrize("content", [None, "[]", "{"])
def test_a_checkpoint_without_a_readable_config_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PlacementError, match="Give the folder of a checkpoint"):
        read_model_config(tmp_path)
