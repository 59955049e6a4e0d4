"""SAM's mask decoder for many prompts of one image: what they share is computed once.

The algebra is exact; only rounding differs. N positions, C channels, h heads of d, T tokens; J
subtracts the mean over the channels; Wo, bo are an attention's output projection, g, b a
LayerNorm's weight and bias, PE the positional encoding. E `[N, C]`, the image with a dense map that
all prompts share, is the keys before the first block.

1. In a block the image attends to the tokens: softmax weights P `[N, h T]` times values v,
   projected. The weights of a head sum to 1, so that the last token's can be left out: with values
   less that token's, P has h (T - 1) columns, and what the last token adds is the same everywhere.
   Before the LayerNorm the keys are, centred,

       z1 = A1 + [P0, 1] R1,   A1 = (E + bo0) J,   R1 = [v0_h Wo0_h; v0_last Wo0] J.

   What the values' bias gives is the same everywhere too and is left to bo0: it may be large and
   bo0 may take it away again. A softmax over tokens does not change when one's scores are
   subtracted.
2. LayerNorm divides by the deviation: with r = 1 / sqrt(var + eps), keys1 = r z1 g + b, and
   `C var = |A1|^2 + 2 X A1.R1 + X (R1 R1^T) X^T`, X = [P0, 1]. R1 is the values times a matrix, and
   so A1.R1 is the values times what is computed once. Where these terms cancel, z1 itself is
   computed.
3. A linear map M of keys1 is `r (A1 g M) + (r X) (R1 g M) + b M`. A1 g M is shared; R1 g M is the
   values times a small matrix. So are the scores of the next attentions computed, and its output,
   as the sum over positions commutes with M. What is the same at every position drops out of a
   softmax over positions.
4. The second block: with A2 = A1 g J,

       z2 = r A2 + [r X, P1, 1] [R1 g J; v1_h Wo1_h J; (v1_last Wo1 + bo1 + b) J],

   which has the form of z1 again: a scale times a shared base, and a basis `[N, 2 h (T - 1) + 2]`
   times a few rows. The last attention and the first transposed convolution are linear maps of it.
5. The tokens whose output is used are those of the quality and of the masks that are returned, and
   the quality is known before any mask is upscaled.
"""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from evsam_kernels.nn.folded import FoldedBlock
from evsam_kernels.ops.kept import kept
from evsam_kernels.ops.layout import accumulation_dtype
from evsam_kernels.ops.registry import chosen_backend
from evsam_kernels.ops.shared_mask_decoder.reference import (
    Basis,
    Linear,
    Norm,
    SharedMap,
    Upscaling,
    Values,
)
from evsam_kernels.sam.mask_decoder import MLP, Attention, MaskDecoder, TwoWayAttentionBlock

_BASIS_BYTES = 80 << 20
"""Bounds the memory of what prompts have of their own: 2.4 MB for each of one point."""
_MOST_TOKENS = 17
"""From there on, P v has fewer columns than P: d = 16 of each head."""
HEAD_DIM = 16
"""Channels of a head of the attentions between tokens and image."""


class _Tables(NamedTuple):
    """What a block's values give to z, and linear maps of that; `Values` says what a table is."""

    rows: Tensor  # [h d + 1, C]
    keys: Tensor  # [h d + 1, h d], of the next attention of the tokens
    values: Tensor  # [h d + 1, h d]
    following: Tensor  # of what comes after it: the next block's queries, or the upscaling


class _Weights(NamedTuple):
    """The decoder's weights, multiplied out. What makes queries is divided by sqrt(d)."""

    constant: Tensor  # [C], added to E
    to_keys0: Tensor  # [h d, C]
    to_values0: Tensor
    to_queries0: Tensor
    query_biases: tuple[Tensor, Tensor]  # [h d], of either block
    value_biases: tuple[Tensor, Tensor, Tensor]  # and of the last attention
    between: Tensor  # [C], g from A1 to A2
    first: _Tables  # of what the first block gives to z1
    second: tuple[_Tables, _Tables]  # of what both blocks give to z2
    maps1: Tensor  # [3 h d, C], of keys1 to keys, values and queries
    maps2: Tensor  # [2 h d + 4 M, C], of keys2 to keys, values and the upscaling
    to_keys1: Tensor  # [h d, C], of the positional encoding
    to_queries1: Tensor
    to_keys2: Tensor
    eps: tuple[float, float]
    upscaling: Upscaling
    wide: MaskDecoder | None
    """The decoder at the dtype in which it computes; None where it has that dtype itself."""


