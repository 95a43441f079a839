"""One model measured: memory, what goes wrong, and what is left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sensmerge.calibration import measure, streamed
from sensmerge.calibration.measure import MeasuredModel
from sensmerge.calibration.per_sample import PIECE
from sensmerge.calibration.scores import WeightScore
from sensmerge.checkpoints.folder import ModelFolder
from sensmerge.checkpoints.source import Checkpoint, Wrapped
from sensmerge.errors import IncompatibleModelsError, NonFiniteError, RecipeError, ResourceError
from tests.calibration.families import by_parameter, loop, measured_model, samples, saved, sums_of, tiny
from tests.calibration.toys import SkipConfig, SkipForCausalLM

MODES = ("resident", "streamed")


@contextmanager
def a_device_with_room_for(model: MeasuredModel, tokens: int) -> Iterator[list[int]]:
    """A device that runs out of memory when a layer gets more tokens at once; gives the sizes that it saw."""
    seen: list[int] = []

    def allocate(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0].shape[:2].numel())
        if seen[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    handle = model.model.model.layers[0].mlp.up_proj.register_forward_pre_hook(allocate)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("memory", MODES)
def test_a_batch_that_does_not_fit_is_halved(memory: str, tmp_path: Path) -> None:
    """Until it fits; the numbers are those of large batches, and every sample is saved once."""
    measured, data = measured_model(saved(tiny("llama-tied"), tmp_path), memory), samples((9, 20, 12, 12, 20))
    whole = sums_of(measured, data)
    with a_device_with_room_for(measured, 24) as seen:
        halved = sums_of(measured, data)
    assert max(seen) > 24
    assert 20 in seen, "the longest sample, alone"
    for ours, theirs in zip(halved, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("memory", MODES)
def test_hidden_states_in_smaller_batches(memory: str, tmp_path: Path) -> None:
    """Each sample's, without padding, are the same."""
    data = samples((9, 20, 12))

    def hidden(tokens: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        measured = measured_model(saved(tiny("llama"), tmp_path), memory)
        with measured.held(), a_device_with_room_for(measured, tokens):
            measured.hidden(data, places=[0, 1, 2], keep=found.__setitem__, task="x")
        return found

    large, small = hidden(1000), hidden(20)
    assert [len(large[at]) for at in range(3)] == [9, 20, 12]
    for at in range(3):
        torch.testing.assert_close(small[at], large[at], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory", MODES)
def test_a_single_sample_that_does_not_fit(memory: str, tmp_path: Path) -> None:
    measured = measured_model(saved(tiny("llama"), tmp_path), memory)
    with a_device_with_room_for(measured, 10), pytest.raises(ResourceError) as caught:
        sums_of(measured, samples((9, 20)))
    assert caught.value.exit_code == 6
    assert "expert" in caught.value.where
    assert "max_length" in caught.value.fix
    assert ("--memory streamed" in caught.value.fix) is (memory == "resident")


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    measured = measured_model(saved(tiny("llama"), tmp_path))

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    measured.model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        sums_of(measured, samples())


class Largest(TorchDispatchMode):
    """The largest tensor that is made anew: results that share memory with an input are none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage().data_ptr()
            for each in tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor) and not each.is_meta
        }
        for each in tree_leaves(output):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, each.numel())
        return output


def test_no_gradient_of_a_large_layer_exists_whole(tmp_path: Path) -> None:
    """Everything that a pass makes is watched: nothing is larger than a piece. Plain autograd makes the gradient whole."""
    changes = {"hidden_size": 64, "intermediate_size": 8192, "num_hidden_layers": 1}
    model, data = tiny("llama", **changes), samples((6, 8))
    measured = measured_model(saved(model, tmp_path))
    weight = measured.model.model.layers[0].mlp.up_proj.weight.numel()
    assert weight > 1.5 * PIECE
    with measured.held(), Largest() as ours:
        measured.sums(data, WeightScore(), places=[0, 1], save=lambda *_: None)
    assert 0 < ours.elements <= PIECE
    with Largest() as plain:
        loop(model, data)
    assert plain.elements >= weight


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_streamed_one_block_is_in_memory_at_a_time(family: str, tmp_path: Path) -> None:
    """Counted whenever a block runs; the head is not there then, nor are the embeddings."""
    measured = measured_model(saved(tiny(family, num_hidden_layers=4), tmp_path), "streamed")
    layers, alive = measured.model.model.layers, list[tuple[int, bool]]()

    def count(*_: Any) -> None:
        loaded = sum(not layer.mlp.up_proj.weight.is_meta for layer in layers)
        alive.append((loaded, measured.model.get_output_embeddings().weight.is_meta))

    for layer in layers:
        layer.mlp.up_proj.register_forward_pre_hook(count)
    sums_of(measured, samples())
    assert len(alive) == 8, "every block once forward, once again for its backward pass"
    assert set(alive) == {(1, True)}


@pytest.mark.parametrize("limit", [0, 2000])
def test_activations_in_a_scratch_file_change_nothing(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, data = measured_model(saved(tiny("llama"), tmp_path), "streamed"), samples()
    in_memory = sums_of(measured, data)
    monkeypatch.setattr(streamed.Activations.__init__, "__defaults__", (None, limit))
    assert sums_of(measured, data) == in_memory


@pytest.mark.parametrize("tokens", [1, 20])
def test_rounds_of_a_streamed_model_change_nothing(
    tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is saved after each round: an interruption loses no more."""
    measured, data = measured_model(saved(tiny("llama"), tmp_path), "streamed"), samples()
    whole = sums_of(measured, data)
    monkeypatch.setattr(measure, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(measure, "ROUND_TOKENS", tokens)
    saves: list[int] = []
    again = measured_model(measured.checkpoint, "streamed")  # type: ignore[arg-type]
    found: dict[int, Any] = {}
    again.sums(data, WeightScore(), places=[0, 1, 2], save=lambda new, _: (saves.append(len(new)), found.update(new)))
    assert saves == ([1, 1, 1] if tokens == 1 else [2, 1])
    for at in range(3):
        assert found[at] == pytest.approx(whole[at], rel=1e-4)


class Counting(Wrapped):
    """A checkpoint that counts the elements that are read of each tensor."""

    def __init__(self, inner: Checkpoint) -> None:
        super().__init__(inner)
        self.elements: dict[str, int] = {}

    def read(self, name: str, start: int, count: int) -> Any:
        self.elements[name] = self.elements.get(name, 0) + count
        return super().read(name, start, count)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_resident_model_is_read_once(family: str, tmp_path: Path) -> None:
    """For its own sums, hidden states and other tasks: every weight once."""
    counting = Counting(saved(tiny(family), tmp_path))
    measured = MeasuredModel(counting, label="x", device="cpu", memory="resident")
    with measured.held():
        measured.sums(samples(), WeightScore(), places=[0, 1, 2], save=lambda *_: None, keep=lambda *_: None)
        measured.hidden(samples(seed=1), places=[0, 1, 2], keep=lambda *_: None, task="y")
    assert counting.elements == {name: spec.elements for name, spec in counting.tensors.items()}


@pytest.mark.parametrize("memory", MODES)
def test_hidden_states_of_the_sums_pass_are_those_of_a_forward_pass(memory: str, tmp_path: Path) -> None:
    """A model's forward on its own task is shared with its sensitivity."""
    measured, data = measured_model(saved(tiny("gemma2"), tmp_path), memory), samples()
    shared: dict[int, torch.Tensor] = {}
    alone: dict[int, torch.Tensor] = {}
    with measured.held():
        places = [0, 1, 2]
        measured.sums(data, WeightScore(), places=places, save=lambda *_: None, keep=shared.__setitem__)
        measured.hidden(data, places=places, keep=alone.__setitem__, task="x")
    for at in places:
        torch.testing.assert_close(shared[at], alone[at], rtol=1e-5, atol=1e-5)
        assert not shared[at].requires_grad


@pytest.mark.parametrize("memory", MODES)
def test_nothing_is_left_behind(memory: str, tmp_path: Path) -> None:
    """No gradient, no hook, no weight: also after a failure in the middle."""
    measured = measured_model(saved(tiny("llama"), tmp_path), memory)

    class Failing:
        def of(self, name: str, *_: Any) -> torch.Tensor:
            if "layers.1" in name:
                raise KeyboardInterrupt
            return torch.zeros(())

    with pytest.raises(KeyboardInterrupt):
        sums_of(measured, samples(), Failing())
    sums_of(measured, samples())
    for module in measured.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
        for parameter in module.parameters(recurse=False):
            assert parameter.is_meta
            assert parameter.grad is None


def damaged(model: Any, name: str, value: float, folder: Path) -> tuple[ModelFolder, list[int]]:
    weight = model.get_parameter(name)
    place = [min(2, size - 1) for size in weight.shape]
    with torch.no_grad():
        weight[tuple(place)] = value
    return saved(model, folder), place


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"],
)
def test_a_weight_that_is_not_finite_is_named(name: str, value: float, memory: str, tmp_path: Path) -> None:
    """The tensor and the place in it, exit code 8; also a row of the embedding that no sample has."""
    checkpoint, place = damaged(tiny("llama"), name, value, tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        sums_of(measured_model(checkpoint, memory), samples())
    assert caught.value.exit_code == 8
    assert name in caught.value.where
    assert str(place) in caught.value.where


@pytest.mark.parametrize("memory", MODES)
def test_an_overflow_without_a_bad_weight_names_the_sample(memory: str, tmp_path: Path) -> None:
    """All weights finite, a gradient is not: the sample's row is told, and no sums are saved."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    saves: list[Any] = []
    measured = measured_model(saved(model, tmp_path), memory)
    with measured.held(), pytest.raises(NonFiniteError) as caught:
        measured.sums(samples((9,)), WeightScore(), places=[0], save=lambda new, _: saves.append(new))
    assert "sample 10" in caught.value.where
    assert "expert" in caught.value.where
    assert saves == []


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    checkpoint = saved(tiny("llama"), tmp_path)
    with pytest.raises(RecipeError) as caught:
        measured_model(checkpoint, "virtual")
    assert "streamed" in caught.value.why


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_a_model_that_does_not_fit_is_streamed(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, the engine streams a model whose weights would take more than a share of the free memory."""
    monkeypatch.setattr("sensmerge.calibration.memory.SHARE", share)
    assert measured_model(saved(tiny("llama"), tmp_path), "auto").streamed is (share == 0.0)


def test_blocks_that_get_more_than_their_input_are_not_streamed(tmp_path: Path) -> None:
    """A gradient would be lost. Refused by name before anything is computed; held whole, it is exact."""
    torch.manual_seed(0)
    model = SkipForCausalLM(SkipConfig())
    checkpoint, data = saved(model, tmp_path), samples()
    in_blocks: list[Any] = []
    streaming = measured_model(checkpoint, "streamed")
    streaming.model.layers[0].up.register_forward_hook(lambda *_: in_blocks.append(1))
    with pytest.raises(IncompatibleModelsError) as caught:
        sums_of(streaming, data)
    assert in_blocks == []
    assert "SkipForCausalLM" in str(caught.value)
    assert SkipConfig.model_type in caught.value.where
    assert "--memory resident" in caught.value.fix
    measured = measured_model(checkpoint, "resident")
    for ours, theirs in zip(sums_of(measured, data), loop(model, data), strict=True):
        assert by_parameter(measured, ours) == pytest.approx(theirs, rel=1e-4)
