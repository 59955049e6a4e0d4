"""The C++ kernels of all operations: every instruction set, threads, packed weights, memory."""

from __future__ import annotations

import copy
import gc
import resource
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import evsam_kernels as ek
from evsam_kernels import ops
from evsam_kernels.backends import build_info
from evsam_kernels.numerics.budget import assert_within_budget, call
from evsam_kernels.numerics.cases import CASES, Case
from evsam_kernels.numerics.validation import Step, validate
from evsam_kernels.ops import kept, measure_masks
from evsam_kernels.ops.measure_masks.reference import Sizes
from evsam_kernels.ops.registry import OPERATIONS

_cpu = pytest.importorskip("evsam_kernels._cpu", reason=str(build_info.read()))

OTHER_ISAS = [isa for isa in _cpu.available_isas() if isa != _cpu.isa()]
"""That in use is what all other tests run with."""


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield request.param
    _cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", OTHER_ISAS, indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_instruction_set_keeps_the_budget(isa, op, dtype):
    # Gradients are the formula's, whatever the instruction set.
    steps = [Step(replace(case, quick=False), dtype, ("cpu",)) for case in CASES[op]]
    failed = [str(row) for rows in validate(steps) for row in rows if not row.passed]
    assert not failed, "\n".join(failed)


# A layer per way of computing: transforms, narrow, laid out, depthwise; lines and groups of mbconv.
LAYERS = [
    *(("conv_act", f"L0 residual block, {which}") for which in ("first", "second")),
    ("conv_act", "L0 stem"),
    ("conv_act", "stride 3, 5x5"),
    ("conv_act", "depthwise 5x5"),
    ("fused_mbconv", "L0 stage 1, strided"),
    ("fused_mbconv", "L0 stage 1"),
    ("fused_mbconv", "5x5"),
    ("mbconv", "L0 stage 3"),
    ("mbconv", "XL0 stage 5, strided"),
    ("relu_linear_attention", "L0 stage 4"),
    ("multi_scale_attention", "L0 stage 4"),
    ("upsample_add", "L0 neck"),
]


def layer(op: str, name: str, dtype: torch.dtype = torch.float32):
    return next(case for case in CASES[op] if case.name == name).operands(dtype)


