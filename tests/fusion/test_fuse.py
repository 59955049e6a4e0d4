"""fuse(): what it swaps, what it leaves, and that the result is the same."""

from __future__ import annotations

import copy
import pickle

import foreign
import pytest
import torch
from torch import nn

import evsam_kernels as ek
from evsam_kernels.nn import folded

ACTIVATIONS = ["relu", "relu6", "hswish", "silu", "gelu", None]
BIAS_AND_NORM = [(False, "bn2d"), (True, "bn2d"), (True, None), (False, None)]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    norm = expected.double().norm()
    assert torch.isfinite(norm) and norm > 0
    return ((actual.double() - expected.double()).norm() / norm).item()


def assert_fuses(module: nn.Module, x: torch.Tensor, kind: type, operation: str) -> nn.Module:
    """Fuse a float64 module, compare to rounding, and check what it became."""
    module = module.double()
    before = copy.deepcopy(module.state_dict())
    fused = ek.fuse(module)
    with torch.no_grad():
        assert relative_error(fused(x.double()), module(x.double())) < 1e-13
    assert type(fused) is kind
    assert [entry.operation for entry in fused.fusion_report.swapped] == [operation]
    assert fused.fusion_report.left == []
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    return fused


X = torch.randn(2, 8, 7, 9, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("bias", "norm"), BIAS_AND_NORM)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("origin", [foreign, ek.nn], ids=["foreign", "ours"])
def test_conv_layer(randomised, origin, activation, bias, norm, stride):
    layer = origin.ConvLayer(8, 6, 3, stride, 1, 2, bias, norm=norm, **_act(origin, activation))
    assert_fuses(randomised(layer), X, folded.FoldedConv, "conv_act")


def _act(origin, activation):
    return {"act": activation} if origin is foreign else {"act_func": activation}


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 1), (7, 1)])
def test_conv_layer_kernels(randomised, kernel, dilation):
    layer = randomised(foreign.ConvLayer(8, 6, kernel, dilation=dilation))
    assert_fuses(layer, X, folded.FoldedConv, "conv_act")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("bias", "norm"), BIAS_AND_NORM)
def test_blocks_of_two(randomised, activation, stride, bias, norm):
    settings = (stride, 12, (bias,) * 2, (norm,) * 2, (activation, None))
    assert_fuses(
        randomised(foreign.FusedMBConv(8, 6, 3, *settings)),
        X,
        folded.FoldedFusedMBConv,
        "fused_mbconv",
    )
    assert_fuses(
        randomised(foreign.ResBlock(8, 6, 3, *settings)), X, folded.FoldedConvChain, "conv_act"
    )
    assert_fuses(
        randomised(foreign.DSConv(8, 6, 3, stride, *settings[2:])),
        X,
        folded.FoldedConvChain,
        "conv_act",
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("bias", "norm"), [*BIAS_AND_NORM, ("fewer", "fewer")])
def test_mbconv(randomised, activation, stride, bias, norm):
    biases = (True, True, False) if bias == "fewer" else (bias,) * 3
    norms = (None, None, "bn2d") if norm == "fewer" else (norm,) * 3
    block = foreign.MBConv(8, 6, 5, stride, 12, biases, norms, (activation, activation, None))
    assert_fuses(randomised(block), X, folded.FoldedMBConv, "mbconv")


def test_blocks_that_need_several_operations(randomised):
    plain = ((False,) * 3, ("bn2d",) * 3)
    for block in (
        foreign.MBConv(8, 6, 3, 1, 12, *plain, ("relu6", "hswish", None)),
        foreign.MBConv(8, 6, 3, 1, 12, *plain, ("relu", "relu", "relu")),
        foreign.FusedMBConv(8, 6, 3, 2, 12, *plain, ("relu", "silu", None)),
        foreign.FusedMBConv(8, 6, 3, 1, 12, *plain, ("relu", None), groups=2),
    ):
        assert_fuses(randomised(block), X, folded.FoldedConvChain, "conv_act")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scales", [(), (5,), (3,), (3, 5)])
