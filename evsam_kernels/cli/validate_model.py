"""`evsam validate --model`: a whole model, from a photograph to masks, held against float64."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evsam_kernels import simt
from evsam_kernels.cli import models
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.cli.output import progress
from evsam_kernels.cli.pictures import PHOTOGRAPH, read
from evsam_kernels.nn.folded import FoldedBlock
from evsam_kernels.numerics.budget import Expectation, Row, compare, measure, one_thread
from evsam_kernels.numerics.plain import evaluate, plain, yardstick
from evsam_kernels.numerics.tf32 import tf32
from evsam_kernels.numerics.validation import DTYPES
from evsam_kernels.sam.preprocess import coordinate_scale, resized_shape

_ON_THE_COFFEE = (287, 150)
"""x, y in pixels of the photograph."""


class MaskDecoding:
    """The part of a model behind its image encoder, prompted with one point of a picture.

    Args:
        model: whose prompt encoder and mask decoder are taken.
        size: height and width of the picture.
        point: x, y in its pixels.
        dtype: to decode at.
    """

    def __init__(
        self, model: Any, size: tuple[int, int], point: tuple[float, float], dtype: torch.dtype
    ) -> None:
        self._prompts: Any = plain(model.prompt_encoder).to("cpu", dtype)
        self._decoder = plain(model.mask_decoder).to("cpu", dtype)
        self._postprocess = model.postprocess_masks
        self._size = size
        self._in_frame = resized_shape(*size, model.image_size[0])
        scale = torch.tensor(coordinate_scale(size, self._in_frame), dtype=torch.float64)
        self._point = (torch.tensor(point, dtype=torch.float64) * scale).to(dtype).view(1, 1, 2)
        self._dtype = dtype

    @torch.no_grad()
    def logits(self, embedding: Tensor) -> Tensor:
        """`[1, 256, 64, 64]` at any dtype -> the logits of three masks, `[1, 3, 256, 256]`."""
        sparse, dense = self._prompts(points=(self._point, torch.ones(1, 1, dtype=torch.int32)))
        logits: Tensor = self._decoder(
            image_embeddings=embedding.to(self._dtype),
            image_pe=self._prompts.get_dense_pe().to(self._dtype),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )[0]
        return logits

    def masks(self, logits: Tensor) -> Tensor:
        """Bool `[3, H, W]`, in the picture's pixels."""
        return self._postprocess(logits, self._in_frame, self._size)[0] > 0


@dataclass(frozen=True)
class Validated:
    """What a model makes of a picture at one dtype.

    Attributes:
        rows: its embedding and its mask logits, against their budgets.
        ious: of its masks with those of float64.
        launches: of GPU kernels in the executor.
        seconds: that the encoder took.
    """

    rows: tuple[Row, ...]
    ious: tuple[float, ...]
    launches: int
    seconds: float