@pytest.mark.parametrize(("op", "name"), LAYERS)
def test_the_number_of_threads_changes_nothing(op, name, threads):
    operands = layer(op, name)
    results = []
    for count in (1, 2, 3, 7, 2):
        torch.set_num_threads(count)
        results.append(call(op, operands, "cpu"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_number_of_threads_does_not_decide_how_hidden_channels_are_split(threads):
    case = Case("mbconv", "large map", {"channels": (3, 2080, 5), "size": (96, 96), "batch": 1})
    operands = case.operands(torch.float32)
    results = []
    for count in (1, 2, 40):
        torch.set_num_threads(count)
        results.append(call("mbconv", operands, "cpu"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("op", "name"), LAYERS)
def test_a_batch_is_its_images(op, name):
    operands = layer(op, name)
    twice = {
        key: torch.cat([value, value.flip(0)])
        if isinstance(value, torch.Tensor) and key in ("x", "qkv", "residual")
        else [torch.cat([x, x.flip(0)]) for x in value]
        if key == "maps"
        else value
        for key, value in operands.items()
    }
    once, both = call(op, operands, "cpu"), call(op, twice, "cpu")
    assert torch.equal(both, torch.cat([once, once.flip(0)]))


WEIGHT = {
    "conv_act": "weight",
    "fused_mbconv": "point_weight",
    "mbconv": "depth_weight",
    "multi_scale_attention": "proj_bias",
}
"""One of the weights that are packed."""

SETTINGS = {"multi_scale_attention": "biases"}


def operands_of(op: str):
    return layer(op, SETTINGS.get(op, "activation gelu"))


@pytest.mark.parametrize("op", WEIGHT)
def test_weights_are_packed_once(op, monkeypatch):
    count = 0
    pack = getattr(_cpu, f"pack_{op}")

    def counting(**arguments):
        nonlocal count
        count += 1
        return pack(**arguments)

    monkeypatch.setattr(_cpu, f"pack_{op}", counting)
    operands = operands_of(op)
    for _ in range(3):
        call(op, operands, "cpu")
    assert count == 1


@pytest.mark.parametrize("op", WEIGHT)
@pytest.mark.parametrize("change", ["in place", "data", "optimizer", "load_state_dict"])
def test_changed_weights_are_packed_again(op, change):
    operands = operands_of(op)
    name = WEIGHT[op]
    parameter = operands[name] = torch.nn.Parameter(operands[name])
    with torch.no_grad():
        call(op, operands, "cpu")
        if change == "in place":
            parameter.mul_(2)
        elif change == "data":
            parameter.data = parameter.data * 2
        elif change == "optimizer":
            parameter.grad = -parameter.detach()
            torch.optim.SGD([parameter], lr=1).step()
        else:
            holder = torch.nn.Module()
            holder.weight = parameter
            holder.load_state_dict({"weight": parameter.detach() * 2})
        assert_within_budget(op, operands, "cpu")


@pytest.mark.parametrize("op", WEIGHT)
def test_another_bias_in_the_same_place_is_packed_again(op):
    """Memory that was freed is used again, by a tensor of the same version."""
    operands = operands_of(op)
    bias = next(key for key in operands if key.endswith("bias"))
    for seed in range(4):
        torch.manual_seed(seed)
        operands[bias] = torch.randn_like(operands[bias])
        assert_within_budget(op, operands, "cpu")


def test_settings_are_part_of_what_is_packed():
    x, weight = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    for stride in (1, 2, 1, 3):
        operands = {"x": x, "weight": weight, "stride": stride, "activation": None}
        operands |= {"bias": None, "residual": None, "dilation": 1, "groups": 1}
        assert_within_budget("conv_act", operands, "cpu")


def test_packed_weights_go_with_the_weight():
    weight = torch.randn(8, 8, 1, 1)
    ops.conv_act(torch.randn(1, 8, 4, 4), weight, backend="cpu")
    assert weight in kept._kept
    before, gone = len(kept._kept), weakref.ref(weight)
    del weight
    gc.collect()
    assert gone() is None
    assert len(kept._kept) == before - 1


def test_weights_made_in_inference_mode_are_never_stale():
    with torch.inference_mode():
        x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 1, 1)
        once = ops.conv_act(x, weight, backend="cpu")
        weight.mul_(2)
        torch.testing.assert_close(ops.conv_act(x, weight, backend="cpu"), 2 * once)


@pytest.fixture
def noted(monkeypatch):
    """Makes a packing function note the settings it is called with, in order."""

    def noted(name):
        settings = []
        pack = getattr(_cpu, name)

        def noting(**arguments):
            settings.append(arguments)
            return pack(**arguments)

        monkeypatch.setattr(_cpu, name, noting)
        return settings

    return noted


def test_modules_fused_in_inference_mode_are_packed_once(noted):
    packs = noted("pack_conv_act")
    with torch.inference_mode():
        fused = ek.fuse(ek.nn.ConvLayer(8, 8).eval(), backend="cpu")
        for _ in range(3):
            fused(torch.randn(1, 8, 4, 4))
    assert len(packs) == 1


def test_weights_are_packed_once_for_small_maps_and_once_for_large_ones(noted):
    packs = noted("pack_fused_mbconv")
    spatial, point = torch.randn(32, 32, 3, 3), torch.randn(8, 32, 1, 1)

    def block(x):
        return ops.fused_mbconv(x, spatial, None, point, backend="cpu")

    for _ in range(2):
        for size in ((31, 33), (32, 32), (8, 128)):
            block(torch.randn(1, 32, *size))
    assert [settings["large_maps"] for settings in packs] == [False, True]
    x = torch.randn(1, 32, 32, 32)
    once = block(x)
    spatial.mul_(2)
    assert torch.equal(block(x), 2 * once)
    assert len(packs) == 3


@pytest.mark.parametrize("isa", _cpu.available_isas(), indirect=True)
def test_bfloat16_values_are_read_as_they_are(isa):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    # Products with larger ones leave no room for what keeps those with small ones.
    values = values[values.abs() < 2.0**104]
    channels = 64
    x = values[: len(values) // channels * channels].view(1, 1, -1, channels).permute(0, 3, 1, 2)
    weight = torch.eye(channels, dtype=torch.bfloat16).view(channels, channels, 1, 1)
    assert torch.equal(ops.conv_act(x, weight, backend="cpu"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "size"),
    [
        ((128, 256, 128), (6, 8)),
        ((128, 256, 128), (16, 36)),
        ((128, 256, 128), (17, 35)),
        ((544, 2048, 576), (5, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("stride", [1, 2])
def test_large_weights_are_read_where_they_are(noted, dtype, channels, size, stride):
    case = Case("mbconv", "large", {"channels": channels, "size": size, "batch": 2})
    operands = case.operands(dtype) | {"stride": stride, "residual": None}
    packs = noted("pack_mbconv")
    expected = call("mbconv", operands, "cpu")
    assert_within_budget("mbconv", operands, "cpu")
    assert [settings["stay"] for settings in packs] == [True]
    # Not as they are in memory: copied.
    for name in ("expand_weight", "point_weight"):
        turned = operands[name].transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(call("mbconv", operands | {name: turned}, "cpu"), expected)
    assert [settings["stay"] for settings in packs] == [True, False, False]
    operands["expand_weight"].share_memory_()
    assert torch.equal(call("mbconv", operands, "cpu"), expected)
    # Where the weights are now.
    addresses = [settings["expand_weight"] for settings in packs]
    assert addresses[-1] == operands["expand_weight"].data_ptr() != addresses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 32), (3, 64), (4, 96), (8, 8)], ids=str)
def test_large_weights_of_attention_are_read_where_they_are(noted, dtype, heads, head_dim):
    settings = {"channels": (704, 64), "heads": heads, "head_dim": head_dim}
    operands = Case("multi_scale_attention", "large", settings).operands(dtype)
    packs = noted("pack_multi_scale_attention")
    expected = call("multi_scale_attention", operands, "cpu")
    assert_within_budget("multi_scale_attention", operands, "cpu")
    turned = operands["qkv_weight"].transpose(0, 1).contiguous().transpose(0, 1)
    copied = call("multi_scale_attention", operands | {"qkv_weight": turned}, "cpu")
    assert torch.equal(copied, expected)
    assert [settings["stay"] for settings in packs] == [True, False]
    operands["qkv_weight"].share_memory_()
    assert torch.equal(call("multi_scale_attention", operands, "cpu"), expected)
    assert packs[-1]["qkv_weight"] == operands["qkv_weight"].data_ptr() != packs[0]["qkv_weight"]


def test_weights_that_stay_or_not_are_not_confused():
    weight, x = torch.zeros(4), torch.zeros(4)
    weights = {
        "expand_weight": weight.data_ptr(),
        "expand_bias": None,
        "depth_weight": weight.data_ptr(),
        "depth_bias": None,
        "point_weight": weight.data_ptr(),
        "point_bias": None,
        "in_channels": 1,
        "mid_channels": 1,
        "out_channels": 1,
        "kernel": 1,
        "stride": 1,
    }
    arguments = {"x": x.data_ptr(), "y": x.data_ptr(), "residual": None, "batch": 1, "height": 1}
    arguments |= {"width": 1, "activation": None, "num_threads": 1}
    for stay in (False, True):
        packed = _cpu.pack_mbconv(**weights, dtype="float32", stay=stay)
        given = None if stay else weight.data_ptr()
        with pytest.raises(ValueError, match="must be given where they stay"):
            _cpu.mbconv(packed=packed, expand_weight=given, point_weight=given, **arguments)
    weights = dict.fromkeys(("qkv_weight", "proj_weight"), weight.data_ptr())
    weights |= dict.fromkeys(("qkv_bias", "proj_bias"))
    weights |= {name: [] for name in ("depth_weights", "depth_biases", "group_weights")}
    weights |= {"group_biases": [], "in_channels": 1, "heads": 1, "head_dim": 1}
    weights |= {"out_channels": 1, "kernels": []}
    del arguments["activation"]
    for stay in (False, True):
        packed = _cpu.pack_multi_scale_attention(**weights, dtype="float32", stay=stay)
        given = None if stay else weight.data_ptr()
        with pytest.raises(ValueError, match="must be given where it stays"):
            _cpu.multi_scale_attention(packed=packed, qkv_weight=given, eps=1e-15, **arguments)


def test_launches_need_all_their_maps():
    launches, x = _cpu.Launches(), torch.ones(4)
    _cpu.layer_norm_2d(
        x=launches.stand_in(0),
        y=launches.stand_in(1),
        weight=None,
        bias=None,
        rows=2,
        channels=2,
        eps=1e-6,
        dtype="float32",
        num_threads=1,
        later=launches,
    )
    with pytest.raises(IndexError):
        launches.run([x.data_ptr()])
    y = torch.ones(4)
    launches.run([x.data_ptr(), y.data_ptr()])
    assert torch.equal(y, torch.zeros(4))


def test_a_copy_of_a_module_has_weights_of_its_own():
    fused = ek.fuse(ek.nn.ConvLayer(8, 8, act_func=None).eval(), backend="cpu")
    x = torch.randn(1, 8, 4, 4)
    once = fused(x)
    other = copy.deepcopy(fused)
    with torch.no_grad():
        other.weight.mul_(2)
        other.bias.mul_(2)
    torch.testing.assert_close(other(x), 2 * once)
    assert torch.equal(fused(x), once)


def test_weights_for_another_instruction_set_are_refused():
    if not OTHER_ISAS:
        pytest.skip("one instruction set runs here")
    weight = torch.randn(8, 8, 1, 1)
    sizes = {"in_channels": 8, "out_channels": 8, "kernel": 1, "stride": 1}
    packed = _cpu.pack_conv_act(
        weight=weight.data_ptr(),
        bias=None,
        dilation=1,
        groups=1,
        dtype="float32",
        **sizes,
    )
    assert packed.isa == _cpu.isa()
    assert packed.nbytes >= weight.nbytes
    x = torch.zeros(8)
    y = torch.zeros(8)
    before = _cpu.isa()
    _cpu.use_isa(OTHER_ISAS[0])
    try:
        with pytest.raises(ValueError, match=f"packed for {before} cannot be used with"):
            _cpu.conv_act(
                packed=packed,
                x=x.data_ptr(),
                y=y.data_ptr(),
                residual=None,
                batch=1,
                height=1,
                width=1,
                activation=None,
                num_threads=1,
            )
    finally:
        _cpu.use_isa(before)


REFUSED = [
    ("pack_conv_act", {"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ("pack_conv_act", {"kernel": 2}, "kernel must be odd and at least 1, got 2"),
    ("pack_conv_act", {"groups": 3}, "groups must divide"),
    ("pack_conv_act", {"dtype": "float64"}, "dtype must be float16, bfloat16 or float32"),
    ("pack_conv_act", {"weight": 0}, "weight must be the address"),
    ("pack_conv_act", {"weight": 2}, "weight must be aligned to its element size"),
    ("pack_conv_act", {"in_channels": 2**40, "out_channels": 2**40}, "more elements than memory"),
    ("conv_act", {"batch": -1}, "batch must be at least 0, got -1"),
    ("conv_act", {"height": 0}, "height must be at least 1, got 0"),
    ("conv_act", {"height": 2**40, "width": 2**40}, "more elements than memory"),
    ("conv_act", {"num_threads": 0}, "num_threads must be at least 1, got 0"),
    ("conv_act", {"activation": "tanh"}, "activation must be None, relu, .* got 'tanh'"),
    ("conv_act", {"y": 0}, "y must be the address"),
]


@pytest.mark.parametrize(("function", "wrong", "message"), REFUSED)
def test_wrong_sizes_are_refused_before_the_kernel(function, wrong, message):
    tensor = torch.zeros(8)
    weights = {
        "weight": tensor.data_ptr(),
        "bias": None,
        "in_channels": 2,
        "out_channels": 2,
        "kernel": 1,
        "stride": 1,
        "dilation": 1,
        "groups": 1,
        "dtype": "float32",
    }
    arguments = weights
    if function == "conv_act":
        arguments = {
            "packed": _cpu.pack_conv_act(**weights),
            "x": tensor.data_ptr(),
            "y": tensor.data_ptr(),
            "residual": None,
            "batch": 1,
            "height": 1,
            "width": 1,
            "activation": None,
            "num_threads": 1,
        }
    with pytest.raises(ValueError, match=message):
        getattr(_cpu, function)(**{**arguments, **wrong})


@pytest.mark.parametrize(("op", "name"), LAYERS)
def test_memory_does_not_grow(op, name):
    operands = layer(op, name)
    for _ in range(5):
        call(op, operands, "cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        call(op, operands, "cpu")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096, f"{grown} KiB"


@pytest.mark.parametrize("isa", OTHER_ISAS, indirect=True)
def test_every_instruction_set_measures_the_same_masks(isa):
    coarse = torch.randn(9, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    logits = torch.nn.functional.interpolate(8 * coarse, (50, 37), mode="bicubic")[:, 0]
    sizes = Sizes((160, 150), (121, 150), (77, 93))
    found = measure_masks(logits, sizes, backend="cpu")
    for ours, theirs in zip(found, measure_masks(logits, sizes, backend="reference"), strict=True):
        assert torch.equal(ours, theirs)