@pytest.mark.parametrize("size", [(7, 9), (1, 3)], ids=["linear", "quadratic"])
def test_lite_mla(randomised, bias, scales, size):
    block = foreign.LiteMLA(8, 6, heads=2, dim=4, scales=scales, bias=bias)
    x = X[:, :, : size[0], : size[1]]
    assert_fuses(randomised(block), x, folded.FoldedLiteMLA, "multi_scale_attention")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
def test_batch_norm_settings(randomised, affine, statistics):
    layer = foreign.ConvLayer(8, 6)
    layer.norm = nn.BatchNorm2d(6, eps=0.1, affine=affine, track_running_stats=statistics)
    if statistics:
        assert_fuses(randomised(layer), X, folded.FoldedConv, "conv_act")
    else:
        layer.norm.running_mean = None
        reasons = {e.path: e.reason for e in ek.fuse(layer.eval()).fusion_report.left}
        assert reasons[""] == "its BatchNorm keeps no running statistics"


def test_layer_norm(randomised):
    layer = randomised(foreign.LayerNorm2d(8, eps=1e-3))
    assert_fuses(layer, X, folded.FoldedLayerNorm2d, "layer_norm_2d")


@pytest.mark.parametrize("with_shortcut", [True, False])
def test_residual_blocks_of_every_kind(randomised, with_shortcut):
    plain = ((False,) * 3, ("bn2d",) * 3, ("relu", "relu", None))
    for main, operation in (
        (foreign.ConvLayer(8, 8), "conv_act"),
        (foreign.DSConv(8, 8, 3, 1, *plain[:2], ("relu", None)), "conv_act"),
        (foreign.ResBlock(8, 8, 3, 1, 4, *plain[:2], ("relu", None)), "conv_act"),
        (foreign.FusedMBConv(8, 8, 3, 1, 4, *plain[:2], ("relu", None)), "fused_mbconv"),
        (foreign.MBConv(8, 8, 3, 1, 4, *plain), "mbconv"),
        (foreign.LiteMLA(8, 8, 2, 4), "multi_scale_attention"),
    ):
        block = foreign.ResidualBlock(main, foreign.IdentityLayer() if with_shortcut else None)
        fused = ek.fuse(randomised(block).double())
        assert [entry.block for entry in fused.fusion_report.swapped] == ["ResidualBlock"]
        assert [entry.operation for entry in fused.fusion_report.swapped] == [operation]
        assert relative_error(fused(X.double()), block(X.double())) < 1e-13


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (
            lambda m: foreign.ResidualBlock(m, foreign.IdentityLayer(), post_act="relu"),
            "activation",
        ),
        (
            lambda m: foreign.ResidualBlock(
                m, foreign.IdentityLayer(), pre_norm=foreign.LayerNorm2d(8)
            ),
            "normalises",
        ),
        (lambda m: foreign.ResidualBlock(m, nn.Conv2d(8, 8, 1)), "shortcut is a Conv2d"),
        (lambda m: foreign.ResidualBlock(foreign.Unknown(8), m), "main branch is a Unknown"),
        (
            lambda m: foreign.ResidualBlock(foreign.ConvLayer(8, 1, 1), foreign.IdentityLayer()),
            "changes the shape",
        ),
    ],
)
def test_residual_blocks_that_stay(randomised, block, reason):
    block = randomised(block(foreign.ConvLayer(8, 8))).double()
    fused = ek.fuse(block)
    assert type(fused) is foreign.ResidualBlock
    assert reason in fused.fusion_report.left[0].reason
    assert relative_error(fused(X.double()), block(X.double())) < 1e-13
    assert any(entry.block in ("ConvLayer",) for entry in fused.fusion_report.swapped)


def test_conv_layer_with_layer_norm_keeps_its_class(randomised):
    layer = randomised(foreign.ConvLayer(8, 6, norm="ln2d")).double()
    fused = ek.fuse(layer)
    assert [(e.path, e.operation) for e in fused.fusion_report.swapped] == [
        ("norm", "layer_norm_2d")
    ]
    assert [e.path for e in fused.fusion_report.left] == ["", "conv"]
    assert relative_error(fused(X.double()), layer(X.double())) < 1e-13


