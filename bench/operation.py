"""A call of an operation as a module, and who takes part in computing it."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contestants import CONTESTANTS, OURS, PEERS, Candidate, Contestant, Task, and_as_graph
from bench.layers import Layer
from evsam_kernels.backends import AUTO, BACKENDS
from evsam_kernels.cli import inspect_model
from evsam_kernels.numerics.budget import call
from evsam_kernels.numerics.cases import Operands
from evsam_kernels.ops.registry import chosen_backend, formula, layer_of, tensors_of

_MAPS = ("x", "qkv", "maps", "residual")
"""Operands that are feature maps; the other tensors are weights."""


class Operation(nn.Module):
    """An operation's formula, whose inputs are the feature maps among the operands.

    Args:
        op: name of the operation.
        operands: by the names in its schema; tensors that are no maps become parameters.
    """

    def __init__(self, op: str, operands: Operands) -> None:
        super().__init__()
        self.op = op
        self._operands: dict[str, Any] = {}
        for name, value in operands.items():
            if name in _MAPS and value is not None:
                self._operands[name] = len(value) if isinstance(value, list) else None
            elif isinstance(value, list):
                parameters = [nn.Parameter(weight, requires_grad=False) for weight in value]
                setattr(self, name, nn.ParameterList(parameters))
            elif isinstance(value, Tensor):
                setattr(self, name, nn.Parameter(value, requires_grad=False))
            else:
                setattr(self, name, value)
        self._names = tuple(operands)
        self._formula = formula(op)

    def operands(self, *maps: Tensor) -> Operands:
        """What the formula is called with, for such maps."""
        left = iter(maps)
        found: Operands = {}
        for name in self._names:
            if name in self._operands:
                count = self._operands[name]
                found[name] = next(left) if count is None else [next(left) for _ in range(count)]
            else:
                value = getattr(self, name)
                found[name] = list(value) if isinstance(value, nn.ParameterList) else value
        return found

    def forward(self, *maps: Tensor) -> Tensor:
        output: Tensor = self._formula(**self.operands(*maps))
        return output


def task(layer: Layer, batch: int, dtype: torch.dtype, device: str) -> Task:
    """The task of computing a layer, whose operands are rounded to the dtype."""
    operands = layer.operands(dtype, batch)
    maps = tensors_of([operands[name] for name in _MAPS if operands.get(name) is not None])
    module = Operation(layer.op, operands).float().eval()
    return Task(module, tuple(x.float() for x in maps), dtype, device)


def work(task: Task) -> tuple[int, int]:
    """Floating-point operations of a task, and bytes that must move: each operand and the output.

    Operations are those of matrix products and convolutions, a multiply-add being two.
    """
    module: Any = task.module
    operands = module.operands(*task.inputs)
    hollow = {
        name: [each.to("meta") for each in value]
        if isinstance(value, list)
        else value.to("meta")
        if isinstance(value, Tensor)
        else value
        for name, value in operands.items()
    }
    output = tuple(formula(module.op)(**hollow).shape)
    tensors = tensors_of(list(operands.values()))
    values = sum(tensor.numel() for tensor in tensors) + math.prod(output)
    flops = inspect_model.flops(module.op, list(operands.values()), output)
    return flops, values * task.dtype.itemsize


def _on(backend: str) -> Callable[[Task], Iterator[Candidate]]:
    """The public function, on a backend."""

    def candidates(task: Task) -> Iterator[Candidate]:
        module: Any = task.channels_last_module()
        inputs = task.channels_last_inputs()
        operands = module.operands(*inputs)
        layer = layer_of(module.op, list(operands.values())) if task.device == "cuda" else None
        name = chosen_backend(module.op, backend, task.device, task.dtype, layer)
        yield from and_as_graph(task, name, lambda: call(module.op, operands, backend))

    return candidates


def _fla(task: Task) -> Iterator[Candidate]:
    """flash-linear-attention's attention is causal; its final state is that of all tokens."""
    chunk_linear_attn = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
    (qkv,) = (x.to(task.device, task.dtype) for x in task.inputs)
    module: Any = task.module
    head_dim, eps = module.head_dim, module.eps

    def compute() -> Tensor:
        batch, channels, height, width = qkv.shape
        heads = channels // (3 * head_dim)
        tokens = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, heads, 3 * head_dim)
        q, k, v = tokens.split(head_dim, dim=-1)  # [B, T, heads, dim]
        q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
        _, state = chunk_linear_attn(
            *(q, k, v.contiguous()), scale=1.0, output_final_state=True, normalize=False
        )
        out = q.transpose(1, 2).to(state.dtype) @ state  # [B, heads, T, dim + 1]
        out = out[..., :-1] / (out[..., -1:] + eps)
        attended = out.transpose(2, 3).reshape(batch, heads * head_dim, height, width)
        return attended.to(task.dtype)

    yield from and_as_graph(task, "chunk_linear_attn, its final state", compute)


_FLA = "flash-linear-attention"
PARTICIPANTS: dict[str, Contestant] = {
    OURS: Contestant(_on(AUTO), ("evsam_kernels",)),
    **{
        f"{OURS}, {name}": Contestant(_on(name), ("evsam_kernels",), devices=("cuda",))
        for name, backend in BACKENDS.items()
        if backend.device_types == ("cuda",)
    },
    **{name: CONTESTANTS[name] for name in PEERS},
    _FLA: Contestant(_fla, ("fla",), devices=("cuda",), distribution=_FLA),
}
"""By name; "ours" is what "auto" chooses."""


def takes_part(name: str, layer: Layer, backends: tuple[str, ...]) -> bool:
    """Whether a participant has something for a layer; `backends` are those that do."""
    if name == _FLA:
        return layer.op == "relu_linear_attention"
    ours, _, backend = name.partition(", ")
    return ours != OURS or not backend or backend in backends
