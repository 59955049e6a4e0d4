"""The mask decoder that shares the image across prompts, against the plain one in float64."""

from __future__ import annotations

import copy
import gc
import importlib.resources
import math
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from support.decoders import assert_close, exactly, plain_decoder, prompts

import evsam_kernels as ek
from evsam_kernels.backends import build_info
from evsam_kernels.numerics.budget import budget, measure
from evsam_kernels.ops.shared_mask_decoder import cpu, reference
from evsam_kernels.ops.shared_mask_decoder.reference import SharedMap
from evsam_kernels.sam import shared_decoder
from evsam_kernels.sam.masks import rle_to_mask
from evsam_kernels.sam.shared_decoder import SharedMaskDecoder
from evsam_kernels.sam.synthetic import load_synthetic_weights

_cpu = pytest.importorskip("evsam_kernels._cpu", reason=str(build_info.read()))


@pytest.fixture
def made(monkeypatch):
    """Counts how often what prompts share is computed."""
    counted = []
    compute = shared_decoder._shared_by_prompts
    monkeypatch.setattr(
        shared_decoder,
        "_shared_by_prompts",
        lambda *arguments: counted.append(1) or compute(*arguments),
    )
    return counted


@pytest.fixture
def isa(request):
    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield
    _cpu.use_isa(before)


@pytest.mark.parametrize("points", [0, 1, 3, 12])
@pytest.mark.parametrize("multimask", [True, False])
def test_the_algebra_is_exact(points, multimask, monkeypatch):
    # At most 8 prompts of one point at once.
    monkeypatch.setattr(shared_decoder, "_BASIS_BYTES", 8 * 3 * (8 * 6 + 1) * 30 * 8)
    decoder = plain_decoder(points).double()
    inputs = prompts(points, batch=18, size=(5, 6), dtype=torch.float64)
    shared = SharedMaskDecoder(copy.deepcopy(decoder), backend="reference")
    for ours, want in zip(shared(*inputs, multimask), decoder(*inputs, multimask), strict=True):
        assert want.norm() > 0
        assert (ours - want).norm() / want.norm() < 1e-12
    for ours, want in zip(
        shared.predict_masks(*inputs), decoder.predict_masks(*inputs), strict=True
    ):
        assert ours.shape == want.shape
        assert (ours - want).norm() / want.norm() < 1e-12


@pytest.mark.parametrize("isa", _cpu.available_isas(), indirect=True)
@pytest.mark.parametrize(
    ("points", "multimask", "size"), [(1, True, (8, 8)), (3, False, (9, 11)), (12, True, (1, 5))]
)
def test_kernels_keep_the_budget(isa, points, multimask, size):
    decoder = plain_decoder()
    inputs = prompts(points, batch=60, size=size)
    ours = SharedMaskDecoder(copy.deepcopy(decoder), backend="cpu")(*inputs, multimask)
    assert_close(ours, decoder(*inputs, multimask), exactly(decoder, inputs, multimask))


@pytest.mark.parametrize("isa", _cpu.available_isas(), indirect=True)
def test_sums_over_an_image_round_no_more_than_pytorchs(isa):
    generator = torch.Generator().manual_seed(0)
    queries = 0.1 * torch.randn(4, 8, 16, 7, generator=generator)
    keys = torch.randn(1, 128, 64 * 64, generator=generator)
    values = 1 + 0.1 * torch.randn(64 * 64, 128, generator=generator)
    ours, _ = cpu.attend_keys(
        queries, SharedMap(cpu.tiled(keys[0]), None), values, None, None, 64 * 64
    )
    plain, exact = (
        reference.attend_keys(
            queries.to(dtype),
            SharedMap(keys.to(dtype), None),
            values.to(dtype),
            None,
            None,
            64 * 64,
        )[0]
        for dtype in (torch.float32, torch.float64)
    )
    assert measure(ours, exact).within(budget(measure(plain, exact), torch.float32))


