"""Inference modules: BatchNorm folded into the convolutions, each forward a few operations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from evsam_kernels import ops
from evsam_kernels.nn.blocks import OpSequential
from evsam_kernels.ops.choice import Layer
from evsam_kernels.ops.recording import replayed


@overload
def _frozen(tensor: Tensor) -> nn.Parameter: ...


@overload
def _frozen(tensor: Tensor | None) -> nn.Parameter | None: ...


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None:
        return None
    # Made in inference mode, a tensor would not tell when it is changed, and kernels could not keep
    # what they make of it.
    with torch.inference_mode(False):
        own = tensor.clone() if tensor.is_inference() else tensor.detach()
        return nn.Parameter(own, requires_grad=False)


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    """As `next(module.parameters())`, which takes as long as a small kernel."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        if child is not None and (found := _first_parameter(child)) is not None:
            return found
    return None


class Folded(nn.Module):
    """Takes any floating input, computes at its own dtype and returns that.

    Its weights are parameters that do not require gradients; gradients of the input flow through.

    Attributes:
        only_launches: whether its forward does nothing but call operations.
    """

    only_launches = True

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it computes at."""
        first = _first_parameter(self)
        assert first is not None
        return first.dtype

    def enter(self, x: Tensor) -> Tensor:
        """The input at that dtype.

        Raises:
            TypeError: it is not floating.
        """
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__} takes a floating tensor, got {x.dtype}; convert it with "
                f".to(torch.{str(self.dtype).removeprefix('torch.')})"
            )
        return x.to(self.dtype)


class FoldedBlock(Folded):
    """A block after folding.

    Attributes:
        operation: name of the operation that computes it.
        backend: backend asked for; "auto" chooses at every call.
    """

    operation: str

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    @property
    def layer(self) -> Layer | None:
        """What "auto" chooses a backend by on a GPU; None: by the operation alone."""
        return None


class FoldedConv(FoldedBlock):
    """ConvLayer as one `conv_act`: `[B, C_in, H, W]` -> `[B, C_out, H', W']`."""

    operation = "conv_act"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        activation: str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(backend)
        self.weight = _frozen(weight)
        self.bias = _frozen(bias)
        self.stride = stride
        self.dilation = dilation
        self.groups = groups
        self.activation = activation

    def extra_repr(self) -> str:
        out_channels, in_channels, kernel_size, _ = self.weight.shape
        return (
            f"{in_channels * self.groups}, {out_channels}, kernel_size={kernel_size}, "
            f"stride={self.stride}, groups={self.groups}, activation={self.activation}, "
            f"backend={self.backend}"
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.conv_act(
            self.enter(x),
            self.weight,
            self.bias,
            residual,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            backend=self.backend,
        )


class FoldedConvChain(FoldedBlock):
    """Convolutions in turn, and the chain's input added to the last where `residual` is set."""

    operation = "conv_act"

    def __init__(self, convs: Sequence[FoldedConv], *, residual: bool, backend: str) -> None:
        super().__init__(backend)
        self.convs = nn.ModuleList(convs)
        self.residual = residual

    def extra_repr(self) -> str:
        return f"residual={self.residual}"

    def forward(self, x: Tensor) -> Tensor:
        y = x = self.enter(x)
        *first, last = self.convs
        for conv in first:
            y = conv(y)
        return last(y, x if self.residual else None)


