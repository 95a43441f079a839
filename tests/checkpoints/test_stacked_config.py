"""config.json of stacked layers: their number, and what is said of each, from the model that each came from."""

from __future__ import annotations

from typing import Any

import pytest

from sensmerge.checkpoints.stacked_config import LAYER_COUNTS, stacked_config
from sensmerge.errors import IncompatibleModelsError

A = {"layer_types": ["a0", "a1", "a2", "a3"], "num_hidden_layers": 4, "hidden_size": 8}
B = {"layer_types": ["b0", "b1", "b2"], "num_hidden_layers": 3, "hidden_size": 8}


@pytest.mark.parametrize("key", LAYER_COUNTS)
def test_the_number_of_layers(key: str) -> None:
    assert stacked_config({key: 4, "n": 4}, [({}, 4, 0, 3), ({}, 4, 1, 4)], label="a") == {key: 6, "n": 4}


def test_lists_of_layers_follow_their_blocks() -> None:
    found = stacked_config(A, [(A, 4, 0, 3), (B, 3, 1, 3), (A, 4, 3, 4)], label="a")
    assert found == {"layer_types": ["a0", "a1", "a2", "b1", "b2", "a3"], "num_hidden_layers": 6, "hidden_size": 8}


def test_the_text_part_of_a_config() -> None:
    found = stacked_config({"text_config": A, "n": 1}, [({"text_config": B}, 3, 0, 2)], label="a")
    assert found == {"text_config": {**A, "num_hidden_layers": 2, "layer_types": ["b0", "b1"]}, "n": 1}


def test_other_lists_stay() -> None:
    config: dict[str, Any] = {"n_layer": 2, "eos_token_id": [1, 2], "architectures": ["X"], "mlp_only_layers": []}
    assert stacked_config(config, [(config, 2, 0, 1)], label="a") == {**config, "n_layer": 1}


@pytest.mark.parametrize("other", [{}, {"layer_types": ["b0"]}, {"layer_types": None}])
def test_a_list_that_another_model_lacks_is_told(other: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleModelsError, match="'layer_types' are not supported"):
        stacked_config(A, [(A, 4, 0, 2), (other, 4, 2, 4)], label="a")


def test_layers_listed_by_their_numbers_are_refused() -> None:
    config = {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}
    with pytest.raises(IncompatibleModelsError, match="'mlp_only_layers' are not supported"):
        stacked_config(config, [(config, 4, 0, 2)], label="a")