@pytest.mark.parametrize("isa", _cpu.available_isas(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("points", "multimask"), [(1, True), (2, False), (12, True)])
def test_half_precision(isa, dtype, points, multimask):
    decoder = plain_decoder().to(dtype)
    inputs = prompts(points, dtype=dtype)
    ours = SharedMaskDecoder(copy.deepcopy(decoder))(*inputs, multimask)
    assert [x.dtype for x in ours] == [dtype, dtype]
    assert_close(ours, decoder(*inputs, multimask), exactly(decoder, inputs, multimask), dtype)


@pytest.mark.parametrize("scale", [1e-3, 100])
def test_images_of_other_magnitudes(scale):
    decoder = plain_decoder()
    inputs = prompts(scale=scale)
    ours = SharedMaskDecoder(copy.deepcopy(decoder), backend="cpu")(*inputs, True)
    assert_close(ours, decoder(*inputs, True), exactly(decoder, inputs, True))


@pytest.mark.parametrize("cancels", ["image", "values", "norm"])
def test_large_terms_that_cancel(cancels):
    """An attention's bias takes away what is a thousand times what is left."""
    decoder = plain_decoder()
    blocks = decoder.transformer.layers
    large = 100 * torch.randn(256, generator=torch.Generator().manual_seed(1))
    image, pe, tokens, dense = prompts()
    match cancels:
        case "image":
            image = image + large.view(1, -1, 1, 1)
            blocks[0].cross_attn_image_to_token.out_proj.bias.copy_(-large)
        case "values":
            for attention in (block.cross_attn_image_to_token for block in blocks):
                attention.v_proj.bias.copy_(large[:128])
                attention.out_proj.bias.copy_(-attention.out_proj.weight @ large[:128])
        case "norm":
            blocks[0].norm4.bias.copy_(large)
            blocks[1].cross_attn_image_to_token.out_proj.bias.copy_(-large)
    inputs = image, pe, tokens, dense
    ours = SharedMaskDecoder(copy.deepcopy(decoder), backend="cpu")(*inputs, True)
    assert_close(ours, decoder(*inputs, True), exactly(decoder, inputs, True))


def test_a_variance_whose_terms_cancel():
    """The tokens take away most of the image: a sum of squares would have few digits left."""
    decoder = plain_decoder()
    block = decoder.transformer.layers[0]
    attention = block.cross_attn_image_to_token
    image, pe, tokens, dense = prompts()
    # All tokens have about the same values, and the image about the opposite of what these give.
    block.norm3.weight *= 0.02
    block.norm3.bias *= 2500
    attention.v_proj.weight *= 50
    attention.v_proj.bias.zero_()
    attention.out_proj.bias.zero_()
    away = attention.out_proj(attention.v_proj(block.norm3.bias))
    image = 0.02 * away.std() * image - dense[:1] - away.view(1, -1, 1, 1)
    inputs = image, pe, tokens, dense
    ours = SharedMaskDecoder(copy.deepcopy(decoder), backend="cpu")(*inputs, True)
    assert_close(ours, decoder(*inputs, True), exactly(decoder, inputs, True))


def test_only_masks_above_the_threshold_are_upscaled():
    decoder = SharedMaskDecoder(plain_decoder())
    inputs = dict(
        zip(
            (
                "image_embeddings",
                "image_pe",
                "sparse_prompt_embeddings",
                "dense_prompt_embeddings",
            ),
            prompts(),
            strict=True,
        ),
        multimask_output=True,
    )
    masks, iou = decoder(**inputs)
    threshold = iou.median().item()
    found, same = decoder.decode_above(threshold, **inputs)
    assert torch.equal(same, iou)
    assert 0 < len(found) < iou.numel()
    assert torch.equal(found, masks[iou > threshold])
    none, _ = decoder.decode_above(iou.max().item(), **inputs)
    assert none.shape == (0, 36, 44)
    inputs["dense_prompt_embeddings"] = inputs["dense_prompt_embeddings"].contiguous()
    masks, iou = decoder(**inputs)  # The plain path.
    assert torch.equal(decoder.decode_above(threshold, **inputs)[0], masks[iou > threshold])


def test_other_prompts_take_the_plain_path(made):
    plain = plain_decoder()
    shared = SharedMaskDecoder(copy.deepcopy(plain))
    image, pe, tokens, dense = prompts()
    several = image.expand(len(tokens), -1, -1, -1)
    many = torch.cat([tokens] * 7, dim=1)
    for inputs in [
        (image, pe, tokens, dense.contiguous()),  # Masks of their own.
        (several, pe, tokens, dense),
        (image, pe, many, dense),
        (image, pe, tokens[:1], dense[:1]),  # One prompt, on an image that was not set.
        (image, pe, tokens[:0], dense[:0]),
    ]:
        for ours, want in zip(shared(*inputs, True), plain(*inputs, True), strict=True):
            assert torch.equal(ours, want)
    assert not made
    shared(image, pe, tokens, dense, True)
    assert made


def test_gradients_of_the_prompts():
    plain = plain_decoder()
    image, pe, tokens, dense = prompts()
    gradients = []
    for decoder in (plain, SharedMaskDecoder(copy.deepcopy(plain))):
        leaf = tokens.clone().requires_grad_()
        decoder(image, pe, leaf, dense, True)[0].sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


def test_what_prompts_share_is_kept_with_the_image(made):
    decoder = SharedMaskDecoder(plain_decoder())
    image, pe, tokens, dense = prompts()
    decoder.set_image(image, pe, dense)
    for count in (1, 3):
        decoder(
            image,
            pe.clone(),
            tokens[:count],
            dense[:count].clone()[:, :, :1, :1].expand(count, -1, 9, 11),
            True,
        )
    assert len(made) == 1
    batch = torch.cat([image, 2 * image])
    for index in (0, 1, 0, 1):
        decoder(batch[index : index + 1], pe, tokens, dense, True)
    assert len(made) == 3
    other = SharedMaskDecoder(plain_decoder(seed=1))
    for each in (other, decoder, other, decoder):
        each(image, pe, tokens, dense, True)
    assert len(made) == 4


@pytest.mark.parametrize("change", ["image", "pe", "dense", "weight", "inference image"])
def test_what_prompts_share_is_never_stale(change, made):
    plain = plain_decoder()
    decoder = SharedMaskDecoder(copy.deepcopy(plain), backend="cpu")
    image, pe, tokens, dense = prompts()
    weight = decoder.transformer.layers[1].norm4.weight
    with torch.inference_mode(change == "inference image"):
        if change == "inference image":
            image = image.clone()
        for _ in range(2):
            before = decoder(image, pe, tokens, dense, True)[0]
        assert len(made) == 1
        match change:
            case "image" | "inference image":
                image *= 1.5
            case "pe":
                pe *= 1.5
            case "dense":
                dense = 1.5 * dense[:, :, :1, :1]
                dense = dense[:1].expand(20, -1, 9, 11)
            case "weight":
                weight *= 1.5
                plain.transformer.layers[1].norm4.weight *= 1.5
        ours = decoder(image, pe, tokens, dense, True)
    assert len(made) == 2
    assert not torch.allclose(ours[0], before, rtol=1e-3)
    inputs = image, pe, tokens, dense
    assert_close(ours, plain(*inputs, True), exactly(plain, inputs, True))


def test_what_prompts_share_goes_with_the_image():
    decoder = SharedMaskDecoder(plain_decoder())
    image, pe, _, dense = prompts()
    decoder.set_image(image, pe, dense)
    state = decoder._image(image, pe, dense[:1], make=False)
    gone = weakref.ref(state.upscaling), weakref.ref(state.memory)
    del state
    gc.collect()
    assert None not in [of() for of in gone]
    del image
    gc.collect()
    assert [of() for of in gone] == [None, None]


def test_masks_that_are_referred_to_are_not_written_over():
    decoder = SharedMaskDecoder(plain_decoder(), backend="cpu")
    image, pe, tokens, dense = prompts()
    mask = decoder(image, pe, tokens, dense, True)[0][3, 1].numpy()
    before = mask.copy()
    for seed in (1, 2):
        others = prompts(seed=seed)[2]
        assert not np.array_equal(decoder(image, pe, others, dense, True)[0][3, 1], before)
    assert np.array_equal(mask, before)


def test_a_basis_that_begins_within_a_cache_line_is_refused(monkeypatch):
    aligned = cpu.Memory.empty

    def within_a_line(self, *shape, like):
        return aligned(self, math.prod(shape) + 1, like=like)[1:].view(shape)

    monkeypatch.setattr(cpu.Memory, "empty", within_a_line)
    with pytest.raises(ValueError, match="new_basis and new_scales must begin"):
        SharedMaskDecoder(plain_decoder(), backend="cpu")(*prompts(), True)


def test_memory_is_used_again():
    memory, like = cpu.Memory(), torch.empty(0)
    places = [memory.empty(3, size, like=like).data_ptr() for size in (500, 500, 1000, 400, 10)]
    # Nothing is given out for less than half of its size.
    assert places[0] == places[1] == places[3]
    assert len(set(places)) == 3
    piece = memory.empty(3, 500, like=like)[2:]
    held = memory.empty(3, 1000, like=like)
    assert places[0] <= piece.data_ptr() < places[0] + 6000
    assert held.data_ptr() == places[2]
    new = memory.empty(3, 500, like=like)
    assert new.data_ptr() not in places
    assert all(of.data_ptr() % 64 == 0 for of in (held, new))


def test_linear_layers_are_packed_once(monkeypatch):
    packed = []
    pack = cpu._pack
    monkeypatch.setattr(cpu, "_pack", lambda *weights: packed.append(weights) or pack(*weights))
    decoder = SharedMaskDecoder(plain_decoder(), backend="cpu")
    inputs = prompts()
    decoder(*inputs, True)
    once = len(packed)
    assert once > 0
    decoder(*inputs, True)
    assert len(packed) == once
    weight = decoder.transformer.layers[1].mlp.lin1.weight
    weight.mul_(2)
    decoder(*inputs, True)
    assert len(packed) == once + 1
    assert packed[-1][0] is weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": []}, "layers must be at least 1"),
        ({"x": np.zeros((3, 4), np.float32)}, "a layer takes 5 columns where there are 4"),
        ({"residual": np.zeros((3, 5), np.float32)}, r"residual must have shape \[3, 6\]"),
        ({"norm_weight": np.ones(6, np.float32)}, "norm_weight and norm_bias go together"),
        ({"num_threads": 0}, "num_threads must be at least 1"),
    ],
)
def test_wrong_linear_layers_are_refused(changes, message):
    given = {
        "layers": [cpu._pack(torch.ones(6, 5), None)],
        "x": np.zeros((3, 5), np.float32),
        "residual": None,
        "norm_weight": None,
        "norm_bias": None,
        "eps": 1e-5,
        "num_threads": 1,
    }
    assert _cpu.feed_forward(**given).shape == (3, 6)
    with pytest.raises(ValueError, match=message):
        _cpu.feed_forward(**{**given, **changes})