class FoldedFusedMBConv(FoldedBlock):
    """FusedMBConv as one `fused_mbconv`: `[B, C_in, H, W]` -> `[B, C_out, H', W']`."""

    operation = "fused_mbconv"

    def __init__(
        self, spatial: FoldedConv, point: FoldedConv, *, residual: bool, backend: str
    ) -> None:
        super().__init__(backend)
        self.spatial_weight, self.spatial_bias = spatial.weight, spatial.bias
        self.point_weight, self.point_bias = point.weight, point.bias
        self.stride = spatial.stride
        self.activation = spatial.activation
        self.residual = residual

    def extra_repr(self) -> str:
        mid_channels, in_channels, kernel_size, _ = self.spatial_weight.shape
        return (
            f"{in_channels}, {mid_channels}, {self.point_weight.shape[0]}, "
            f"kernel_size={kernel_size}, stride={self.stride}, activation={self.activation}, "
            f"residual={self.residual}, backend={self.backend}"
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return ops.fused_mbconv(
            x,
            self.spatial_weight,
            self.spatial_bias,
            self.point_weight,
            self.point_bias,
            x if self.residual else None,
            stride=self.stride,
            activation=self.activation,
            backend=self.backend,
        )


class FoldedMBConv(FoldedBlock):
    """MBConv as one `mbconv`: `[B, C_in, H, W]` -> `[B, C_out, H', W']`."""

    operation = "mbconv"

    def __init__(
        self,
        expand: FoldedConv,
        depth: FoldedConv,
        point: FoldedConv,
        *,
        residual: bool,
        backend: str,
    ) -> None:
        super().__init__(backend)
        self.expand_weight, self.expand_bias = expand.weight, expand.bias
        self.depth_weight, self.depth_bias = depth.weight, depth.bias
        self.point_weight, self.point_bias = point.weight, point.bias
        self.stride = depth.stride
        self.activation = depth.activation
        self.residual = residual

    def extra_repr(self) -> str:
        mid_channels, in_channels = self.expand_weight.shape[:2]
        return (
            f"{in_channels}, {mid_channels}, {self.point_weight.shape[0]}, "
            f"kernel_size={self.depth_weight.shape[-1]}, stride={self.stride}, "
            f"activation={self.activation}, residual={self.residual}, backend={self.backend}"
        )

    @property
    def layer(self) -> Layer:
        return Layer.of_mbconv(self.expand_weight, self.depth_weight, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return ops.mbconv(
            x,
            self.expand_weight,
            self.expand_bias,
            self.depth_weight,
            self.depth_bias,
            self.point_weight,
            self.point_bias,
            x if self.residual else None,
            stride=self.stride,
            activation=self.activation,
            backend=self.backend,
        )


class FoldedLiteMLA(FoldedBlock):
    """LiteMLA as one `multi_scale_attention`: `[B, C_in, H, W]` -> `[B, C_out, H, W]`."""

    operation = "multi_scale_attention"

    def __init__(
        self,
        qkv: FoldedConv,
        depths: Sequence[FoldedConv],
        groups: Sequence[FoldedConv],
        proj: FoldedConv,
        *,
        head_dim: int,
        eps: float,
        residual: bool,
        backend: str,
    ) -> None:
        super().__init__(backend)
        self.qkv_weight, self.qkv_bias = qkv.weight, qkv.bias
        self.depth_weights = nn.ParameterList(conv.weight for conv in depths)
        self.group_weights = nn.ParameterList(conv.weight for conv in groups)
        # Aggregations have biases at every scale or at none.
        self.depth_biases = nn.ParameterList(c.bias for c in depths if c.bias is not None)
        self.group_biases = nn.ParameterList(c.bias for c in groups if c.bias is not None)
        self.proj_weight, self.proj_bias = proj.weight, proj.bias
        self.head_dim = head_dim
        self.eps = eps
        self.residual = residual

    def extra_repr(self) -> str:
        scales = tuple(weight.shape[-1] for weight in self.depth_weights)
        return (
            f"{self.qkv_weight.shape[1]}, {self.proj_weight.shape[0]}, head_dim={self.head_dim}, "
            f"scales={scales}, residual={self.residual}, backend={self.backend}"
        )

    @property
    def layer(self) -> Layer:
        return Layer.of_attention(self.qkv_weight, list(self.depth_weights), self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return ops.multi_scale_attention(
            x,
            self.qkv_weight,
            self.qkv_bias,
            list(self.depth_weights),
            list(self.depth_biases),
            list(self.group_weights),
            list(self.group_biases),
            self.proj_weight,
            self.proj_bias,
            x if self.residual else None,
            head_dim=self.head_dim,
            eps=self.eps,
            backend=self.backend,
        )


class FoldedLayerNorm2d(FoldedBlock):
    """LayerNorm2d as one `layer_norm_2d`: `[B, C, H, W]` -> `[B, C, H, W]`."""

    operation = "layer_norm_2d"

    def __init__(self, weight: Tensor, bias: Tensor | None, *, eps: float, backend: str) -> None:
        super().__init__(backend)
        self.weight = _frozen(weight)
        self.bias = _frozen(bias)
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, backend={self.backend}"

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm_2d(
            self.enter(x), self.weight, self.bias, eps=self.eps, backend=self.backend
        )


class FoldedEfficientViTBlock(Folded):
    """EfficientViTBlock of folded blocks: `[B, C, H, W]` -> `[B, C, H, W]`."""

    def __init__(self, context_module: FoldedBlock, local_module: FoldedBlock) -> None:
        super().__init__()
        self.context_module = context_module
        self.local_module = local_module

    def forward(self, x: Tensor) -> Tensor:
        (y,) = replayed(self, self._outputs, [self.enter(x)])
        return y

    def _outputs(self, x: Tensor) -> list[Tensor]:
        return [self.local_module(self.context_module(x))]


class FoldedSequence(OpSequential, Folded):
    """OpSequential of folded blocks, at least one: `[B, C_in, H, W]` -> `[B, C_out, H', W']`."""

    def forward(self, x: Tensor) -> Tensor:
        (y,) = replayed(self, lambda x: [OpSequential.forward(self, x)], [self.enter(x)])
        return y


class FoldedBackbone(Folded):
    """EfficientViTLargeBackbone of folded stages: `[B, 3, H, W]` -> dict of every stage's map."""

    def __init__(self, stages: Sequence[FoldedSequence], width_list: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.width_list = list(width_list)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = replayed(self, self._maps, [self.enter(x)])
        named = {f"stage{index}": map_ for index, map_ in enumerate(maps)}
        return {"input": x, **named, "stage_final": maps[-1]}

    def _maps(self, x: Tensor) -> list[Tensor]:
        return list(itertools.accumulate(self.stages, lambda x, stage: stage(x), initial=x))[1:]


class FoldedNeck(FoldedBlock):
    """SamNeck merging by one `upsample_add`: dict of maps -> the dict with the outputs added."""

    operation = "upsample_add"

    def __init__(
        self,
        inputs: dict[str, FoldedConv],
        size: tuple[int, int],
        middle: nn.Module,
        outputs: dict[str, nn.Module],
        *,
        backend: str,
    ) -> None:
        super().__init__(backend)
        self.input_keys = list(inputs)
        self.input_ops = nn.ModuleList(inputs.values())
        self.size = size
        self.middle = middle
        self.output_keys = list(outputs)
        self.output_ops = nn.ModuleList(outputs.values())

    def extra_repr(self) -> str:
        return f"size={self.size}, backend={self.backend}"

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = [self.enter(features[key]) for key in self.input_keys]
        outputs = replayed(self, self._outputs, inputs)
        return {**features, **dict(zip(self.output_keys, outputs, strict=True))}

    def _outputs(self, *inputs: Tensor) -> list[Tensor]:
        maps = [op(x) for op, x in zip(self.input_ops, inputs, strict=True)]
        x = self.middle(ops.upsample_add(maps, self.size, backend=self.backend))
        return [op(x) for op in self.output_ops]


class FoldedImageEncoder(Folded):
    """EfficientViTSamImageEncoder of folded parts: `[B, 3, S, S]` -> `[B, 256, 64, 64]`."""

    def __init__(self, backbone: FoldedBackbone, neck: FoldedNeck, norm: FoldedLayerNorm2d) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        (y,) = replayed(self, self._outputs, [self.enter(x)])
        return y

    def _outputs(self, x: Tensor) -> list[Tensor]:
        return [self.norm(self.neck(self.backbone(x))["sam_encoder"])]
