"""Launches that are repeated: with the same result, and only while nothing has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import evsam_kernels as ek
from evsam_kernels import ops
from evsam_kernels.backends import build_info
from evsam_kernels.nn import folded
from evsam_kernels.ops import recording
from evsam_kernels.ops.recording import replayed

_cpu = pytest.importorskip("evsam_kernels._cpu", reason=str(build_info.read()))


def conv(in_channels: int, out_channels: int, size: int = 3, **settings) -> folded.FoldedConv:
    weight = torch.randn(out_channels, in_channels, size, size) / (in_channels * size**2) ** 0.5
    return folded.FoldedConv(weight, torch.randn(out_channels), activation="gelu", **settings)


def blocks() -> list[folded.FoldedBlock]:
    """A chain that adds its input two launches later, and a block of every other kind."""
    settings = {"residual": True, "backend": "auto"}
    return [
        conv(3, 32, stride=2),
        folded.FoldedConvChain([conv(32, 40), conv(40, 32)], **settings),
        folded.FoldedFusedMBConv(conv(32, 64), conv(64, 32, 1), **settings),
        folded.FoldedMBConv(conv(32, 64, 1), conv(1, 64, groups=64), conv(64, 32, 1), **settings),
        folded.FoldedLiteMLA(
            conv(32, 96, 1),
            [conv(1, 96, 5, groups=96)],
            [conv(32, 96, 1, groups=3)],
            conv(64, 32, 1),
            head_dim=32,
            eps=1e-15,
            **settings,
        ),
        folded.FoldedLayerNorm2d(torch.randn(32), torch.randn(32), eps=1e-6, backend="auto"),
    ]


@pytest.fixture
def sequence() -> folded.FoldedSequence:
    torch.manual_seed(1)
    return folded.FoldedSequence(blocks()).eval()


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)


X = image(2, 3, 18, 22)


def in_turn(sequence: folded.FoldedSequence, x: Tensor) -> Tensor:
    """What the blocks give one by one."""
    for block in sequence.op_list:
        x = block(x)
    return x


class Counting:
    """Counts how often blocks are called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        plain = ops.conv_act

        def counted(*arguments, **settings):
            self.calls += 1
            return plain(*arguments, **settings)

        monkeypatch.setattr(ops, "conv_act", counted)

    def __call__(self, action: Callable[[], object]) -> int:
        """Calls of `conv_act` in an action."""
        before = self.calls
        action()
        return self.calls - before


@pytest.fixture
def calls(monkeypatch) -> Counting:
    return Counting(monkeypatch)


