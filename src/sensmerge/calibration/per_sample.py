"""Per-sample sums over every parameter, |θ·g_k| or the like, from one batched backward pass, exactly.

The gradient of a batch's loss is the sum of its samples' gradients, and |Σ_k g_k| is not Σ_k |g_k|: each sample's own gradient has
to be formed. For a linear layer that of sample k is the product of its output gradients and its inputs, G_kᵀ X_k. Parameters are
frozen, so that autograd passes gradients through the layers but forms none of weights; a hook on every layer's output forms one
sample's, some rows at a time, reduces them to one number and drops them. The products are those a plain backward pass forms, in
other pieces. After Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, which needs squares only.

Layers without a rule (fused experts, state-space mixers) keep their gradients: a batch then holds one sample, and autograd's own
gradient is reduced the moment it is finished.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import Batch
from .naming import Names, Stored

# Elements of a gradient that are formed at once: what a core's cache holds.
PIECE = 1 << 18


class Score(Protocol):
    """What is summed over the elements of a parameter."""

    def of(self, name: str, weight: Tensor, gradient: Tensor, first: int) -> Tensor:
        """The sum over `gradient`, float32 rows of parameter `name` from row `first` on; `weight` are those rows. A scalar.

        `gradient` may be overwritten.
        """


class Unbatchable(Exception):
    """A layer that was thought to handle samples side by side does not: it is `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(type(module).__name__)
        self.module = module


class Sums:
    """What one batch adds up: for each tensor of the checkpoint one number a sample, float64 [S]."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.by_name: dict[str, Tensor] = {}
        # The rows of a tied head's gradient that the embedding has too, by sample; see Recorder._embedding.
        self.tied: dict[int, Tensor] = {}

    def add(self, name: str, sample: int, value: Tensor) -> None:
        """Add to a tensor's sum for one sample."""
        if name not in self.by_name:
            self.by_name[name] = torch.zeros(len(self.batch.lengths), dtype=torch.float64, device=value.device)
        self.by_name[name][sample] += value


Rule = Callable[[Any, Sums, Tensor, Tensor], None]


def _rows_at_once(columns: int) -> int:
    return max(1, PIECE // max(columns, 1))


class Recorder:
    """Per-sample sums of one model: made once, used for many batches; the model's parameters are frozen.

    `names` says where each parameter lies in the checkpoint, `score` what is summed. Weights may be replaced between passes, so
    that a model can be measured block by block.
    """

    def __init__(self, model: Any, names: Names, score: Score) -> None:
        self._score = score
        self._uses = _uses(model)
        stored = {parameter: names[name] for name, parameter in model.named_parameters()}
        self._stored = {
            module: {attribute: stored[parameter] for attribute, parameter in module.named_parameters(recurse=False)}
            for module in model.modules()
        }
        head = model.get_output_embeddings()
        self._head = head if isinstance(head, nn.Linear) else None
        self._tied = {
            module
            for module in model.modules()
            if any(self._uses[parameter] > 1 for parameter in module.parameters(recurse=False))
        }
        self._rules: dict[nn.Module, Rule | None] = {
            module: self._rule(module)
            for module in model.modules()
            if any(True for _ in module.parameters(recurse=False))
        }
        self._seen: set[nn.Module] = set()
        for module in self._rules:
            self.freeze(module)

    @property
    def batched(self) -> bool:
        """Whether every layer has a rule for samples side by side; else a batch holds one."""
        return all(rule is not None for rule in self._rules.values())

    @property
    def paths(self) -> dict[str, int]:
        """How many modules with parameters are measured in batches, and how many a sample at a time."""
        loop = sum(rule is None for rule in self._rules.values())
        return {"batched": len(self._rules) - loop, "loop": loop}

    def demote(self, module: nn.Module) -> None:
        """Measure `module` a sample at a time from now on."""
        self._rules[module] = None
        self.freeze(module)

    def freeze(self, module: nn.Module) -> None:
        """Let autograd form gradients of the module's own weights only where it has no rule."""
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(self._rules[module] is None)

    @contextmanager
    def recording(self, part: nn.Module, sums: Sums) -> Iterator[None]:
        """While open, a forward and a backward pass through `part` of the model add to `sums`.

        Raises Unbatchable in the forward pass where a layer mixes samples.
        """
        self._seen.clear()
        hooks: list[Any] = []
        for module in part.modules():
            if module not in self._rules:
                continue
            rule = self._rules[module]
            if rule is not None:
                hooks.append(module.register_forward_hook(self._watch(rule, sums)))
                continue
            for attribute, parameter in module.named_parameters(recurse=False):
                stored = self._stored[module][attribute]
                hooks.append(parameter.register_post_accumulate_grad_hook(self._finished(sums, stored)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def check_all_seen(self, part: nn.Module) -> None:
        """After a forward pass: raises Unbatchable for a layer whose weights were perhaps used without calling it."""
        for module in part.modules():
            if self._rules.get(module) is not None and module not in self._seen:
                raise Unbatchable(module)

    def _finished(self, sums: Sums, stored: Sequence[Stored]) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for each in stored:
                self._reduce(sums, each.name, 0, parameter.detach()[each.part], parameter.grad[each.part])
            parameter.grad = None

        return hook

    def _watch(self, rule: Rule, sums: Sums) -> Callable[..., None]:
        samples = len(sums.batch.lengths)

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            alone = len(inputs) == 1 and isinstance(output, Tensor)
            if module in self._seen or not alone or (samples > 1 and inputs[0].shape[0] != samples):
                raise Unbatchable(module)
            self._seen.add(module)
            if not output.requires_grad:
                output.requires_grad_(True)
            kept = inputs[0].detach()
            output.register_hook(lambda gradient: rule(module, sums, kept, gradient))

        return hook

    def _rule(self, module: nn.Module) -> Rule | None:
        tied = module in self._tied
        if is_linear(module) and (not tied or module is self._head):
            return self._linear
        if isinstance(module, nn.Embedding) and (not tied or self._head is not None):
            return self._embedding if type(module).forward is nn.Embedding.forward or _scale(module) != 1.0 else None
        if not tied and _is_norm(module):
            return self._norm
        return None

    def _name(self, module: nn.Module, attribute: str) -> str:
        return self._stored[module][attribute][0].name

    def _reduce(self, sums: Sums, name: str, sample: int, weight: Tensor, gradient: Tensor) -> None:
        """Add the sum over a gradient that exists as a whole, some rows at a time."""
        rows = gradient.reshape(gradient.shape[0] if gradient.dim() > 1 else 1, -1)
        weights, step = weight.reshape(rows.shape), _rows_at_once(rows.shape[1])
        for first in range(0, len(rows), step):
            part = rows[first : first + step].float()
            sums.add(name, sample, self._score.of(name, weights[first : first + step], part, first))

    def _samples(
        self, sums: Sums, module: Any, inputs: Tensor, gradient: Tensor
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Inputs and output gradients of each sample, float32 [positions, features]: those that can have a gradient."""
        batch = sums.batch
        for sample, length in enumerate(batch.lengths):
            if len(batch.lengths) == 1:
                x, g = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            else:
                x, g = inputs[sample, :length], gradient[sample, :length]
                x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            if module is self._head:
                x, g = x[batch.predicting[sample]], g[batch.predicting[sample]]
            yield sample, x.float(), g.float()

    def _linear(self, module: Any, sums: Sums, inputs: Tensor, gradient: Tensor) -> None:
        weight, name = module.weight.detach(), self._name(module, "weight")
        step = _rows_at_once(weight.shape[1])
        for sample, x, g in self._samples(sums, module, inputs, gradient):
            if module.bias is not None:
                self._reduce(sums, self._name(module, "bias"), sample, module.bias.detach(), g.sum(0))
            if module in self._tied:
                rows = sums.batch.ids[sample, : sums.batch.lengths[sample]].unique()
                sums.tied[sample] = g.t()[rows] @ x
            left, right = (g, x) if isinstance(module, nn.Linear) else (x, g)
            turned = left.t().contiguous()
            for first in range(0, len(weight), step):
                part = turned[first : first + step] @ right
                sums.add(name, sample, self._score.of(name, weight[first : first + step], part, first))

    def _embedding(self, module: Any, sums: Sums, inputs: Tensor, gradient: Tensor) -> None:
        name, values, factor = self._name(module, "weight"), module.weight.detach(), _scale(module)
        for sample, length in enumerate(sums.batch.lengths):
            rows, place = inputs[sample, :length].unique(return_inverse=True)
            own = torch.zeros(len(rows), values.shape[1], device=values.device)
            own.index_add_(0, place, gradient[sample, :length].float() * factor)
            if module.padding_idx is not None:
                own[rows == module.padding_idx] = 0
            # A tied head has counted these rows with its own gradient alone, and |a + b| is not |a| + |b|.
            alone = sums.tied.pop(sample) if module in self._tied else None
            for at, row in enumerate(rows.tolist()):
                weight, part = values[row : row + 1], own[at : at + 1]
                if alone is None:
                    sums.add(name, sample, self._score.of(name, weight, part, row))
                else:
                    before = self._score.of(name, weight, alone[at : at + 1].clone(), row)
                    sums.add(name, sample, self._score.of(name, weight, part + alone[at : at + 1], row) - before)

    def _norm(self, module: Any, sums: Sums, inputs: Tensor, gradient: Tensor) -> None:
        g = gradient.float()
        terms = {"weight": _normalised(module, inputs) * g}
        if getattr(module, "bias", None) is not None:
            terms["bias"] = g
        for attribute, term in terms.items():
            summed = term.reshape(len(sums.batch.lengths), -1, term.shape[-1]).sum(1)
            weight = getattr(module, attribute).detach()
            for sample, row in enumerate(summed):
                self._reduce(sums, self._name(module, attribute), sample, weight, row)


def is_linear(module: nn.Module) -> bool:
    """Whether the module is x·Wᵀ + b, or transformers' Conv1D, which stores W the other way round."""
    linear = isinstance(module, nn.Linear) and type(module).__name__ in ("Linear", "FalconLinear")
    return linear or type(module).__name__ == "Conv1D"


def _scale(module: Any) -> float:
    """What an embedding multiplies its rows with (Gemma's does)."""
    scale = getattr(module, "embed_scale", 1.0)
    return float(scale)


def _normalised(module: Any, inputs: Tensor) -> Tensor:
    """x̂, float32, of a norm that gives f(weight)·x̂ (+ bias), f(weight) = weight or 1 + weight: its output at 1 less that at 0."""
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs.float(), module.normalized_shape, None, None, module.eps)
    bare = copy.copy(module)
    bare._forward_hooks = {}
    outputs = []
    with torch.no_grad():
        for value in (1.0, 0.0):
            bare._parameters = {"weight": torch.full_like(module.weight, value)}
            outputs.append(bare(inputs).float())
    return outputs[0] - outputs[1]


def _uses(model: Any) -> dict[Tensor, int]:
    """How many modules hold each parameter."""
    count: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            count[parameter] = count.get(parameter, 0) + 1
    return count


def _is_norm(module: nn.Module) -> bool:
    """Whether the module scales its normalised input: a LayerNorm, or one weight of one dimension in a class called …RMSNorm."""
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    own = dict(module.named_parameters(recurse=False))
    return type(module).__name__.endswith("RMSNorm") and list(own) == ["weight"] and own["weight"].dim() == 1
