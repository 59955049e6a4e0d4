"""Weights made from the names in a state dict, for tests and demonstrations."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import nn


def synthetic_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of one entry of a state dict: a function of its name and shape.

    The Mersenne Twister behind `RandomState` is frozen by NumPy's compatibility policy (NEP 19), so
    that golden numbers computed with these weights stay valid. The scales keep activations near 1.

    Returns:
        float32 of the shape given; int64 0 for `num_batches_tracked`.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros((), np.int64)
    normal = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(size=shape)
    if leaf == "running_var":
        values = np.exp(0.2 * normal)
    elif leaf in ("running_mean", "bias"):
        values = 0.1 * normal
    elif leaf == "weight" and len(shape) == 1:
        values = 1.0 + 0.1 * normal
    elif leaf == "weight":
        values = normal / np.sqrt(np.prod(shape[1:]))
    else:
        values = normal
    return np.asarray(values, np.float32)


def load_synthetic_weights(model: nn.Module, prefix: str = "") -> None:
    """Fill every entry of the model's state dict from its name, `prefix` put before it."""
    model.load_state_dict(
        {
            key: torch.from_numpy(synthetic_array(prefix + key, tuple(tensor.shape)))
            for key, tensor in model.state_dict().items()
        }
    )
