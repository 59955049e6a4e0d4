"""Options that choose a model and how it runs, shared by the commands that run one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import evsam_kernels
from evsam_kernels.backends import AUTO, BACKENDS, BackendUnavailableError
from evsam_kernels.cli.errors import CommandError
from evsam_kernels.sam.checkpoint import CheckpointError
from evsam_kernels.sam.model import EfficientViTSam
from evsam_kernels.sam.synthetic import load_synthetic_weights
from evsam_kernels.sam.zoo import VARIANTS, create_efficientvit_sam_model

SYNTHETIC_NOTICE = (
    "SYNTHETIC WEIGHTS: no checkpoint was given, so the weights are made up and the masks mean "
    "nothing."
)


def add_model_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add a group with --model, --checkpoint, --backend, --device and --threads; return it."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=list(VARIANTS),
        default="efficientvit-sam-l0",
        metavar="NAME",
        help=f"one of {', '.join(VARIANTS)} (default: %(default)s)",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the variant's weights as published, .pt or .safetensors",
    )
    group.add_argument(
        "--backend",
        choices=[AUTO, *BACKENDS],
        default=AUTO,
        help="what runs the fused blocks; 'evsam info' says what there is (default: %(default)s)",
    )
    group.add_argument(
        "--device", default="cpu", help="where the model runs, as PyTorch names it (default: cpu)"
    )
    group.add_argument(
        "--threads",
        type=positive_integer,
        metavar="N",
        help="threads PyTorch uses (default: PyTorch's choice)",
    )
    return group


def positive_integer(text: str) -> int:
    """An argument that counts something."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return value


def build(arguments: argparse.Namespace) -> EfficientViTSam:
    """The model asked for, not fused; see `load`."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return load(arguments.model, arguments.checkpoint, arguments.device)


def load(name: str, checkpoint: Path | None, device: str | torch.device) -> EfficientViTSam:
    """A model, not fused; without a checkpoint, its weights are synthetic.

    Raises:
        CommandError: the checkpoint or the device cannot be used.
    """
    try:
        if checkpoint is None:
            model = create_efficientvit_sam_model(name, pretrained=False)
            load_synthetic_weights(model)
        else:
            model = create_efficientvit_sam_model(name, weight_url=checkpoint)
    except (CheckpointError, FileNotFoundError, ImportError) as error:
        raise CommandError(f"--checkpoint: {error}") from error
    try:
        return model.to(device)
    # PyTorch reports an unknown device or one that is not there by several exceptions.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CommandError(f"--device {device}: {reason}") from error


def fused(model: nn.Module, backend: str, dtype: torch.dtype | None = None) -> Any:
    """`fuse(model)` with the backend asked for.

    Raises:
        CommandError: that backend cannot run here.
    """
    try:
        return evsam_kernels.fuse(model, backend=backend, dtype=dtype)
    except (BackendUnavailableError, ValueError) as error:
        raise CommandError(f"--backend {backend}: {error}") from error