def validate(
    model: Any,
    picture: np.ndarray,
    point: tuple[float, float],
    *,
    name: str,
    backend: str,
    dtypes: Sequence[str],
    emulated: bool,
) -> Iterator[Validated]:
    """Hold a model against float64, at one dtype after the other.

    The fused encoder's embedding, at its dtype, goes through the same plain mask decoder, at
    float32, as plain PyTorch's does. Nothing takes TF32.

    Args:
        model: not fused.
        picture: uint8 RGB `[H, W, 3]`.
        point: x, y in its pixels.
        name: of the model, for the report.
        backend: to fuse for.
        dtypes: names of those to compute at.
        emulated: whether kernels for GPUs run in the executor; "auto" takes what it takes on a GPU.

    Raises:
        CommandError: the backend cannot be used, or a GPU kernel is at fault.
    """
    pixels = (model.transform(picture)[None],)
    encoder, device = model.image_encoder, str(model.device)
    size = picture.shape[:2]
    with progress("float64", 1) as advance:
        with one_thread():
            oracle = evaluate(encoder, pixels, torch.float64, device)
        oracle_logits = MaskDecoding(model, size, point, torch.float64).logits(oracle)
        advance()
    decoding = MaskDecoding(model, size, point, torch.float32)
    oracle_masks = decoding.masks(oracle_logits)
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        with progress(f"plain PyTorch, {dtype_name}", 1) as advance, tf32(False):
            unfused, errors, how = yardstick(encoder, pixels, dtype, oracle, device)
            unfused_logits = decoding.logits(unfused)
            advance()
        began = time.perf_counter()
        with tf32(False), simt.emulate(auto=True) if emulated else nullcontext() as emulation:
            embedding, backends = _encode(encoder, pixels[0].to(device), backend, dtype)
        seconds = time.perf_counter() - began
        logits = decoding.logits(embedding)
        of_logits = Expectation(
            oracle_logits, torch.float32, measure(unfused_logits, oracle_logits), how
        )
        what = ("image encoder", name, backends, dtype)
        rows = (
            compare(embedding, Expectation(oracle, dtype, errors, how), *what, "embedding"),
            compare(logits, of_logits, *what, "logits of a point's masks"),
        )
        ious = _ious(decoding.masks(logits), oracle_masks)
        yield Validated(rows, ious, len(emulation.launches) if emulation else 0, seconds)


def _encode(
    encoder: nn.Module, pixels: Tensor, backend: str, dtype: torch.dtype
) -> tuple[Tensor, str]:
    """The embedding, on the CPU, and what the blocks ran on."""
    fused = models.fused(encoder, backend, dtype)
    counts = Counter(block.backend for block in fused.fusion_report.swapped)
    blocks = [module for module in fused.modules() if isinstance(module, FoldedBlock)]
    name = str(dtype).removeprefix("torch.")
    with progress(f"fused, {name}", len(blocks)) as advance, torch.inference_mode():
        for block in blocks:
            block.register_forward_hook(lambda *_: advance())
        try:
            embedding = fused(pixels)
        except (simt.FaultError, ImportError) as error:  # The executor may not have been built.
            raise CommandError(f"{name}: {error}") from error
    return embedding.cpu(), ", ".join(counts)


def _ious(found: Tensor, expected: Tensor) -> tuple[float, ...]:
    """Of masks `[M, H, W]`; 1 for two empty ones."""
    common = (found & expected).sum((1, 2))
    either = (found | expected).sum((1, 2))
    return tuple(torch.where(either > 0, common / either, 1.0).tolist())


def run(
    name: str,
    checkpoint: Path | None,
    device: torch.device,
    backend: str,
    dtypes: Sequence[str],
    emulated: bool,
) -> list[Row]:
    """Validate a model on the photograph; print what is not in the rows, and return these.

    See `validate` for the arguments.

    Raises:
        CommandError: the checkpoint, the device or the backend cannot be used, or a GPU kernel is
            at fault.
    """
    model = models.load(name, checkpoint, device)
    if checkpoint is None:
        print(models.SYNTHETIC_NOTICE)
    rows: list[Row] = []
    picture = read(PHOTOGRAPH)
    for validated in validate(
        model,
        picture,
        _ON_THE_COFFEE,
        name=name,
        backend=backend,
        dtypes=dtypes,
        emulated=emulated,
    ):
        ious = ", ".join(f"{iou:.4f}" for iou in validated.ious)
        ran = (
            f"{validated.launches} launches checked in the executor, " if validated.launches else ""
        )
        embedding = validated.rows[0]
        if embedding.yardstick != embedding.dtype:
            print(f"{embedding.dtype}: held against plain PyTorch at {embedding.yardstick}")
        print(
            f"{embedding.dtype}: {ran}{validated.seconds:.0f} s; IoU of a point's three "
            f"masks with those of float64: {ious}",
            flush=True,
        )
        rows += validated.rows
    return rows