def test_wrong_tokens_are_refused():
    x = np.zeros((2, 3, 8), np.float32)
    given = {"queries": x, "keys": x, "values": x, "heads": 2, "num_threads": 1}
    assert _cpu.attend_tokens(**given).shape == x.shape
    for changes, message in [
        ({"heads": 3}, "heads must divide the columns of queries"),
        ({"values": x[:1]}, r"values must have shape \[2, 3, 8\]"),
        ({"queries": x[0]}, "queries must have three axes"),
    ]:
        with pytest.raises(ValueError, match=message):
            _cpu.attend_tokens(**{**given, **changes})


def test_copies_pickles_and_state():
    plain = plain_decoder()
    decoder = SharedMaskDecoder(copy.deepcopy(plain))
    inputs = prompts()
    masks, _ = decoder(*inputs, True)
    assert decoder.state_dict().keys() == plain.state_dict().keys()
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert torch.equal(other(*inputs, True)[0], masks)
    other = SharedMaskDecoder(plain_decoder(seed=1))
    assert not torch.equal(other(*inputs, True)[0], masks)
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(*inputs, True)[0], masks)
    gone = weakref.ref(decoder.iou_token.weight)
    del decoder, other
    gc.collect()
    assert gone() is None


def test_the_number_of_threads_changes_nothing(monkeypatch):
    """In a kernel; PyTorch's own products may sum in another order."""
    before = torch.get_num_threads()
    compared = []

    def on_some_threads(stage):
        def run(*arguments):
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                made = stage(*arguments)
                # Masks are written to the last argument.
                results.append([arguments[-1].clone()] if made is None else made)
            for result in results[1:]:
                compared.extend(map(torch.equal, result, results[0]))
            return results[0]

        return run

    for name in (
        *("feed_forward", "attend_tokens", "attend_keys"),
        *("map_values", "update_keys", "upscale_masks"),
    ):
        monkeypatch.setattr(cpu, name, on_some_threads(getattr(cpu, name)))
    try:
        SharedMaskDecoder(plain_decoder())(*prompts(), True)
    finally:
        torch.set_num_threads(before)
    assert len(compared) > 10 and all(compared)


