"""Types of the extension module that python/cpu.cpp binds."""

import numpy as np
import numpy.typing as npt

def available_isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def trim() -> None: ...

class Launches:
    def __init__(self) -> None: ...
    @staticmethod
    def stand_in(number: int) -> int: ...
    @staticmethod
    def memory(bytes: int) -> int: ...
    def run(self, maps: list[int]) -> None: ...

def layer_norm_2d(
    *,
    x: int,
    y: int,
    weight: int | None,
    bias: int | None,
    rows: int,
    channels: int,
    eps: float,
    dtype: str,
    num_threads: int,
    later: Launches | None = None,
) -> None: ...

class ConvActPacked:
    @property
    def nbytes(self) -> int: ...
    @property
    def isa(self) -> str: ...

class FusedMBConvPacked:
    @property
    def nbytes(self) -> int: ...
    @property
    def isa(self) -> str: ...

class MBConvPacked:
    @property
    def nbytes(self) -> int: ...
    @property
    def isa(self) -> str: ...

class MultiScaleAttentionPacked:
    @property
    def nbytes(self) -> int: ...
    @property
    def isa(self) -> str: ...

def pack_conv_act(
    *,
    weight: int,
    bias: int | None,
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    dilation: int,
    groups: int,
    dtype: str,
) -> ConvActPacked: ...
def conv_act(
    *,
    packed: ConvActPacked,
    x: int,
    y: int,
    residual: int | None,
    batch: int,
    height: int,
    width: int,
    activation: str | None,
    num_threads: int,
    later: Launches | None = None,
) -> None: ...
def pack_fused_mbconv(
    *,
    spatial_weight: int,
    spatial_bias: int | None,
    point_weight: int,
    point_bias: int | None,
    in_channels: int,
    mid_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    large_maps: bool,
    dtype: str,
) -> FusedMBConvPacked: ...
def fused_mbconv(
    *,
    packed: FusedMBConvPacked,
    x: int,
    y: int,
    residual: int | None,
    batch: int,
    height: int,
    width: int,
    activation: str | None,
    num_threads: int,
    later: Launches | None = None,
) -> None: ...
def pack_mbconv(
    *,
    expand_weight: int,
    expand_bias: int | None,
    depth_weight: int,
    depth_bias: int | None,
    point_weight: int,
    point_bias: int | None,
    in_channels: int,
    mid_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    dtype: str,
    stay: bool,
) -> MBConvPacked: ...
def mbconv(
    *,
    packed: MBConvPacked,
    expand_weight: int | None,
    point_weight: int | None,
    x: int,
    y: int,
    residual: int | None,
    batch: int,
    height: int,
    width: int,
    activation: str | None,
    num_threads: int,
    later: Launches | None = None,
) -> None: ...
def pack_multi_scale_attention(
    *,
    qkv_weight: int,
    qkv_bias: int | None,
    depth_weights: list[int],
    depth_biases: list[int],
    group_weights: list[int],
    group_biases: list[int],
    proj_weight: int,
    proj_bias: int | None,
    in_channels: int,
    heads: int,
    head_dim: int,
    out_channels: int,
    kernels: list[int],
    dtype: str,
    stay: bool,
) -> MultiScaleAttentionPacked: ...
def multi_scale_attention(
    *,
    packed: MultiScaleAttentionPacked,
    qkv_weight: int | None,
    x: int,
    y: int,
    residual: int | None,
    batch: int,
    height: int,
    width: int,
    eps: float,
    num_threads: int,
    later: Launches | None = None,
) -> None: ...
def relu_linear_attention(
    *,
    qkv: int,
    y: int,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    eps: float,
    dtype: str,
    num_threads: int,
    later: Launches | None = None,
) -> None: ...

_Sums = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]
_Axis = tuple[_Sums, _Sums, _Sums]

def measure_masks(
    *,
    logits: npt.NDArray[np.float32],
    rows: _Axis,
    columns: _Axis,
    inner: float,
    threshold: float,
    outer: float,
    tolerance: float,
    resolve: bool,
    masks: npt.NDArray[np.uint8] | None,
    num_threads: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]: ...
def resize_masks(
    *,
    logits: npt.NDArray[np.float32],
    rows: _Axis,
    columns: _Axis,
    wanted: npt.NDArray[np.int64],
) -> npt.NDArray[np.float32]: ...
def attend_keys(
    *,
    queries: npt.NDArray[np.float32],
    keys: npt.NDArray[np.float32],
    values: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.float32] | None,
    scales: npt.NDArray[np.float32] | None,
    basis: npt.NDArray[np.float32] | None,
    row_queries: npt.NDArray[np.float32] | None,
    positions: int,
    num_threads: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]: ...
def attend_tokens(
    *,
    queries: npt.NDArray[np.float32],
    keys: npt.NDArray[np.float32],
    values: npt.NDArray[np.float32],
    heads: int,
    num_threads: int,
) -> npt.NDArray[np.float32]: ...
def feed_forward(
    *,
    layers: list[ConvActPacked],
    x: npt.NDArray[np.float32],
    residual: npt.NDArray[np.float32] | None,
    norm_weight: npt.NDArray[np.float32] | None,
    norm_bias: npt.NDArray[np.float32] | None,
    eps: float,
    num_threads: int,
) -> npt.NDArray[np.float32]: ...
def map_values(
    *,
    values: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]],
    groups: int,
    num_threads: int,
) -> npt.NDArray[np.float32]: ...
def update_keys(
    *,
    tokens: npt.NDArray[np.float32],
    queries: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.float32] | None,
    scales: npt.NDArray[np.float32] | None,
    basis: npt.NDArray[np.float32] | None,
    row_tokens: npt.NDArray[np.float32] | None,
    updates: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]],
    square: npt.NDArray[np.float32],
    base: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    new_basis: npt.NDArray[np.float32],
    new_scales: npt.NDArray[np.float32],
    eps: float,
    num_threads: int,
) -> None: ...
def upscale_masks(
    *,
    base: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float32],
    basis: npt.NDArray[np.float32],
    rows: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.float32],
    norm_weight: npt.NDArray[np.float32],
    norm_bias: npt.NDArray[np.float32],
    eps: float,
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    first: npt.NDArray[np.int64],
    vectors: npt.NDArray[np.float32],
    masks: npt.NDArray[np.float32],
    height: int,
    width: int,
    bfloat16: bool,
    num_threads: int,
) -> None: ...
def upsample_add(
    *,
    maps: list[int],
    sizes: list[tuple[int, int]],
    y: int,
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: str,
    num_threads: int,
    later: Launches | None = None,
) -> None: ...
