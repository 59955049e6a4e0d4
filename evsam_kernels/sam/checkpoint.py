"""Reads checkpoints and loads them into a model, wholly or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN_DIFFERENCES = 5


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not belong to the model; the message says why."""


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint.

    Args:
        path: `.safetensors`, or a file of `torch.save` holding a state dict, bare or under the key
            "state_dict". Read with `weights_only=True`: no code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}; download it from the authors and pass its path as "
            f"weight_url, or build the model with pretrained=False"
        )
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # Each reader has its own exceptions for a broken file.
        first_line = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{path} is not a readable checkpoint: {type(error).__name__}: {first_line}; "
            f"it may be truncated or of another kind, download it again"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(
            f"{path} holds no state dict: expected tensors by name, bare or under 'state_dict'"
        )
    return dict(content)


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What distinguishes two state dicts in names and shapes, a line each."""
    lines = [f"missing {key} {_shape(expected[key])}" for key in expected if key not in found]
    lines += [f"unexpected {key} {_shape(found[key])}" for key in found if key not in expected]
    lines += [
        f"{key} has shape {_shape(found[key])} instead of {_shape(tensor)}"
        for key, tensor in expected.items()
        if key in found and found[key].shape != tensor.shape
    ]
    return lines


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into `model`; on any difference nothing is loaded.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file cannot be read, or names or shapes differ from the model's.
    """
    state = read_checkpoint(path)
    found = differences(model.state_dict(), state)
    if found:
        shown = "".join(f"\n  {line}" for line in found[:_SHOWN_DIFFERENCES])
        more = len(found) - _SHOWN_DIFFERENCES
        raise CheckpointError(
            f"{path} does not fit this {type(model).__name__}; is it another variant's checkpoint? "
            f"{len(found)} differences:{shown}" + (f"\n  and {more} more" if more > 0 else "")
        )
    model.load_state_dict(state)


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
