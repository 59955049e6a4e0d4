"""Made-up backends run where they are asked for and are gone afterwards."""

from __future__ import annotations

import pytest
import torch
from support.backends import made_up_backend

from evsam_kernels import BackendUnavailableError, ops
from evsam_kernels.ops.layout import empty_channels_last
from evsam_kernels.ops.registry import has_kernel


def test_made_up_backend():
    x = torch.zeros(1, 2, 3, 3)

    def ones(x, weight, bias, eps):
        return empty_channels_last(x, x.shape).fill_(1)

    with made_up_backend("other", layer_norm_2d=ones):
        assert ops.layer_norm_2d(x, backend="other").eq(1).all()
        with pytest.raises(BackendUnavailableError, match="'other' has no kernel for conv_act"):
            ops.conv_act(x, torch.zeros(2, 2, 1, 1), backend="other")
    assert not has_kernel("layer_norm_2d", "other")
    with pytest.raises(ValueError, match="got 'other'"):
        ops.layer_norm_2d(x, backend="other")