class _Image(NamedTuple):
    """What all prompts of an image share."""

    weights: _Weights
    size: tuple[int, int]
    keys: tuple[SharedMap, SharedMap, SharedMap]
    values: tuple[Tensor, Tensor, Tensor]
    queries: tuple[SharedMap, SharedMap]
    features: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
    norms: tuple[Norm, Norm]
    upscaling: Tensor
    memory: Any  # Of the stages, for results.

    def prompts_at_once(self, prompts: int, tokens: int) -> int:
        """Of so many prompts, each of so many tokens, how many are decoded at once."""
        heads = len(self.weights.to_keys0) // HEAD_DIM
        ranks = 3 * (heads * (tokens - 1) + 1)  # A third of them after the first block.
        square = self.norms[0].square
        most = max(1, _BASIS_BYTES // (ranks * square.numel() * square.element_size()))
        return -(-prompts // -(-prompts // most))


class _Inputs(NamedTuple):
    """What an image's shared part was made of."""

    weights: _Weights
    backend: str
    embedding: Tensor | int  # Its version, or the values of an inference tensor, which has none.
    pe: Tensor
    dense: Tensor

    def equal(self, other: _Inputs) -> bool:
        return (
            self.weights is other.weights
            and self.backend == other.backend
            and _equal(self.embedding, other.embedding)
            and torch.equal(self.pe, other.pe)
            and torch.equal(self.dense, other.dense)
        )

    def copied(self) -> _Inputs:
        own = self.embedding
        return self._replace(
            embedding=own.clone() if isinstance(own, Tensor) else own,
            pe=self.pe.clone(),
            dense=self.dense.clone(),
        )


class SharedMaskDecoder(FoldedBlock, MaskDecoder):
    """A `MaskDecoder` for inference; prompts of one image share what does not depend on them.

    Arguments, results and state are those of `MaskDecoder`. It computes in float32 (float64 for
    float64) whatever its dtype; but with bfloat16 weights, and a CPU that has an instruction for
    it, what the upscaling multiplies is rounded to bfloat16. What an image's prompts share is kept
    for as long as the image embedding is there; `set_image` makes it ahead of the first prompt.

    Prompts with dense maps of their own (masks), of more than 12 tokens (11 points, or 10 and a
    box) or on several images, those that need gradients, and those where no kernel runs and none
    was asked for, take the plain path. So does a single prompt on an image that was not set,
    and everything under `torch.compile` and `torch.export`.

    Args:
        decoder: whose modules it takes over; depth 2.
        backend: "auto", or the backend that must run the shared path.
    """

    operation = "shared_mask_decoder"
    only_launches = False

    def __init__(self, decoder: MaskDecoder, *, backend: str = "auto") -> None:
        nn.Module.__init__(self)  # MaskDecoder's own would make modules.
        self.backend = backend
        for name, child in decoder.named_children():
            setattr(self, name, child)
        self.transformer_dim = decoder.transformer_dim
        self.num_multimask_outputs = decoder.num_multimask_outputs
        self.num_mask_tokens = decoder.num_mask_tokens
        self.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"backend={self.backend}"

    @torch.no_grad()
    def set_image(
        self, image_embeddings: Tensor, image_pe: Tensor, dense_prompt_embeddings: Tensor
    ) -> None:
        """Compute what the prompts of an image share, for the calls to come.

        Args:
            image_embeddings: `[1, C, h, w]`, as it will be given with the prompts.
            image_pe: `[1, C, h, w]`.
            dense_prompt_embeddings: `[1, C, h, w]`, that of prompts without a mask.
        """
        dense = dense_prompt_embeddings[:1]
        if self._can_share(image_embeddings, image_pe, self.num_mask_tokens + 1):
            with torch.autocast(image_embeddings.device.type, enabled=False):
                self._image(image_embeddings, image_pe, dense, make=True)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `MaskDecoder.forward`."""
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return self._decode(
            image_embeddings,
            image_pe,
            sparse_prompt_embeddings,
            dense_prompt_embeddings,
            range(self.num_mask_tokens)[chosen],
        )

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See `MaskDecoder.predict_masks`."""
        return self._decode(
            image_embeddings,
            image_pe,
            sparse_prompt_embeddings,
            dense_prompt_embeddings,
            range(self.num_mask_tokens),
        )

    def decode_above(
        self,
        threshold: float,
        *,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, but only masks whose predicted IoU exceeds a threshold are upscaled.

        Returns:
            Mask logits `[K, 4 h, 4 w]` of those, prompt by prompt, and predicted IoU `[B, M]` of
            all, the one compared with the threshold.
        """
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        inputs = (
            image_embeddings,
            image_pe,
            sparse_prompt_embeddings,
            dense_prompt_embeddings,
            range(self.num_mask_tokens)[chosen],
        )
        shared = self._shared(*inputs, keep=lambda iou: iou.float() > threshold)
        if shared is not None:
            return shared
        masks, iou = self._plain(*inputs)
        return masks[iou.float() > threshold], iou

    def _decode(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        shared = self._shared(*inputs, keep=lambda iou: torch.ones_like(iou, dtype=torch.bool))
        if shared is None:
            return self._plain(*inputs)
        masks, iou = shared
        return masks.unflatten(0, iou.shape), iou

    def _plain(
        self, image: Tensor, pe: Tensor, sparse: Tensor, dense: Tensor, chosen: range
    ) -> tuple[Tensor, Tensor]:
        masks, iou = MaskDecoder.predict_masks(self, image, pe, sparse, dense)
        return masks[:, chosen.start : chosen.stop], iou[:, chosen.start : chosen.stop]

    def _shared(
        self,
        image: Tensor,
        pe: Tensor,
        sparse: Tensor,
        dense: Tensor,
        chosen: range,
        *,
        keep: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor] | None:
        """Masks `[K, 4 h, 4 w]` of those that `keep` picks by their IoU, and IoU `[B, M]` of all.

        None where the prompts have to take the plain path.
        """
        batch = sparse.shape[0]
        if (
            batch == 0
            or torch.compiler.is_compiling()  # A graph cannot hold what is kept with an image.
            or not (dense.shape[0] == 1 or (dense.shape[0] == batch and dense.stride(0) == 0))
            or not self._can_share(image, pe, 1 + self.num_mask_tokens + sparse.shape[1])
            or (torch.is_grad_enabled() and any(x.requires_grad for x in (image, sparse, dense)))
        ):
            return None
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            state = self._image(image, pe, dense[:1], make=batch > 1)
            if state is None:
                return None
            decoder = state.weights.wide or self
            learned = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
            prompts = torch.cat([learned.expand(batch, -1, -1), sparse.to(learned.dtype)], dim=1)
            stages = self._stages(image.device)[1]
            height, width = (4 * side for side in state.size)
            masks = state.memory.empty(batch * len(chosen), height, width, like=learned)
            decoding = _Decoding(state, decoder, stages)
            all_tokens = decoding.first_block(prompts)
            at_once = state.prompts_at_once(*prompts.shape[:2])
            scores, done = [], 0
            for prompt, tokens in zip(
                prompts.split(at_once), all_tokens.split(at_once), strict=True
            ):
                iou, count = decoding.from_second_block(
                    prompt, tokens, chosen, lambda iou: keep(iou.to(self.dtype)), masks[done:]
                )
                scores.append(iou)
                done += count
            return masks[:done].to(self.dtype), torch.cat(scores).to(self.dtype)

    def _stages(self, device: torch.device) -> tuple[str, Any]:
        """The backend that runs the stages, and its functions."""
        name = chosen_backend(self.operation, self.backend, device.type, self.dtype)
        return name, importlib.import_module(f"evsam_kernels.ops.{self.operation}.{name}")

    def _can_share(self, image: Tensor, pe: Tensor, tokens: int) -> bool:
        if image.shape[0] != 1 or pe.shape[0] != 1 or tokens > _MOST_TOKENS:
            return False
        return self.backend != "auto" or self._stages(image.device)[0] != "reference"

    def _image(self, image: Tensor, pe: Tensor, dense: Tensor, *, make: bool) -> _Image | None:
        """What the prompts of an image share: what is kept, or made anew where `make` allows it."""
        # With a tensor that no kernel packs: what that made of it would be dropped.
        tensors = [self.iou_token.weight, *self.parameters()]
        weights = kept(tensors, (self.operation,), lambda: _multiplied_out(self))
        backend, stages = self._stages(image.device)
        uniform = dense.stride()[2:] == (0, 0)  # No mask: the same everywhere.
        inputs = _Inputs(
            weights,
            backend,
            image if image.is_inference() else image._version,
            pe,
            dense[:, :, :1, :1] if uniform else dense,
        )
        # A slice of a batch of embeddings is made anew by every call; what it is a slice of is not.
        owner = image if image._base is None else image._base
        key = id(self), image.dtype, image.shape, image.stride(), image.storage_offset()
        with _lock:
            before, shared = _images.get(owner, {}).get(key, (None, None))
            if before is not None and inputs.equal(before):
                return shared
            if not make:
                return None
            made = _shared_by_prompts(weights, stages, image, pe, dense)
            if uniform:
                _images.setdefault(owner, {})[key] = inputs.copied(), made
            return made


class _Decoding:
    """The stages of the decoder, for prompts of one image."""

    def __init__(self, image: _Image, decoder: Any, stages: Any) -> None:
        self._image = image
        self._weights = image.weights
        self._decoder = decoder
        self._stages = stages

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        projected: Tensor = self._stages.feed_forward([_linear(layer)], x)
        return projected

    def attended_to_tokens(
        self, attention: Attention, x: Tensor, tokens: Tensor, norm: nn.LayerNorm, residual: bool
    ) -> Tensor:
        """LayerNorm of the tokens after they have attended to one another, by queries and keys
        of `x`."""
        stages = self._stages
        heads = stages.attend_tokens(
            self.project(attention.q_proj, x),
            self.project(attention.k_proj, x),
            self.project(attention.v_proj, tokens),
            attention.num_heads,
        )
        out: Tensor = stages.feed_forward(
            [_linear(attention.out_proj)], heads, tokens if residual else None, norm
        )
        return out

    def attended_to_image(
        self,
        attention: Attention,
        level: int,
        tokens: Tensor,
        prompt: Tensor,
        norm: nn.LayerNorm,
        basis: Basis | None = None,
        values: Sequence[Values] = (),
        tables: Sequence[_Tables] = (),
    ) -> Tensor:
        """LayerNorm of the tokens after they have attended to the keys after `level` blocks, which
        gave `values` to these."""
        image, stages = self._image, self._stages
        heads, scale = attention.num_heads, HEAD_DIM**-0.5
        projected = self.project(attention.q_proj, tokens + prompt)
        queries = (attention._heads(projected) * scale).mT.contiguous()
        row_queries = None
        if values:
            row_keys = stages.map_values(values, [of.keys for of in tables], heads)
            row_queries = row_keys @ queries
        positions = image.size[0] * image.size[1]
        found, of_basis = stages.attend_keys(
            queries, image.keys[level], image.values[level], basis, row_queries, positions
        )
        if values:
            row_values = stages.map_values(values, [of.values for of in tables], heads)
            found = found + of_basis @ row_values
        joined = found.transpose(1, 2).flatten(2) + self._weights.value_biases[level]
        out: Tensor = stages.feed_forward([_linear(attention.out_proj)], joined, tokens, norm)
        return out

    def first_block(self, prompt: Tensor) -> Tensor:
        """Tokens `[B, T, C]` after the first block, which needs no basis."""
        block = self._decoder.transformer.layers[0]
        tokens = self.attended_to_tokens(
            block.self_attn, prompt, prompt, block.norm1, residual=False
        )
        to_image = block.cross_attn_token_to_image
        tokens = self.attended_to_image(to_image, 0, tokens, prompt, block.norm2)
        return self.mlp(block, tokens)

    def mlp(self, block: TwoWayAttentionBlock, tokens: Tensor) -> Tensor:
        """LayerNorm of the tokens after the block's MLP."""
        layers = [_linear(block.mlp.lin1), _linear(block.mlp.lin2)]
        out: Tensor = self._stages.feed_forward(layers, tokens, tokens, block.norm3)
        return out

    def given(self, attention: Attention, tokens: Tensor, prompt: Tensor) -> tuple[Tensor, Values]:
        """The tokens' keys, less the last one's `[B, h, d, T - 1]`, and values to the image."""
        keys = self.project(attention.k_proj, tokens + prompt)
        # What the bias gives is the same everywhere.
        values = self._stages.feed_forward([Linear(attention.v_proj.weight, None)], tokens)
        last = F.pad(values[:, -1], (0, 1), value=1.0)
        return (
            _less_last(attention._heads(keys)),
            Values(_less_last(attention._heads(values)), last),
        )

    def from_second_block(
        self,
        prompt: Tensor,  # [B, T, C]
        tokens: Tensor,  # [B, T, C], after the first block
        chosen: range,
        keep: Callable[[Tensor], Tensor],
        masks: Tensor,
    ) -> tuple[Tensor, int]:
        """Writes the masks that `keep` picks; returns IoU `[B, M]` of all and their number."""
        image, stages, weights = self._image, self._stages, self._weights
        transformer = self._decoder.transformer
        first, second = transformer.layers

        # The image attends to the tokens of the first block.
        keys, given = self.given(first.cross_attn_image_to_token, tokens, prompt)
        values = [given]
        basis = stages.update_keys(
            keys,
            image.queries[0],
            None,
            None,
            values,
            image.features[0],
            image.norms[0],
            stages.map_values(values, [weights.first.rows], 1)[:, 0],
            image.memory,
        )

        # Second block.
        q = tokens + prompt
        tokens = self.attended_to_tokens(second.self_attn, q, tokens, second.norm1, residual=True)
        to_image = second.cross_attn_token_to_image
        tokens = self.attended_to_image(
            to_image, 1, tokens, prompt, second.norm2, basis, values, [weights.first]
        )
        tokens = self.mlp(second, tokens)
        keys, given = self.given(second.cross_attn_image_to_token, tokens, prompt)
        row_queries = stages.map_values(values, [weights.first.following], keys.shape[1])
        values = [*values, given]
        basis = stages.update_keys(
            keys,
            image.queries[1],
            basis,
            row_queries @ keys,
            values,
            image.features[1],
            image.norms[1],
            stages.map_values(values, [of.rows for of in weights.second], 1)[:, 0],
            image.memory,
        )

        # The last attention, of the tokens that are used.
        used = [0, *(1 + index for index in chosen)]
        tokens, prompt = tokens[:, used], prompt[:, used]
        to_image = transformer.final_attn_token_to_image
        tokens = self.attended_to_image(
            to_image, 2, tokens, prompt, transformer.norm_final_attn, basis, values, weights.second
        )

        def predicted(head: MLP, of: Tensor) -> Tensor:
            layers = [_linear(layer) for layer in head.layers]
            made: Tensor = stages.feed_forward(layers, of)
            return made

        iou = predicted(self._decoder.iou_prediction_head, tokens[:, 0])
        iou = iou[:, chosen.start : chosen.stop]
        picked = keep(iou)
        heads = [self._decoder.output_hypernetworks_mlps[index] for index in chosen]
        vectors = torch.stack(
            [predicted(head, tokens[:, 1 + place]) for place, head in enumerate(heads)], dim=1
        )
        wanted = vectors[picked]
        stages.upscale_masks(
            image.upscaling,
            basis,
            stages.map_values(values, [of.following for of in weights.second], 1)[:, 0],
            weights.upscaling,
            wanted,
            picked.sum(dim=1),
            masks[: len(wanted)],
        )
        return iou, len(wanted)


def _less_last(x: Tensor) -> Tensor:
    """Keys or values of tokens `[B, h, T, d]`, less the last one's: `[B, h, d, T - 1]`."""
    return (x[:, :, :-1] - x[:, :, -1:]).mT.contiguous()


def _linear(layer: Any) -> Linear:
    return Linear(layer.weight, layer.bias)


def _centred(x: Tensor, dim: int = -1) -> Tensor:
    return x - x.mean(dim, keepdim=True)


@torch.no_grad()
def _multiplied_out(decoder: MaskDecoder) -> _Weights:
    stored = decoder.iou_token.weight.dtype
    dtype = accumulation_dtype(stored)
    exact: Any = copy.deepcopy(decoder).double()
    first, second = exact.transformer.layers
    final = exact.transformer.final_attn_token_to_image
    to0, back0 = first.cross_attn_token_to_image, first.cross_attn_image_to_token
    to1, back1 = second.cross_attn_token_to_image, second.cross_attn_image_to_token
    g0, b0, g1, b1 = first.norm4.weight, first.norm4.bias, second.norm4.weight, second.norm4.bias
    conv, norm, _, conv2, _ = exact.output_upscaling
    scale = HEAD_DIM**-0.5

    def table(attention: Any, constant: Tensor) -> Tensor:
        return _centred(torch.cat([attention.out_proj.weight.mT, constant[None]]))

    # Centred, the mean over the channels of a pixel need not be subtracted.
    upscale = _centred(conv.weight.permute(2, 3, 1, 0), dim=2).flatten(0, 2)  # [4 M, C]
    rows1 = table(back0, torch.zeros_like(b0))
    rows2 = _centred(rows1 * g0), table(back1, b0 + back1.out_proj(back1.v_proj.bias))
    maps1 = torch.cat([to1.k_proj.weight, to1.v_proj.weight, back1.q_proj.weight * scale]) * g0
    maps2 = torch.cat([final.k_proj.weight, final.v_proj.weight, upscale]) * g1

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous()

    def tables(rows: Tensor, maps: Tensor) -> _Tables:
        inner = back0.v_proj.out_features
        mapped = (rows @ maps.mT).split([inner, inner, len(maps) - 2 * inner], dim=1)
        return _Tables(*map(rounded, (rows, *mapped)))

    return _Weights(
        constant=rounded(back0.out_proj(back0.v_proj.bias)),
        to_keys0=rounded(to0.k_proj.weight),
        to_values0=rounded(to0.v_proj.weight),
        to_queries0=rounded(back0.q_proj.weight * scale),
        query_biases=(rounded(back0.q_proj.bias * scale), rounded(back1.q_proj(b0) * scale)),
        value_biases=(
            rounded(to0.v_proj.bias),
            rounded(to1.v_proj(b0)),
            rounded(final.v_proj(b1)),
        ),
        between=rounded(g0),
        first=tables(rows1, maps1),
        second=(tables(rows2[0], maps2), tables(rows2[1], maps2)),
        maps1=rounded(maps1),
        maps2=rounded(maps2),
        to_keys1=rounded(to1.k_proj.weight),
        to_queries1=rounded(back1.q_proj.weight * scale),
        to_keys2=rounded(final.k_proj.weight),
        eps=(first.norm4.eps, second.norm4.eps),
        upscaling=Upscaling(
            rounded(upscale @ b1 + _centred(conv.bias).repeat(4)),
            rounded(norm.weight),
            rounded(norm.bias),
            norm.eps,
            rounded(conv2.weight.permute(0, 2, 3, 1).flatten(1, 2)),
            rounded(conv2.bias),
            stored,
        ),
        wide=None if dtype == stored else exact.to(dtype),
    )


def _shared_by_prompts(
    weights: _Weights, stages: Any, image: Tensor, pe: Tensor, dense: Tensor
) -> _Image:
    """`image`, `pe` and `dense` `[1, C, h, w]`."""
    dtype = weights.maps1.dtype
    inner = weights.to_keys0.shape[0]
    e = stages.tiled((image.to(dtype) + dense.to(dtype)).flatten(2)[0])  # [tiles, C, P]
    p = stages.tiled(pe.to(dtype).flatten(2)[0])
    a1 = _centred(e + weights.constant[:, None], dim=1)
    a2 = _centred(weights.between[:, None] * a1, dim=1)
    to_keys1, to_values1, to_queries1 = weights.maps1.split(inner)
    to_keys2, to_values2, upscale = weights.maps2.tensor_split([inner, 2 * inner])

    def values(maps: Tensor, base: Tensor) -> Tensor:
        return (base.mT @ maps.mT).flatten(0, 1)  # [tiles P, h d]

    def queries(level: int, maps: Tensor, base: Tensor) -> Tensor:
        return (maps @ base).add_(weights.query_biases[level][:, None])

    def norm(base: Tensor, eps: float) -> Norm:
        return Norm(base, base.square().sum(1), eps)

    # Products tile by tile leave the maps as the kernels read them.
    return _Image(
        weights=weights,
        size=(image.shape[2], image.shape[3]),
        keys=(
            SharedMap(weights.to_keys0 @ (e + p), None),
            SharedMap(to_keys1 @ a1, weights.to_keys1 @ p),
            SharedMap(to_keys2 @ a2, weights.to_keys2 @ p),
        ),
        values=(values(weights.to_values0, e), values(to_values1, a1), values(to_values2, a2)),
        queries=(
            SharedMap(queries(0, weights.to_queries0, e + p), None),
            SharedMap(to_queries1 @ a1, queries(1, weights.to_queries1, p)),
        ),
        features=((weights.first.rows @ a1,), tuple(of.rows @ a2 for of in weights.second)),
        norms=(norm(a1, weights.eps[0]), norm(a2, weights.eps[1])),
        upscaling=upscale @ a2,
        memory=stages.Memory(),
    )


def _equal(one: Tensor | int, other: Tensor | int) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other if isinstance(one, Tensor) or isinstance(other, Tensor) else one == other


_images: Any = WeakTensorKeyDictionary()
"""What prompts share and what it was made of, by embedding, or what that is a slice of, then by
decoder and the slice's layout."""
_lock = threading.Lock()
