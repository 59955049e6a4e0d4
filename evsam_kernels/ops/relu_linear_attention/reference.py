"""The formula of `relu_linear_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kernel_attention(
    q: Tensor,  # [B, heads, dim, T], the kernel function already applied
    k: Tensor,  # [B, heads, dim, T], likewise
    v: Tensor,  # [B, heads, dim, T]
    eps: float,
) -> Tensor:  # [B, heads, dim, T]
    """sum_j v_j (k_j . q_i) / (sum_j k_j . q_i + eps) for every token i.

    The products are associated in the cheaper order: through the dim x dim state for many tokens,
    through the token x token scores for few.
    """
    dim, tokens = q.shape[-2:]
    if tokens > dim:
        state = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(-1, -2)  # [B, heads, dim + 1, dim]
        out = state @ q  # [B, heads, dim + 1, T]
        return out[:, :, :-1] / (out[:, :, -1:] + eps)
    scores = k.transpose(-1, -2) @ q  # [B, heads, T(keys), T(queries)]
    return v @ (scores / (scores.sum(dim=2, keepdim=True) + eps))


def relu_linear_attention(
    qkv: Tensor,  # [B, heads * 3 * dim, H, W]
    head_dim: int,
    eps: float = 1e-15,
) -> Tensor:  # [B, heads * dim, H, W]
    """Linear attention with the kernel relu(q) . relu(k), per head."""
    batch, channels, height, width = qkv.shape
    heads = channels // (3 * head_dim)
    q, k, v = qkv.reshape(batch, heads, 3 * head_dim, height * width).split(head_dim, dim=2)
    out = kernel_attention(torch.relu(q), torch.relu(k), v, eps)
    return out.reshape(batch, heads * head_dim, height, width)
