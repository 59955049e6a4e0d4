"""The layers of every variant: how its image encoder calls each operation, kept in layers.json.

`python -m bench.layers` writes the file anew from the models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import evsam_kernels
from evsam_kernels.numerics.budget import named_tensors
from evsam_kernels.numerics.cases import Case, Operands
from evsam_kernels.ops.registry import NAMESPACE, OPERATIONS
from evsam_kernels.sam.zoo import VARIANTS, create_efficientvit_sam_model

FILE = Path(__file__).with_suffix(".json")


@dataclass
class Layer:
    """One way in which encoders call an operation.

    Attributes:
        op: name of the operation.
        name: channels, size and what else tells it from the operation's other layers.
        settings: of the operation's builder in `evsam_kernels.numerics.cases`, less the batch.
        count: calls per encoder forward, by variant.
    """

    op: str
    name: str
    settings: dict[str, Any]
    count: dict[str, int]

    def operands(self, dtype: torch.dtype, batch: int = 1) -> Operands:
        """Operands with values that follow from the layer's name."""
        case = Case(self.op, self.name, {**self.settings, "batch": batch})
        return case.operands(dtype, "cpu")


def load() -> list[Layer]:
    """The layers in the file."""
    return [Layer(**entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))]


def values_of(layer: Layer) -> int:
    """How many values the operands of a layer have, for one picture."""
    return sum(tensor.numel() for tensor in named_tensors(layer.operands(torch.float32)).values())


def from_models() -> list[Layer]:
    """The layers of the models, which are built without weights and compute nothing."""
    found: dict[tuple[str, str], Layer] = {}
    for variant in VARIANTS:
        for op, operands in calls(variant):
            settings = _SETTINGS[op](**operands)
            layer = found.setdefault(
                (op, json.dumps(settings)), Layer(op, _name(op, settings), settings, {})
            )
            layer.count[variant] = layer.count.get(variant, 0) + 1
    return sorted(found.values(), key=lambda layer: OPERATIONS.index(layer.op))


def save(layers: list[Layer]) -> None:
    """Write the file, a layer a line."""
    lines = ",\n".join(json.dumps(asdict(layer)) for layer in layers)
    FILE.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


class _Recorder(TorchDispatchMode):
    """Notes the operations of the package that are called, with their operands by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Operands]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == NAMESPACE:
            *names, _ = [argument.name for argument in func._schema.arguments]
            *operands, _ = args  # The last is the backend.
            op = func._schema.name.removeprefix(f"{NAMESPACE}::")
            self.calls.append((op, dict(zip(names, operands, strict=True))))
        return func(*args, **(kwargs or {}))


def calls(variant: str) -> list[tuple[str, Operands]]:
    """Every call of an operation by the fused encoder: its name and operands, on "meta".

    `relu_linear_attention` is called by the encoder that is not fused alone, so those calls are
    that one's.
    """
    side = VARIANTS[variant].image_size
    with torch.device("meta"):
        encoder = create_efficientvit_sam_model(variant, pretrained=False).image_encoder
        picture = torch.empty(1, 3, side, side)

    def recorded(module: nn.Module) -> list[tuple[str, Operands]]:
        with torch.no_grad(), _Recorder() as recorder:
            module(picture)
        return recorder.calls

    alone = [call for call in recorded(encoder) if call[0] == "relu_linear_attention"]
    return recorded(evsam_kernels.fuse(encoder)) + alone


def _size(x: Tensor) -> list[int]:
    return list(x.shape[2:])


def _conv_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, **others: Any
) -> dict[str, Any]:
    return {
        "channels": [x.shape[1], weight.shape[0]],
        "size": _size(x),
        "kernel": weight.shape[2],
        "stride": others["stride"],
        "dilation": others["dilation"],
        "groups": others["groups"],
        "activation": others["activation"],
        "bias": bias is not None,
        "residual": residual is not None,
    }


def _fused_mbconv(x: Tensor, spatial_weight: Tensor, **others: Any) -> dict[str, Any]:
    return {
        "channels": [x.shape[1], spatial_weight.shape[0], others["point_weight"].shape[0]],
        "size": _size(x),
        "kernel": spatial_weight.shape[2],
        "stride": others["stride"],
        "activation": others["activation"],
        "bias": [others[f"{conv}_bias"] is not None for conv in ("spatial", "point")],
        "residual": others["residual"] is not None,
    }


def _mbconv(x: Tensor, depth_weight: Tensor, **others: Any) -> dict[str, Any]:
    return {
        "channels": [x.shape[1], depth_weight.shape[0], others["point_weight"].shape[0]],
        "size": _size(x),
        "kernel": depth_weight.shape[2],
        "stride": others["stride"],
        "activation": others["activation"],
        "bias": [others[f"{conv}_bias"] is not None for conv in ("expand", "depth", "point")],
        "residual": others["residual"] is not None,
    }


def _relu_linear_attention(qkv: Tensor, head_dim: int, eps: float, **others: Any) -> dict[str, Any]:
    return {
        "heads": qkv.shape[1] // (3 * head_dim),
        "head_dim": head_dim,
        "size": _size(qkv),
        "eps": eps,
    }


def _multi_scale_attention(x: Tensor, qkv_weight: Tensor, **others: Any) -> dict[str, Any]:
    return {
        "channels": [x.shape[1], others["proj_weight"].shape[0]],
        "heads": qkv_weight.shape[0] // (3 * others["head_dim"]),
        "head_dim": others["head_dim"],
        "scales": [weight.shape[2] for weight in others["depth_weights"]],
        "size": _size(x),
        "bias": [others[f"{conv}_bias"] is not None for conv in ("qkv", "proj")],
        "scale_bias": bool(others["depth_biases"]),
        "residual": others["residual"] is not None,
        "eps": others["eps"],
    }


def _layer_norm_2d(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> dict[str, Any]:
    return {
        "channels": x.shape[1],
        "size": _size(x),
        "weight": weight is not None,
        "bias": bias is not None,
        "eps": eps,
    }


def _upsample_add(maps: list[Tensor], height: int, width: int) -> dict[str, Any]:
    return {
        "channels": maps[0].shape[1],
        "inputs": [_size(x) for x in maps],
        "size": [height, width],
    }


_SETTINGS: dict[str, Callable[..., dict[str, Any]]] = {
    "conv_act": _conv_act,
    "fused_mbconv": _fused_mbconv,
    "mbconv": _mbconv,
    "relu_linear_attention": _relu_linear_attention,
    "multi_scale_attention": _multi_scale_attention,
    "layer_norm_2d": _layer_norm_2d,
    "upsample_add": _upsample_add,
}
"""The settings that give operands of the same shapes, from the operands of a call."""


def _name(op: str, settings: dict[str, Any]) -> str:
    """Such as "32->512->64 256x256 stride 2"."""
    channels = settings.get("channels") or settings["heads"] * settings["head_dim"]
    widths = channels if isinstance(channels, list) else [channels]
    parts = [
        "->".join(map(str, widths)),
        "+".join(f"{h}x{w}" for h, w in settings.get("inputs", [settings["size"]])),
    ]
    if settings.get("kernel") == 1:
        parts.append("pointwise")
    if settings.get("stride", 1) > 1:
        parts.append(f"stride {settings['stride']}")
    return " ".join([*parts, *(["residual"] if settings.get("residual") else [])])


if __name__ == "__main__":
    save(from_models())
    print(f"-> {FILE}")