def test_activations_that_are_not_ours_stay(randomised):
    layer = randomised(foreign.ConvLayer(8, 6)).double()
    layer.act = nn.GELU().eval()  # Not the tanh approximation.
    fused = ek.fuse(layer)
    assert "its activation is GELU" in fused.fusion_report.left[0].reason
    assert torch.equal(fused(X.double()), layer(X.double()))


@pytest.mark.parametrize("change", ["kernel", "activation"])
def test_lite_mla_of_another_kind_stays(randomised, change):
    settings = {"kernel": {"kernel": "silu"}, "activation": {"act": "relu"}}[change]
    block = randomised(foreign.LiteMLA(8, 6, 2, 4, **settings)).double()
    fused = ek.fuse(block)
    assert type(fused) is foreign.LiteMLA
    assert {entry.path for entry in fused.fusion_report.swapped} == {"qkv", "proj"}
    assert relative_error(fused(X.double()), block(X.double())) < 1e-13


def test_a_class_of_the_same_name_with_other_attributes_stays():
    class MBConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(2, 2)

        def forward(self, x):
            return self.block(x)

    fused = ek.fuse(MBConv().eval())
    assert fused.fusion_report.left[0].reason == "it has no attribute 'inverted_conv'"


def test_a_subclass_is_not_taken_for_its_base(randomised):
    class Noisy(foreign.ConvLayer):
        def forward(self, x):
            return super().forward(x) + 1

    layer = randomised(Noisy(8, 6)).double()
    assert torch.equal(ek.fuse(layer)(X.double()), layer(X.double()))


def test_hooks_are_not_dropped(randomised):
    layer = randomised(foreign.ConvLayer(8, 6))
    layer.conv.register_forward_hook(lambda module, args, output: output * 2)
    fused = ek.fuse(layer)
    assert "hooks" in fused.fusion_report.left[0].reason
    assert torch.equal(fused(X), layer(X))


def test_dropout_does_nothing(randomised):
    layer = randomised(ek.nn.ConvLayer(8, 6, dropout=0.5)).double()
    assert_fuses(layer, X, folded.FoldedConv, "conv_act")


