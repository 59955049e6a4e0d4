"""`fuse()`: swaps the blocks of EfficientViT-SAM for folded ones, whoever wrote the model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from evsam_kernels.nn.folded import (
    FoldedBackbone,
    FoldedBlock,
    FoldedConv,
    FoldedConvChain,
    FoldedEfficientViTBlock,
    FoldedFusedMBConv,
    FoldedImageEncoder,
    FoldedLayerNorm2d,
    FoldedLiteMLA,
    FoldedMBConv,
    FoldedNeck,
    FoldedSequence,
)
from evsam_kernels.ops.checks import FLOATING_DTYPES
from evsam_kernels.ops.recording import only_launches
from evsam_kernels.ops.registry import chosen_backend, has_kernel
from evsam_kernels.sam.mask_decoder import MaskDecoder, TwoWayTransformer
from evsam_kernels.sam.shared_decoder import HEAD_DIM, SharedMaskDecoder

__all__ = ["FusionReport", "LeftBlock", "SwappedBlock", "fuse"]


@dataclass(frozen=True)
class SwappedBlock:
    """A block that was swapped.

    Attributes:
        path: its name in the model; "" for the model itself.
        block: class of the block that was there.
        operation: the operation that computes it now.
        backend: what runs that operation on the block's device.
    """

    path: str
    block: str
    operation: str
    backend: str


@dataclass(frozen=True)
class LeftBlock:
    """A module with parameters that was left as it is.

    Attributes:
        path: its name in the model; "" for the model itself.
        block: its class.
        reason: why it was left.
    """

    path: str
    block: str
    reason: str


@dataclass
class FusionReport:
    """What `fuse()` swapped and what it left, in the order of the model; `str()` gives a table."""

    swapped: list[SwappedBlock] = field(default_factory=list)
    left: list[LeftBlock] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)} blocks, left {len(self.left)} modules"]
        width = max((len(entry.path) for entry in self.swapped), default=0)
        lines += [
            f"  {entry.path:{width}}  {entry.block} -> {entry.operation} on {entry.backend}"
            for entry in self.swapped
        ]
        # A model has many a module that is no block: one line per part of the model and reason.
        counts: dict[tuple[str, str], Counter[str]] = {}
        for entry in self.left:
            part = entry.path.split(".")[0]
            counts.setdefault((part, entry.reason), Counter())[entry.block] += 1
        for (part, reason), blocks in counts.items():
            named = ", ".join(f"{count} {block}" for block, count in blocks.items())
            lines.append(f"  {part or 'the module itself'}: left {named}: {reason}")
        return "\n".join(lines)


def fuse(
    module: nn.Module,
    *,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Swap every block that is recognised for an inference module with BatchNorm folded in.

    Blocks are recognised by class name and attributes, not by base class, so that models written
    by others with the structure of the `efficientvit` package are fused too: ConvLayer, DSConv,
    MBConv, FusedMBConv, ResBlock, LiteMLA, LayerNorm2d, ResidualBlock round any of these, SamNeck
    and MaskDecoder. BatchNorm is folded in float64. Modules that are not recognised keep their
    class, dtype and behaviour; where `dtype` differs from theirs, what reaches them is converted.

    Args:
        module: a model or block in eval mode.
        backend: "auto", or the backend every swapped block must run on.
        dtype: the dtype the swapped blocks compute at and return; each block's own where not given.
        inplace: change `module` itself and leave it unusable for training. The result must be used
            even so: a module that is itself a block is replaced, not changed.

    Returns:
        The fused module, with a `FusionReport` as its attribute `fusion_report`. Fusing it again
        with the same settings changes nothing.

    Raises:
        TypeError: `module` is no `nn.Module`, or `dtype` is no floating dtype.
        ValueError: the module is in training mode or already fused with other settings, or the
            backend is unknown.
        evsam_kernels.BackendUnavailableError: the named backend cannot run a block here.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if dtype is not None and dtype not in FLOATING_DTYPES:
        raise TypeError(f"dtype must be None, {', '.join(map(str, FLOATING_DTYPES))}, got {dtype}")
    for path, submodule in module.named_modules():
        if submodule.training:
            raise ValueError(
                f"module must be in eval mode, but {path or 'it'} is in training mode; "
                f"call module.eval() first"
            )
    fuser = _Fuser(backend, dtype, inplace)
    fused = fuser.fused(module, "")
    if dtype is not None:
        _convert_inputs_of_left_modules(fused, dtype)
    fused.fusion_report = fuser.report  # type: ignore[assignment]
    return fused


class _NotFoldable(Exception):
    """A block cannot be folded; the message is the reason for the report."""


class _Fuser:
    """One run of `fuse()`."""

    def __init__(self, backend: str, dtype: torch.dtype | None, inplace: bool) -> None:
        self.backend = backend
        self.dtype = dtype
        self.inplace = inplace
        self.report = FusionReport()
        # For deepcopy: what already stands for an original. Keeps shared modules shared.
        self.copies: dict[int, Any] = {}

    def fused(self, module: nn.Module, path: str) -> nn.Module:
        """The module that takes the place of `module`."""
        if id(module) in self.copies:
            return self.copies[id(module)]
        if isinstance(module, FoldedBlock):
            result: nn.Module | None = self._already_fused(module, path)
        else:
            result = self._folded_block(module, path)
        if result is None:
            for name, child in module.named_children():
                replacement = self.fused(child, _join(path, name))
                if self.inplace:
                    setattr(module, name, replacement)
            result = module if self.inplace else copy.deepcopy(module, self.copies)
            result = _container(type(module).__name__, result)
        self.copies[id(module)] = result
        return result

    def _folded_block(self, module: nn.Module, path: str) -> nn.Module | None:
        """The folded form of a block, or None for what has to be looked into."""
        name = type(module).__name__
        owns_parameters = any(True for _ in module.parameters(recurse=False))
        if name not in _FOLDS:
            if owns_parameters:
                self.report.left.append(LeftBlock(path, name, "not a block that fuse() knows"))
            return None
        entry = len(self.report.swapped)  # Before those of the blocks inside.
        try:
            _refuse_hooks(module)
            folded = _FOLDS[name](self, module, path)
        except _NotFoldable as error:
            self.report.left.append(LeftBlock(path, name, str(error)))
            return None
        dtype = folded.dtype if self.dtype is None else self.dtype
        device = next(folded.parameters()).device.type
        chosen = chosen_backend(folded.operation, self.backend, device, dtype, folded.layer)
        self.report.swapped.insert(entry, SwappedBlock(path, name, folded.operation, chosen))
        return folded.eval()

    def _already_fused(self, block: FoldedBlock, path: str) -> nn.Module:
        if block.backend != self.backend or self.dtype not in (None, block.dtype):
            raise ValueError(
                f"{path or 'the module'} is already fused, with backend={block.backend!r} and "
                f"dtype={block.dtype}; fuse the original model with the new settings"
            )
        return block if self.inplace else copy.deepcopy(block, self.copies)

    def conv(self, conv: nn.Module, norm: Any = None, act: Any = None) -> FoldedConv:
        """Convolution, norm and activation as one module."""
        if not isinstance(conv, nn.Conv2d):
            raise _NotFoldable(f"its convolution is a {type(conv).__name__}")
        kernel_size, dilation = conv.kernel_size[0], conv.dilation[0]
        same = (kernel_size // 2 * dilation,) * 2
        padding = same if conv.padding == "same" else conv.padding
        if (
            kernel_size % 2 == 0
            or conv.kernel_size != (kernel_size,) * 2
            or conv.dilation != (dilation,) * 2
            or conv.stride != (conv.stride[0],) * 2
            or padding != same
            or conv.padding_mode != "zeros"
        ):
            raise _NotFoldable(
                f"its convolution is not odd and square with padding kernel_size // 2: {conv}"
            )
        weight, bias = _fold_norm(conv, norm)
        dtype = self.dtype or conv.weight.dtype
        return FoldedConv(
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            stride=conv.stride[0],
            dilation=dilation,
            groups=conv.groups,
            activation=_activation_name(act),
            backend=self.backend,
        )

    def conv_layer(self, layer: nn.Module) -> FoldedConv:
        """A ConvLayer as one module; dropout does nothing in eval mode."""
        return self.conv(*_attributes(layer, "conv", "norm", "act"))

    def chain(self, convs: list[FoldedConv], residual: bool) -> FoldedBlock:
        """Convolutions in turn; a single one needs no chain unless it has a residual."""
        if len(convs) == 1 and not residual:
            return convs[0]
        return FoldedConvChain(convs, residual=residual, backend=self.backend)


def _fold_conv_layer(fuser: _Fuser, block: nn.Module, path: str, residual: bool) -> FoldedBlock:
    return fuser.chain([fuser.conv_layer(block)], residual)


def _fold_two_convs(*names: str) -> Callable[..., FoldedBlock]:
    def fold(fuser: _Fuser, block: nn.Module, path: str, residual: bool) -> FoldedBlock:
        layers = _attributes(block, *names)
        return fuser.chain([fuser.conv_layer(layer) for layer in layers], residual)

    return fold


def _fold_fused_mbconv(fuser: _Fuser, block: nn.Module, path: str, residual: bool) -> FoldedBlock:
    layers = _attributes(block, "spatial_conv", "point_conv")
    spatial, point = convs = [fuser.conv_layer(layer) for layer in layers]
    if _is_plain(spatial) and _is_plain_projection(point):
        return FoldedFusedMBConv(spatial, point, residual=residual, backend=fuser.backend)
    return fuser.chain(convs, residual)


def _fold_mbconv(fuser: _Fuser, block: nn.Module, path: str, residual: bool) -> FoldedBlock:
    layers = _attributes(block, "inverted_conv", "depth_conv", "point_conv")
    expand, depth, point = convs = [fuser.conv_layer(layer) for layer in layers]
    if (
        _is_plain(expand)
        and expand.weight.shape[-1] == 1
        and expand.stride == 1
        and _is_depthwise(depth)
        and expand.activation == depth.activation
        and _is_plain_projection(point)
    ):
        return FoldedMBConv(expand, depth, point, residual=residual, backend=fuser.backend)
    return fuser.chain(convs, residual)


def _fold_lite_mla(fuser: _Fuser, block: nn.Module, path: str, residual: bool) -> FoldedBlock:
    qkv_layer, aggregations, kernel, proj_layer, head_dim, eps = _attributes(
        block, "qkv", "aggreg", "kernel_func", "proj", "dim", "eps"
    )
    if _activation_name(kernel) != "relu":
        raise _NotFoldable(f"its kernel function is {kernel}, not ReLU")
    qkv, proj = fuser.conv_layer(qkv_layer), fuser.conv_layer(proj_layer)
    if not (_is_plain_projection(qkv) and _is_plain_projection(proj)):
        raise _NotFoldable("its qkv or proj is not a 1x1 convolution without activation")
    depths, groups = [], []
    for aggregation in aggregations:
        if len(aggregation) != 2:
            raise _NotFoldable("its aggregation is not a depthwise and a grouped convolution")
        depth, group = (fuser.conv(conv) for conv in aggregation)
        grouped = group.weight.shape[-1] == 1 and group.groups * head_dim == qkv.weight.shape[0]
        if not _is_depthwise(depth) or depth.stride != 1 or not grouped or group.stride != 1:
            raise _NotFoldable("its aggregation is not a depthwise and a grouped convolution")
        depths.append(depth)
        groups.append(group)
    for convs in (depths, groups):
        if len({conv.bias is None for conv in convs}) > 1:
            raise _NotFoldable("some of its scales have a bias and some do not")
    return FoldedLiteMLA(
        qkv,
        depths,
        groups,
        proj,
        head_dim=head_dim,
        eps=eps,
        residual=residual,
        backend=fuser.backend,
    )


_RESIDUAL_FOLDS: dict[str, Callable[[_Fuser, nn.Module, str, bool], FoldedBlock]] = {
    "ConvLayer": _fold_conv_layer,
    "DSConv": _fold_two_convs("depth_conv", "point_conv"),
    "ResBlock": _fold_two_convs("conv1", "conv2"),
    "FusedMBConv": _fold_fused_mbconv,
    "MBConv": _fold_mbconv,
    "LiteMLA": _fold_lite_mla,
}
"""Blocks that can add their input to their output."""


def _fold_residual_block(fuser: _Fuser, block: nn.Module, path: str) -> FoldedBlock:
    main, shortcut = _attributes(block, "main", "shortcut")
    name = type(main).__name__
    if name not in _RESIDUAL_FOLDS:
        raise _NotFoldable(f"its main branch is a {name}")
    if getattr(block, "pre_norm", None) is not None:
        raise _NotFoldable("it normalises its main branch first")
    if shortcut is None:
        return _RESIDUAL_FOLDS[name](fuser, main, path, False)
    if type(shortcut).__name__ not in ("IdentityLayer", "Identity"):
        raise _NotFoldable(f"its shortcut is a {type(shortcut).__name__}")
    if getattr(block, "post_act", None) is not None:
        raise _NotFoldable("it has an activation after the sum")
    convs = [module for module in main.modules() if isinstance(module, nn.Conv2d)]
    strided = any(conv.stride != (1, 1) for conv in convs)
    if strided or convs[0].in_channels != convs[-1].out_channels:
        raise _NotFoldable("its main branch changes the shape")
    return _RESIDUAL_FOLDS[name](fuser, main, path, True)


def _fold_layer_norm_2d(fuser: _Fuser, block: nn.Module, path: str) -> FoldedBlock:
    weight, bias, eps = _attributes(block, "weight", "bias", "eps")
    if weight is None or weight.dim() != 1:
        raise _NotFoldable("it has no weight per channel")
    dtype = fuser.dtype or weight.dtype
    return FoldedLayerNorm2d(
        weight.detach().to(dtype, copy=True),
        None if bias is None else bias.detach().to(dtype, copy=True),
        eps=eps,
        backend=fuser.backend,
    )


def _fold_neck(fuser: _Fuser, block: nn.Module, path: str) -> FoldedBlock:
    input_keys, input_ops, middle, output_keys, output_ops = _attributes(
        block, "input_keys", "input_ops", "middle", "output_keys", "output_ops"
    )
    if getattr(block, "merge", "add") != "add" or getattr(block, "post_input", None) is not None:
        raise _NotFoldable("it does not simply add its inputs")
    inputs, sizes = {}, set()
    for key, op in zip(input_keys, input_ops, strict=True):
        (steps,) = _attributes(op, "op_list")
        if [type(step).__name__ for step in steps] != ["ConvLayer", "UpSampleLayer"]:
            raise _NotFoldable("its inputs are not a ConvLayer and an UpSampleLayer each")
        conv, upsample = steps
        mode, size, align_corners = _attributes(upsample, "mode", "size", "align_corners")
        if mode != "bicubic" or align_corners or size is None:
            raise _NotFoldable("its inputs are not resized bicubically to a given size")
        inputs[key] = fuser.conv_layer(conv)
        sizes.add(tuple(size))
    if len(sizes) != 1:
        raise _NotFoldable("its inputs are resized to different sizes")
    return FoldedNeck(
        inputs,
        sizes.pop(),
        fuser.fused(middle, _join(path, "middle")),
        {
            key: fuser.fused(op, _join(path, f"output_ops.{index}"))
            for index, (key, op) in enumerate(zip(output_keys, output_ops, strict=True))
        },
        backend=fuser.backend,
    )


def _fold_mask_decoder(fuser: _Fuser, block: nn.Module, path: str) -> FoldedBlock:
    transformer, iou_head, upscaling, mask_tokens = _attributes(
        block, "transformer", "iou_prediction_head", "output_upscaling", "mask_tokens"
    )
    layers, final = _attributes(transformer, "layers", "final_attn_token_to_image")
    (heads,) = _attributes(final, "num_heads")
    if [getattr(layer, "skip_first_layer_pe", None) for layer in layers] != [True, False]:
        raise _NotFoldable("its transformer is not SAM's two blocks")
    for mlp in (layer.mlp for layer in layers):
        if not isinstance(getattr(mlp, "act", nn.ReLU()), nn.ReLU):
            raise _NotFoldable(f"its transformer's activation is {mlp.act}")
    if getattr(iou_head, "sigmoid_output", False):
        raise _NotFoldable("its predicted IoU goes through a sigmoid")
    _refuse_other_upscaling(upscaling)
    channels, inner = final.out_proj.weight.shape
    if inner != heads * HEAD_DIM:
        raise _NotFoldable(f"its heads are not of {HEAD_DIM} channels")
    weight = mask_tokens.weight
    dtype = fuser.dtype or weight.dtype
    if fuser.backend != "auto" and not has_kernel(
        SharedMaskDecoder.operation, fuser.backend, dtype
    ):
        raise _NotFoldable(f"backend {fuser.backend!r} has no kernel for it at {dtype}")
    with torch.inference_mode(False):
        state = {
            key: tensor.detach().to(dtype, copy=True) for key, tensor in block.state_dict().items()
        }
        with torch.device("meta"):
            decoder = MaskDecoder(
                transformer_dim=channels,
                transformer=TwoWayTransformer(
                    len(layers), channels, heads, layers[0].mlp.lin1.out_features, channels // inner
                ),
                num_multimask_outputs=len(weight) - 1,
                iou_head_depth=len(iou_head.layers),
                iou_head_hidden_dim=iou_head.layers[0].out_features,
            )
        try:
            decoder.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise _NotFoldable("its weights are not those of SAM's mask decoder") from error
    for name, module in block.named_modules():
        if hasattr(module, "eps"):
            decoder.get_submodule(name).eps = module.eps
    return SharedMaskDecoder(decoder, backend=fuser.backend)


def _refuse_other_upscaling(upscaling: nn.Module) -> None:
    """Refuse what is not a transposed convolution, LayerNorm, GELU, another and GELU."""
    steps = list(upscaling.children())
    names = [type(step).__name__ for step in steps]
    if names != ["ConvTranspose2d", "LayerNorm2d", "GELU", "ConvTranspose2d", "GELU"]:
        raise _NotFoldable(f"its upscaling is made of {', '.join(names)}")
    for conv in (steps[0], steps[3]):
        geometry = conv.kernel_size, conv.stride, conv.padding, conv.output_padding, conv.groups
        if geometry != ((2, 2), (2, 2), (0, 0), (0, 0), 1) or conv.bias is None:
            raise _NotFoldable(f"its upscaling has a {conv}")
    for gelu in (steps[2], steps[4]):
        if gelu.approximate != "none":
            raise _NotFoldable(f"its upscaling has a {gelu}")


def _without_residual(
    fold: Callable[[_Fuser, nn.Module, str, bool], FoldedBlock],
) -> Callable[[_Fuser, nn.Module, str], FoldedBlock]:
    return lambda fuser, block, path: fold(fuser, block, path, False)


_FOLDS: dict[str, Callable[[_Fuser, nn.Module, str], FoldedBlock]] = {
    **{name: _without_residual(fold) for name, fold in _RESIDUAL_FOLDS.items()},
    "ResidualBlock": _fold_residual_block,
    "LayerNorm2d": _fold_layer_norm_2d,
    "SamNeck": _fold_neck,
    "MaskDecoder": _fold_mask_decoder,
}
"""How to fold a block, by the name of its class."""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _attributes(module: nn.Module, *names: str) -> list[Any]:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise _NotFoldable(f"it has no attribute {missing[0]!r}")
    return [getattr(module, name) for name in names]


_CONTAINERS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "EfficientViTBlock": (FoldedEfficientViTBlock, ("context_module", "local_module")),
    "OpSequential": (FoldedSequence, ("op_list",)),
    "EfficientViTLargeBackbone": (FoldedBackbone, ("stages", "width_list")),
    "EfficientViTSamImageEncoder": (FoldedImageEncoder, ("backbone", "neck", "norm")),
}
"""What launches all that a container holds in one go, and which of the container's attributes it
takes, by the name of the container's class."""