def test_many_prompts_and_several_callers():
    decoder = SharedMaskDecoder(plain_decoder())
    image, pe, tokens, dense = prompts(batch=37)
    masks, iou = decoder(image, pe, tokens, dense, True)
    for first in (0, 35):
        some = slice(first, first + 2)
        found, _ = decoder(image, pe, tokens[some], dense[some], True)
        torch.testing.assert_close(found, masks[some], rtol=1e-4, atol=1e-4)
    with ThreadPoolExecutor(4) as pool:
        for found, score in pool.map(lambda _: decoder(image, pe, tokens, dense, True), range(8)):
            assert torch.equal(found, masks)
            assert torch.equal(score, iou)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(decoder(image, pe, tokens, dense, True)[0], masks)


def test_auto_without_a_kernel_is_the_plain_decoder():
    plain = plain_decoder().double()
    inputs = prompts(dtype=torch.float64)
    ours = SharedMaskDecoder(copy.deepcopy(plain))(*inputs, True)
    assert torch.equal(ours[0], plain(*inputs, True)[0])


def test_backends_that_are_not_there_are_refused():
    decoder = SharedMaskDecoder(plain_decoder(), backend="triton")
    with pytest.raises(ek.BackendUnavailableError, match="triton"):
        decoder(*prompts(), True)