def features(dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    sizes = ((6, 4, 4), (10, 5, 3))
    return {
        f"stage{index}": torch.randn(2, *size, generator=generator).to(dtype)
        for index, size in enumerate(sizes)
    }


def test_neck(randomised):
    neck = randomised(foreign.SamNeck((6, 10), 8)).double()
    fused = ek.fuse(neck)
    assert [(e.path, e.operation) for e in fused.fusion_report.swapped] == [
        ("", "upsample_add"),
        ("middle.op_list.0", "fused_mbconv"),
        ("output_ops.0", "conv_act"),
    ]
    assert [e.block for e in fused.fusion_report.left] == ["Unknown", "Conv2d"]
    expected = neck(features())["sam_encoder"]
    assert relative_error(fused(features())["sam_encoder"], expected) < 1e-13


@pytest.mark.parametrize(
    "settings", [{"merge": "cat"}, {"modes": ("bicubic", "bilinear")}], ids=["merge", "mode"]
)
def test_neck_of_another_kind_stays(randomised, settings):
    neck = randomised(foreign.SamNeck((6, 10), 8, **settings)).double()
    fused = ek.fuse(neck)
    assert type(fused) is foreign.SamNeck
    assert len(fused.fusion_report.swapped) == 4  # Two inputs, middle, output.
    assert torch.allclose(fused(features())["sam_encoder"], neck(features())["sam_encoder"])


class Model(nn.Module):
    """Known and unknown blocks in every kind of container, one block shared."""

    def __init__(self):
        super().__init__()
        self.stem = foreign.ConvLayer(8, 8)
        self.stages = nn.ModuleList([nn.Sequential(foreign.ConvLayer(8, 8), foreign.Unknown(8))])
        self.named = nn.ModuleDict({"shared": self.stem})

    def forward(self, x):
        for stage in self.stages:
            x = stage(self.stem(x))
        return self.named["shared"](x)


@pytest.mark.parametrize("inplace", [False, True])
def test_containers_and_shared_blocks(randomised, inplace):
    model = randomised(Model()).double()
    before, expected = copy.deepcopy(model), model(X.double())
    fused = ek.fuse(model, inplace=inplace)
    assert (fused is model) == inplace
    assert relative_error(fused(X.double()), expected) < 1e-13
    assert fused.stem is fused.named["shared"]
    assert isinstance(fused.stages[0][0], folded.FoldedConv)
    if not inplace:
        assert str(model) == str(before)
        assert torch.equal(model(X.double()), expected)


@pytest.fixture
def stage(randomised) -> foreign.OpSequential:
    """A container of which all can be folded."""
    block = foreign.ResidualBlock(
        foreign.FusedMBConv(8, 8, 3, 1, 16, (False,) * 2, ("bn2d",) * 2, ("gelu", None)),
        foreign.IdentityLayer(),
    )
    return randomised(foreign.OpSequential([foreign.ConvLayer(8, 8, 3), block]))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_container_of_folded_blocks_is_folded(stage, inplace):
    expected, keys = stage(X), list(ek.fuse(stage.op_list).state_dict())
    fused = ek.fuse(nn.Sequential(stage).eval(), inplace=inplace)
    assert type(fused[0]) is folded.FoldedSequence
    assert list(fused.state_dict()) == [f"0.op_list.{key}" for key in keys]
    for _ in range(2):
        assert relative_error(fused(X), expected) < 1e-6
    assert len(ek.fuse(fused).fusion_report.swapped) == 0
    assert type(ek.fuse(fused)[0]) is folded.FoldedSequence


def with_something_else(stage):
    stage.op_list.append(foreign.Unknown(8))


def with_a_hook(stage):
    stage.register_forward_hook(lambda *_: None)


def with_another_attribute(stage):
    stage.another = nn.Conv2d(8, 8, 1)


def without_blocks(stage):
    del stage.op_list[:]


@pytest.mark.parametrize(
    "change", [with_something_else, with_a_hook, with_another_attribute, without_blocks]
)
def test_any_other_container_stays(stage, change):
    change(stage)
    fused = ek.fuse(stage.eval())
    assert type(fused) is foreign.OpSequential
    for _ in range(2):
        torch.testing.assert_close(fused(X), stage(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_no_memory_with_the_original(randomised, dtype):
    convs = foreign.ConvLayer(8, 8, bias=True, norm=None), foreign.LiteMLA(8, 8, 2, 4, bias=True)
    model = randomised(nn.Sequential(*convs, foreign.LayerNorm2d(8))).to(dtype)
    fused = ek.fuse(model)
    expected = fused(X)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert torch.equal(fused(X), expected)


def test_idempotent(randomised):
    once = ek.fuse(randomised(Model()))
    twice = ek.fuse(once)
    assert str(twice) == str(once)
    assert twice.fusion_report.swapped == []
    assert torch.equal(twice(X), once(X))
    with pytest.raises(ValueError, match="stem is already fused, with backend='auto'"):
        ek.fuse(once, backend="reference")
    with pytest.raises(ValueError, match=r"already fused.*dtype=torch.float32"):
        ek.fuse(once, dtype=torch.bfloat16)


def test_pickle_deepcopy_and_state_dict(randomised):
    fused = ek.fuse(randomised(nn.Sequential(Model(), foreign.LiteMLA(8, 8, 2, 4, bias=True))))
    expected = fused(X)
    assert torch.equal(pickle.loads(pickle.dumps(fused))(X), expected)
    assert torch.equal(copy.deepcopy(fused)(X), expected)
    other = ek.fuse(randomised(nn.Sequential(Model(), foreign.LiteMLA(8, 8, 2, 4, bias=True)), 1))
    assert not torch.equal(other(X), expected)
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(X), expected)


def test_moves_with_to(randomised):
    fused = ek.fuse(randomised(foreign.ConvLayer(8, 6)))
    expected = fused(X)
    assert relative_error(fused.to(torch.float64)(X), expected) < 1e-6
    assert fused(X).dtype == torch.float64
    assert fused.to("meta")(X.to("meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_takes_any_floating_input_and_returns_its_dtype(randomised, dtype, given):
    layer = randomised(foreign.ConvLayer(8, 6))
    y = ek.fuse(layer, dtype=dtype)(X.to(given))
    assert y.dtype == dtype
    assert relative_error(y, layer(X)) < 0.03
    with pytest.raises(TypeError, match=r"takes a floating tensor, got torch\.int64"):
        ek.fuse(layer, dtype=dtype)(X.long())


def test_dtype_leaves_unknown_modules_alone_and_feeds_them_theirs(randomised):
    model = randomised(Model())
    fused = ek.fuse(model, dtype=torch.bfloat16)
    assert fused.stages[0][1].mix.weight.dtype == torch.float32
    y = fused(X)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, model(X)) < 0.03
    assert relative_error(pickle.loads(pickle.dumps(fused))(X), y) < 1e-6
    neck = randomised(foreign.SamNeck((6, 10), 8))
    out = ek.fuse(neck, dtype=torch.float16)(features(torch.float32))["sam_encoder"]
    assert out.dtype == torch.float16
    assert relative_error(out, neck(features(torch.float32))["sam_encoder"]) < 0.01


def test_own_dtype_where_none_is_given(randomised):
    assert ek.fuse(randomised(foreign.ConvLayer(8, 6)).half())(X).dtype == torch.float16


def test_gradient_of_the_input(randomised):
    layer = randomised(foreign.ConvLayer(8, 6)).double()
    grads = []
    for module in (layer, ek.fuse(layer)):
        x = X.double().requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    assert relative_error(grads[1], grads[0]) < 1e-13


def test_compiles_and_exports(randomised):
    fused = ek.fuse(randomised(Model()))
    assert relative_error(torch.compile(fused, fullgraph=True)(X), fused(X)) < 1e-6
    assert torch.equal(torch.export.export(fused, (X,)).module()(X), fused(X))


def test_refuses_training_mode():
    with pytest.raises(ValueError, match=r"it is in training mode; call module\.eval\(\) first"):
        ek.fuse(foreign.ConvLayer(8, 6))
    model = Model().eval()
    model.stem.norm.train()
    with pytest.raises(ValueError, match=r"stem\.norm is in training mode"):
        ek.fuse(model)


def test_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got Tensor"):
        ek.fuse(X)
    layer = foreign.ConvLayer(8, 6).eval()
    with pytest.raises(TypeError, match="dtype must be None"):
        ek.fuse(layer, dtype=torch.int8)
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', 'cpu'"):
        ek.fuse(layer, backend="gpu")


def test_a_named_backend_never_falls_back(randomised, monkeypatch):
    from evsam_kernels.ops import registry

    block = randomised(foreign.ConvLayer(8, 6))
    monkeypatch.setattr(registry, "has_kernel", lambda op, backend, dtype: backend != "reference")
    with pytest.raises(ek.BackendUnavailableError, match="'reference' has no kernel for conv_act"):
        ek.fuse(block, backend="reference")


def test_report_is_readable(randomised):
    text = str(ek.fuse(randomised(Model()), backend="reference").fusion_report)
    assert "swapped 2 blocks, left 2 modules" in text
    assert "ConvLayer -> conv_act on reference" in text
    assert "stages: left 1 Unknown, 1 Conv2d: not a block that fuse() knows" in text


def test_module_without_blocks():
    model = nn.Sequential(nn.ReLU()).eval()
    fused = ek.fuse(model)
    assert fused is not model
    assert str(fused.fusion_report) == "swapped 0 blocks, left 0 modules"