EVERY = 3
"""Calls of `conv_act` that the blocks make."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inference", [False, True])
def test_the_second_time_gives_the_same(dtype, inference):
    sequence = ek.fuse(folded.FoldedSequence(blocks()).eval()).to(dtype)
    with torch.inference_mode(inference):
        for x in (X.to(dtype), image(1, 3, 33, 35, dtype=dtype), -X.to(dtype)):
            expected = in_turn(sequence, x)
            for _ in range(3):
                assert torch.equal(sequence(x), expected)


def test_only_the_first_time_calls_the_blocks(sequence, calls):
    assert calls(lambda: sequence(X)) == EVERY
    assert calls(lambda: sequence(X)) == 0
    assert calls(lambda: sequence(-X)) == 0


def test_results_are_never_written_again(sequence):
    sequence(X)
    first = sequence(X)
    before = first.clone()
    second = sequence(-X)
    assert torch.equal(first, before)
    assert not torch.equal(second, before)


@pytest.mark.parametrize(
    "other",
    [
        X.contiguous(memory_format=torch.channels_last),
        image(2, 18, 3, 22).transpose(1, 2),
        image(2, 3, 36, 44)[:, :, ::2, ::2],
        image(2, 1, 18, 22).expand(-1, 3, -1, -1),
        X.double(),
        X.half(),
        nn.Parameter(X, requires_grad=False),
        image(0, 3, 18, 22),
    ],
    ids=["dense", "transposed", "strided", "expanded", "wider", "narrower", "parameter", "empty"],
)
def test_other_inputs(sequence, other):
    sequence(X)
    for _ in range(2):
        result = sequence(other)
        assert torch.equal(result, in_turn(sequence, other))
        assert result.dtype == torch.float32
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_bad_input_is_refused_the_second_time_too(sequence):
    sequence(X)
    with pytest.raises(TypeError, match="floating"):
        sequence(X.int())
    with pytest.raises(ValueError, match="weight must have shape"):
        sequence(image(2, 4, 18, 22))
    assert torch.equal(sequence(X), in_turn(sequence, X))


def double_in_place(sequence):
    with torch.no_grad():
        sequence.op_list[0].weight.mul_(2)


def replace_a_weight(sequence):
    sequence.op_list[2].point_weight = nn.Parameter(-sequence.op_list[2].point_weight.detach())


def load(sequence):
    other = folded.FoldedSequence(blocks())
    sequence.load_state_dict(other.state_dict())


def assign(sequence):
    other = folded.FoldedSequence(blocks())
    sequence.load_state_dict(other.state_dict(), assign=True)


def set_data(sequence):
    sequence.op_list[5].weight.data = torch.ones(32)


def replace_a_block(sequence):
    sequence.op_list[3] = blocks()[3]


def drop_a_block(sequence):
    del sequence.op_list[4]


def change_a_setting(sequence):
    sequence.op_list[1].residual = False


def change_a_backend(sequence):
    sequence.op_list[2].backend = "reference"


def add_what_writes_in_place(sequence):
    sequence.op_list.insert(3, nn.ReLU(inplace=True))


def test_weights_may_move(sequence):
    before = sequence(X)
    sequence.share_memory()
    for parameter in sequence.parameters():
        assert parameter.is_shared()
    room = [torch.full_like(parameter, torch.nan) for parameter in sequence.parameters()]
    assert torch.equal(sequence(X), before)
    del room


CHANGES = [
    double_in_place,
    replace_a_weight,
    load,
    assign,
    set_data,
    replace_a_block,
    drop_a_block,
    change_a_setting,
    change_a_backend,
    add_what_writes_in_place,
]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_stale(sequence, change):
    before = sequence(X)
    assert torch.equal(sequence(X), before)
    change(sequence)
    for _ in range(3):
        result = sequence(X)
        assert torch.equal(result, in_turn(sequence, X))
    assert not torch.equal(result, before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_and_instruction_sets_are_those_of_the_call(sequence, calls, threads):
    sequence(X)
    torch.set_num_threads(torch.get_num_threads() + 1)
    assert calls(lambda: sequence(X)) == EVERY
    assert calls(lambda: sequence(X)) == 0
    before = _cpu.isa()
    try:
        _cpu.use_isa(_cpu.available_isas()[0])
        assert calls(lambda: sequence(X)) == (0 if _cpu.isa() == before else EVERY)
        assert torch.equal(sequence(X), in_turn(sequence, X))
    finally:
        _cpu.use_isa(before)


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def with_mode(sequence):
    with Watching() as mode:
        sequence(X)
    assert "evsam.fused_mbconv.default" in mode.seen


def with_gradient(sequence):
    x = X.clone().requires_grad_()
    sequence(x).sum().backward()
    assert x.grad.abs().sum() > 0


def with_gradient_of_a_weight(sequence):
    weight = sequence.op_list[0].weight.requires_grad_()
    sequence(X).sum().backward()
    assert weight.grad.abs().sum() > 0


def with_hook(sequence):
    seen = []
    sequence.op_list[3].register_forward_hook(lambda *call: seen.append(call))
    sequence(X)
    assert len(seen) == 1


def with_global_hook(sequence):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        sequence(X)
    finally:
        handle.remove()
    assert sequence.op_list[3] in seen


def with_own_forward(sequence):
    block = sequence.op_list[3]
    plain, seen = block.forward, []

    def forward(x):
        seen.append(x)
        return plain(x)

    block.forward = forward
    sequence(X)
    assert len(seen) == 1


def with_profile(sequence):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sequence(X)
    assert "evsam::mbconv" in {event.key for event in profile.key_averages()}


def with_trace(sequence):
    traced = torch.jit.trace(sequence, X)
    assert "evsam::mbconv" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(-X), sequence(-X))


def with_compile(sequence):
    compiled = torch.compile(sequence, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(-X), sequence(-X))


def with_export(sequence):
    exported = torch.export.export(sequence, (X,))
    assert "evsam.mbconv" in str(exported.graph)


def with_emulation(sequence):
    with ek.simt.emulate():
        sequence(X)


WATCHED = [
    with_mode,
    with_gradient,
    with_gradient_of_a_weight,
    with_hook,
    with_global_hook,
    with_own_forward,
    with_profile,
    with_trace,
    with_compile,
    with_export,
    with_emulation,
]


@pytest.mark.parametrize("watch", WATCHED)
def test_whoever_watches_sees_every_operation(sequence, calls, watch):
    expected = sequence(X)
    assert torch.equal(sequence(X), expected)
    assert calls(lambda: watch(sequence)) >= EVERY
    sequence.requires_grad_(False)
    assert torch.equal(sequence(X), expected)


def test_what_is_not_launched_is_not_left_out(sequence):
    block = sequence.op_list[0]

    def run(x: Tensor) -> list[Tensor]:
        return [block(x + 1)]

    def through(x: Tensor) -> list[Tensor]:
        return [block(x) + 1]

    def input_itself(x: Tensor) -> list[Tensor]:
        return [x]

    for function in (run, through, input_itself):
        for x in (X, -X):
            (expected,) = function(x)
            assert torch.equal(replayed(block, function, [x])[0], expected)


def test_float64_has_no_launches(sequence):
    sequence.double()
    for x in (X.double(), -X.double()):
        torch.testing.assert_close(sequence(x), in_turn(sequence, x))


def test_several_threads_at_once(sequence):
    inputs = [image(1, 3, 18, 22) * k for k in range(1, 9)]
    expected = [in_turn(sequence, x) for x in inputs]
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        for _ in range(20):
            results[index].append(sequence(inputs[index]))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for given, wanted in zip(results, expected, strict=True):
        assert len(given) == 20
        assert all(torch.equal(each, wanted) for each in given)


def test_copies_and_pickles(sequence):
    expected = sequence(X)
    for other in (copy.deepcopy(sequence), pickle.loads(pickle.dumps(sequence))):
        assert torch.equal(other(X), expected)
        double_in_place(other)
        assert not torch.equal(other(X), expected)
    assert torch.equal(sequence(X), expected)


@pytest.mark.parametrize("first", range(6))
def test_memory_goes_with_the_weights(first):
    sequence = folded.FoldedSequence(blocks()[first:])
    sequence(image(2, 32 if first > 0 else 3, 18, 22))
    weights = [weakref.ref(weight) for weight in sequence.parameters()]
    del sequence
    gc.collect()
    assert not any(weight() is not None for weight in weights)


class Lives:
    """The first and the last launch that maps are needed for, found by looking at all of them."""

    def __init__(self, steps: list[recording._Step]) -> None:
        self.steps = steps

    def __getitem__(self, map_: int) -> tuple[int, int]:
        needing = [i for i, step in enumerate(self.steps) if map_ in (step.y, *step.reads())]
        return needing[0], needing[-1]

    def may_share(self, first: int, second: int) -> bool:
        """Whether one is no longer needed where the other begins, but for what is added to it."""
        if self[first] > self[second]:
            first, second = second, first
        end, begin = self[first][1], self[second][0]
        writing = self.steps[begin]
        added = [("residual", first)] == [each for each in writing.maps if first in each]
        return end < begin or (end == begin and added and list(writing.reads()).count(first) == 1)


@pytest.mark.parametrize("seed", range(20))
def test_maps_lie_where_no_other_is_needed(seed):
    """A chain of launches that read, or add, what any of those before have made."""
    generator = random.Random(seed)
    recorder = recording._Recorder([image(1, 1, 1, 1)])
    for y in range(1, 20):
        recorder.maps.append(recorder.maps[0]._replace(nbytes=generator.randrange(1, 500)))
        maps: list[tuple[str, int | list[int]]] = [("x", generator.randrange(max(y - 3, 0), y))]
        if generator.random() < 0.3:
            maps.append(("maps", [generator.randrange(y), generator.randrange(y)]))
        alike = generator.randrange(max(y - 4, 0), y)
        if alike > 0 and generator.random() < 0.6:
            maps.append(("residual", alike))
            recorder.maps[y] = recorder.maps[alike]
        recorder.steps.append(recording._Step(print, maps, y, {}))
    results = sorted(generator.sample(range(1, 20), 2))
    places, size = recorder._places(results)
    assert sorted(places) == [y for y in range(1, 20) if y not in results]
    lives = Lives(recorder.steps)
    for map_, begin in places.items():
        assert begin % 64 == 0
        assert begin + recorder.maps[map_].nbytes <= size
        for other in range(1, map_):
            if other in places and not lives.may_share(map_, other):
                end, end_of_other = (
                    places[each] + recorder.maps[each].nbytes for each in (map_, other)
                )
                assert end <= places[other] or end_of_other <= begin, (map_, other)


def test_a_sum_is_written_over_what_is_added(monkeypatch):
    torch.manual_seed(1)
    chains = [
        folded.FoldedConvChain([conv(32, 32), conv(32, 32)], residual=True, backend="auto")
        for _ in range(3)
    ]
    sequence = folded.FoldedSequence([conv(3, 32), *chains, conv(32, 32)]).eval()
    sizes = []
    plain = recording._Recorder._places

    def noting(self, results):
        places, size = plain(self, results)
        sizes.append(size)
        return places, size

    monkeypatch.setattr(recording._Recorder, "_places", noting)
    expected = in_turn(sequence, X)
    sizes.clear()
    for _ in range(3):
        assert torch.equal(sequence(X), expected)
    # What a chain is given and the map between its two convolutions.
    assert sizes == [2 * X.numel() // 3 * 32 * X.element_size()]


@pytest.fixture
def batches(monkeypatch):
    """Notes the batches of what is launched again, in order."""
    plain, noted = recording._Recording.replay, []

    def noting(self, inputs, results):
        noted.append(len(inputs[0]))
        plain(self, inputs, results)

    monkeypatch.setattr(recording._Recording, "replay", noting)
    return noted


@pytest.mark.parametrize(("count", "at_once"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_a_large_batch_is_taken_in_parts(sequence, threads, monkeypatch, batches, count, at_once):
    x = image(5, 3, 18, 22)
    torch.set_num_threads(count)
    monkeypatch.setattr(recording, "_CACHED", 0)
    expected = sequence(x)
    for _ in range(2):
        result = sequence(x)
        assert torch.equal(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last)
    parts = [len(part) for part in x.split(at_once)]
    # A part's own first time is no repetition.
    assert batches[-len(parts) :] == parts


def test_a_small_batch_is_taken_at_once(sequence, batches):
    x = image(5, 3, 18, 22)
    expected = sequence(x)
    assert torch.equal(sequence(x), expected)
    assert batches == [5]


def test_the_first_time_keeps_no_map_longer_than_needed(monkeypatch):
    sequence = folded.FoldedSequence([conv(3, 32), *(conv(32, 32) for _ in range(5))]).eval()
    made, alive = [], []
    plain = ops.conv_act

    def counted(*arguments, **settings):
        alive.append(sum(not storage.expired() for storage in made))
        y = plain(*arguments, **settings)
        made.append(StorageWeakRef(y.untyped_storage()))
        return y

    with monkeypatch.context() as patch:
        patch.setattr(ops, "conv_act", counted)
        first = sequence(X)
    assert alive == [0, 1, 1, 1, 1, 1]
    assert torch.equal(sequence(X), first)
    assert len(made) == len(alive)


def test_an_encoder_launches_the_same_kernels(monkeypatch):
    model = ek.create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False).eval()
    encoder = ek.fuse(model).image_encoder
    x = image(1, 3, 512, 512)
    with torch.inference_mode():
        first = encoder(x)
        dispatched = []
        with monkeypatch.context() as patch:
            for name in ("conv_act", "mbconv", "fused_mbconv", "multi_scale_attention"):
                patch.setattr(ops, name, lambda *_, **__: dispatched.append(1))
            again = encoder(x)
    assert torch.equal(first, again)
    assert dispatched == []