@pytest.fixture(scope="module")
def models():
    """A model, and the same with nothing but its decoder swapped."""
    model = ek.create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False)
    load_synthetic_weights(model)
    swapped = copy.copy(model)
    swapped._modules = {**model._modules, "mask_decoder": SharedMaskDecoder(model.mask_decoder)}
    return model, swapped


def images():
    random = np.random.RandomState(0).randint(0, 256, (90, 120, 3)).astype(np.uint8)
    photograph = importlib.resources.files("evsam_kernels.cli") / "photograph" / "coffee.jpg"
    with photograph.open("rb") as file:
        return {"random": random, "photograph": np.array(Image.open(file))}


def test_the_predictor_shares_from_the_first_prompt_on(models, made):
    plain, shared = map(ek.EfficientViTSamPredictor, models)
    image = images()["random"]
    point = {"point_coords": [[30, 40]], "point_labels": [1]}
    plain.set_image(image)
    for inference in (False, True):
        made.clear()
        with torch.inference_mode(inference):
            shared.set_image(image)
            assert len(made) == 1
            masks, scores, logits = shared.predict(**point)
            again = shared.predict(**point, mask_input=logits[:1])
            box = shared.predict(box=[10, 20, 90, 80], multimask_output=False)
        assert len(made) == 1
        expected = plain.predict(**point)
        for ours, theirs in [
            ((scores, logits), expected[1:]),
            (again[1:], plain.predict(**point, mask_input=logits[:1])[1:]),
            (box[1:], plain.predict(box=[10, 20, 90, 80], multimask_output=False)[1:]),
        ]:
            for mine, want in zip(ours, theirs, strict=True):
                assert np.linalg.norm(mine - want) <= 1e-4 * np.linalg.norm(want)
        assert (masks != expected[0]).mean() <= 1e-4
    shared.reset_image()
    gc.collect()
    assert not shared_decoder._images


@pytest.mark.parametrize("name", ["random", "photograph"])
def test_everything_is_the_same(models, name):
    found = []
    for model in models:
        generator = ek.EfficientViTSamAutomaticMaskGenerator(
            model,
            points_per_side=5,
            points_per_batch=10,
            pred_iou_thresh=0.2,
            stability_score_thresh=0,
            box_nms_thresh=1.0,
            output_mode="uncompressed_rle",
        )
        masks = generator.generate(images()[name])
        found.append(sorted(masks, key=lambda mask: (mask["point_coords"], mask["predicted_iou"])))
    assert 5 < len(found[0]) < 60
    for ours, theirs in zip(*found, strict=True):
        assert ours["point_coords"] == theirs["point_coords"]
        assert ours["predicted_iou"] == pytest.approx(theirs["predicted_iou"], rel=1e-4)
        differ = rle_to_mask(ours["segmentation"]) != rle_to_mask(theirs["segmentation"])
        assert differ.mean() <= 1e-4