def _container(name: str, fused: nn.Module) -> nn.Module:
    """A container of class `name` as one that launches all in one go, if all in it is folded."""
    if name not in _CONTAINERS or _has_hooks(fused):
        return fused
    kind, attributes = _CONTAINERS[name]
    children = [child for child, _ in fused.named_children()]
    _, *parts = fused.modules()
    if not (
        set(children) <= set(attributes)
        and all(hasattr(fused, attribute) for attribute in attributes)
        and all(map(only_launches, parts))
        and any(True for _ in fused.parameters())
    ):
        return fused
    return kind(*(getattr(fused, attribute) for attribute in attributes)).eval()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _refuse_hooks(block: nn.Module) -> None:
    """Folding would silently drop hooks that somebody put on the block or inside it."""
    for module in block.modules():
        if _has_hooks(module):
            raise _NotFoldable("hooks are registered on it or inside it")


def _fold_norm(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, float64, of the convolution with the BatchNorm after it."""
    weight = conv.weight.detach().to(torch.float64, copy=True)
    bias = None if conv.bias is None else conv.bias.detach().to(torch.float64, copy=True)
    if norm is None or isinstance(norm, nn.Identity):
        return weight, bias
    if not isinstance(norm, nn.BatchNorm2d):
        raise _NotFoldable(f"its norm is a {type(norm).__name__}")
    if norm.running_mean is None or norm.running_var is None:
        raise _NotFoldable("its BatchNorm keeps no running statistics")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if bias is not None:
        shift = shift + bias * scale
    return weight * scale.view(-1, 1, 1, 1), shift


def _activation_name(act: Any) -> str | None:
    """The name of an activation module in the operations' vocabulary."""
    if act is None or isinstance(act, nn.Identity):
        return None
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu"
    names = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hswish", nn.SiLU: "silu"}
    if type(act) not in names:
        raise _NotFoldable(f"its activation is {act}")
    return names[type(act)]


def _is_plain(conv: FoldedConv) -> bool:
    return conv.groups == 1 and conv.dilation == 1


def _is_plain_projection(conv: FoldedConv) -> bool:
    return (
        _is_plain(conv)
        and conv.weight.shape[-1] == 1
        and conv.stride == 1
        and conv.activation is None
    )


def _is_depthwise(conv: FoldedConv) -> bool:
    return conv.groups == conv.weight.shape[0] and conv.weight.shape[1] == 1 and conv.dilation == 1


def _convert_to_own_dtype(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Pre-hook: convert floating inputs to the dtype of the module's parameters."""
    dtype = next(module.parameters(recurse=False)).dtype

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(convert, args)), {key: convert(value) for key, value in kwargs.items()}


def _convert_inputs_of_left_modules(fused: nn.Module, dtype: torch.dtype) -> None:
    """Let modules that kept another dtype than `dtype` take what the swapped blocks return."""
    folded = {
        id(submodule)
        for module in fused.modules()
        if isinstance(module, FoldedBlock)
        for submodule in module.modules()
        if isinstance(submodule, (FoldedBlock, nn.ParameterList))
    }
    for module in fused.modules():
        parameter = next(module.parameters(recurse=False), None)
        if (
            id(module) not in folded
            and parameter is not None
            and parameter.is_floating_point()
            and parameter.dtype != dtype
            and _convert_to_own_dtype not in module._forward_pre_hooks.values()
        ):
            module.register_forward_pre_hook(_convert_to_own_dtype, with_kwargs=True)
