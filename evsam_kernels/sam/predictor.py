"""Prompted segmentation: encode an image once, then ask for masks by points, boxes and masks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from evsam_kernels.ops.measure_masks.reference import Sizes
from evsam_kernels.sam.preprocess import (
    ImageInput,
    Size,
    as_image_array,
    coordinate_scale,
    resized_shape,
)

ArrayInput: TypeAlias = "np.ndarray | torch.Tensor | Sequence[Any]"

_MODEL_INTERFACE = (
    "image_encoder",
    "prompt_encoder",
    "mask_decoder",
    "image_size",
    "image_format",
    "mask_threshold",
    "transform",
    "postprocess_masks",
)
_MASK_INPUT_SIDE = 256
_POINT_LABELS = "1 (foreground), 0 (background) or -1 (padding, ignored)"


class EfficientViTSamPredictor:
    """Predicts masks for prompts on one image, or on several encoded together.

    Works with any model that has EfficientViT-SAM's attributes, whoever wrote it, fused or not.
    Images go to the model's device and dtype; coordinates are float32 and masks are upscaled in
    float32 whatever that dtype is.

    Everything runs under `torch.no_grad` and not under `torch.inference_mode`: embeddings and
    masks are ordinary tensors, which may be changed in place or feed a training loss.

    Attributes:
        model: the model given.
        is_image_set: whether images have been encoded.
        features: their embeddings `[B, 256, 64, 64]`, or None.
        original_size: (height, width) of the image; after `set_image_batch` with a list, a list
            of such pairs, one per image. None where no image is set.
        input_size: the same for the image as scaled into the prompt frame, 1024 a side.

    Raises:
        TypeError: `sam_model` lacks an attribute that EfficientViT-SAM has.
    """

    def __init__(self, sam_model: nn.Module) -> None:
        missing = [name for name in _MODEL_INTERFACE if not hasattr(sam_model, name)]
        if missing:
            raise TypeError(
                f"sam_model must be an EfficientViT-SAM, got {type(sam_model).__name__} without "
                f"{', '.join(missing)}; make one with create_efficientvit_sam_model"
            )
        self.model: Any = sam_model
        self.reset_image()

    @property
    def transform(self) -> EfficientViTSamPredictor:
        """The object with `apply_coords` and `apply_boxes`, where SAM's own predictor has it."""
        return self

    @property
    def device(self) -> torch.device:
        """The model's device."""
        device = getattr(self.model, "device", None)
        if isinstance(device, torch.device):
            return device
        tensor = _first_floating(self.model)
        return torch.device("cpu") if tensor is None else tensor.device

    def reset_image(self) -> None:
        """Forget the images that were set."""
        self.is_image_set = False
        self.features: torch.Tensor | None = None
        self.original_size: Size | list[Size] | None = None
        self.input_size: Size | list[Size] | None = None

    @torch.no_grad()
    def set_image(self, image: ImageInput, image_format: str = "RGB") -> None:
        """Encode one image. Whatever was set before is forgotten, also if this call fails.

        Args:
            image: uint8 `[H, W, 3]`, or a PIL image.
            image_format: order of the channels, "RGB" or "BGR".

        Raises:
            TypeError, ValueError: see `as_image_array`; or an unknown `image_format`.
        """
        self.reset_image()
        pixels = self._model_channels(as_image_array(image), image_format)
        features = self._encode(self.model.transform(pixels)[None])
        height, width, _ = pixels.shape
        self._set(features, (height, width))
        # A decoder that shares the image across prompts does so from the first prompt on.
        share = getattr(self.model.mask_decoder, "set_image", None)
        if share is not None:
            _, dense = self.model.prompt_encoder(points=None, boxes=None, masks=None)
            share(features, self.model.prompt_encoder.get_dense_pe(), dense)

    @torch.no_grad()
    def set_image_batch(
        self, image: torch.Tensor | Sequence[ImageInput], image_format: str = "RGB"
    ) -> None:
        """Encode several images in one pass; say by `image_index` which one a prompt is for.

        Whatever was set before is forgotten, also if this call fails.

        Args:
            image: a list of images as `set_image` takes, of any sizes: each keeps its own, and
                its masks come at that size. Or a floating tensor `[B, 3, S, S]` of images that
                the model's `transform` has preprocessed: original sizes are unknown then, and
                coordinates and masks are in the S x S input.
            image_format: order of the channels of a list of images, "RGB" or "BGR".

        Raises:
            TypeError, ValueError: neither of the two, or empty, or of the wrong shape or dtype.
        """
        self.reset_image()
        if isinstance(image, torch.Tensor):
            side = self.model.image_size[1]
            self._set(self._encode(_checked_batch(image, side)), (side, side))
            return
        if not isinstance(image, list | tuple):
            raise TypeError(
                "image must be a list of images or a preprocessed tensor [B, 3, S, S], got "
                f"{type(image).__name__}; one image goes to set_image"
            )
        if not image:
            raise ValueError("image is an empty list; give at least one image")
        pixels = [
            self._model_channels(as_image_array(one, f"image[{index}]"), image_format)
            for index, one in enumerate(image)
        ]
        features = self._encode(torch.stack([self.model.transform(one) for one in pixels]))
        self._set(features, [(one.shape[0], one.shape[1]) for one in pixels])

    def get_image_embedding(self) -> torch.Tensor:
        """Embeddings `[B, 256, 64, 64]` of the images that are set, in the encoder's dtype."""
        return self._require_features()

    def apply_coords(self, coords: np.ndarray, im_size: Size | None = None) -> np.ndarray:
        """Scale (x, y) from pixels of an image to the prompt frame.

        Args:
            coords: `[..., 2]`, any real dtype; left unchanged.
            im_size: height and width of that image; the image that is set where None.

        Returns:
            float64 `[..., 2]`.

        Raises:
            RuntimeError: `im_size` is None and no image is set.
            ValueError: `im_size` is None and several images are set.
        """
        scaled: np.ndarray = np.multiply(coords, self._scale(im_size), dtype=np.float64)
        return scaled

    def apply_boxes(self, boxes: np.ndarray, im_size: Size | None = None) -> np.ndarray:
        """Scale boxes (x0, y0, x1, y1), `[..., 4]`, as `apply_coords`; float64 `[N, 4]`."""
        return self.apply_coords(np.reshape(boxes, (-1, 2, 2)), im_size).reshape(-1, 4)

    def apply_coords_torch(self, coords: torch.Tensor, im_size: Size | None = None) -> torch.Tensor:
        """As `apply_coords` for a tensor `[..., 2]` on any device; float32 `[..., 2]`."""
        scale = torch.tensor(self._scale(im_size), device=coords.device)
        return coords.detach().to(torch.float32) * scale

    def apply_boxes_torch(self, boxes: torch.Tensor, im_size: Size | None = None) -> torch.Tensor:
        """As `apply_boxes` for a tensor `[..., 4]` on any device; float32 `[N, 4]`."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), im_size).reshape(-1, 4)

    def predict(
        self,
        point_coords: ArrayInput | None = None,
        point_labels: ArrayInput | None = None,
        box: ArrayInput | None = None,
        mask_input: ArrayInput | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        image_index: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt: any mixture of points, a box and an earlier mask, or none.

        Args:
            point_coords: `[N, 2]`, (x, y) in pixels of the image.
            point_labels: `[N]`, 1 for the object, 0 for the background, -1 for an ignored point.
            box: `[4]` or `[1, 4]`, (x0, y0, x1, y1) in pixels of the image.
            mask_input: `[1, 256, 256]`, low-resolution logits of an earlier prediction.
            multimask_output: three masks to choose from by score, best for a lone point; or one.
            return_logits: logits in place of booleans.
            image_index: which image, where several are set.

        Returns:
            masks: bool, or float32 logits, `[M, H, W]` at the image's own size; M is 3 or 1.
            scores: float32 `[M]`, the predicted IoU of each mask.
            low_res_logits: float32 `[M, 256, 256]`, fit for `mask_input`.

        Raises:
            RuntimeError: no image is set.
            TypeError, ValueError: an argument of the wrong kind or shape, values that are not
                finite, labels without points or the reverse, an unusable `image_index`.
        """
        index = self._checked_index(image_index)
        im_size = _at(self.original_size, index)
        coords, labels = _checked_points(point_coords, point_labels, (None,))
        if coords is not None and labels is not None:
            coords = torch.from_numpy(self.apply_coords(_to_float64(coords), im_size))[None]
            labels = labels[None]
        boxes = masks = None
        if box is not None:
            box = _as_tensor("box", box)
            box = _checked("box", box[0] if box.shape == (1, 4) else box, (4,))
            boxes = torch.from_numpy(self.apply_boxes(_to_float64(box), im_size))
        if mask_input is not None:
            masks = _checked("mask_input", mask_input, (1, _MASK_INPUT_SIDE, _MASK_INPUT_SIDE))
            masks = masks[None]
        low_res, scores = self.decode_prompts(
            coords, labels, boxes, masks, multimask_output, image_index=index
        )
        logits = self.upscale_masks(low_res, image_index=index)
        found = logits if return_logits else logits > self.model.mask_threshold
        return found[0].cpu().numpy(), _to_numpy(scores[0]), _to_numpy(low_res[0])

    def predict_torch(
        self,
        point_coords: torch.Tensor | None = None,
        point_labels: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        image_index: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks for a batch of B prompts on one image; coordinates are in the prompt frame.

        `apply_coords_torch` and `apply_boxes_torch` bring coordinates there.

        Args:
            point_coords: `[B, N, 2]`, (x, y). Prompts of fewer points are padded with label -1.
            point_labels: `[B, N]`, 1 for the object, 0 for the background, -1 for padding.
            boxes: `[B, 4]`, (x0, y0, x1, y1).
            mask_input: `[B, 1, 256, 256]` low-resolution logits, or `[1, 1, 256, 256]` for all.
            multimask_output: three masks per prompt, or one.
            return_logits: logits in place of booleans.
            image_index: which image, where several are set.

        Returns:
            masks: bool, or float32 logits, `[B, M, H, W]` at the image's own size; M is 3 or 1.
            scores: `[B, M]`, predicted IoU, in the decoder's dtype.
            low_res_logits: `[B, M, 256, 256]`, in the decoder's dtype.
            All are ordinary tensors on the model's device, without a graph.

        Raises:
            RuntimeError: no image is set.
            TypeError, ValueError: as for `predict`, or batches that are empty or differ in length.
        """
        index = self._checked_index(image_index)
        point_coords, point_labels = _checked_points(point_coords, point_labels, (None, None))
        if boxes is not None:
            boxes = _checked("boxes", boxes, (None, 4))
        if mask_input is not None:
            side = _MASK_INPUT_SIDE
            mask_input = _checked("mask_input", mask_input, (None, 1, side, side))
        _check_batch_lengths(point_coords, boxes, mask_input)
        low_res, scores = self.decode_prompts(
            point_coords, point_labels, boxes, mask_input, multimask_output, image_index=index
        )
        masks = self.upscale_masks(low_res, image_index=index)
        if not return_logits:
            masks = masks > self.model.mask_threshold
        return masks, scores, low_res

    @torch.no_grad()
    def decode_prompts(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        image_index: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`predict_torch` without its checks of the prompts and without the upscaling.

        For callers that drop most masks by their score before paying for full size.

        Returns:
            low-resolution logits `[B, M, 256, 256]` and scores `[B, M]`, in the decoder's dtype.
        """
        inputs = self._decoder_inputs(point_coords, point_labels, boxes, mask_input, image_index)
        low_res, scores = self.model.mask_decoder(**inputs, multimask_output=multimask_output)
        return low_res, scores

    @torch.no_grad()
    def decode_above(
        self,
        threshold: float,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        multimask_output: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`decode_prompts`, of which only masks of a score above a threshold are wanted.

        Scores are compared in float32: half precision would round the threshold.

        Returns:
            low-resolution logits `[K, 256, 256]` of those, prompt by prompt, and scores `[B, M]` of
            all, in the decoder's dtype.
        """
        inputs = self._decoder_inputs(point_coords, point_labels, None, None, None)
        decoder = self.model.mask_decoder
        if hasattr(decoder, "decode_above"):
            found: tuple[torch.Tensor, torch.Tensor] = decoder.decode_above(
                threshold, **inputs, multimask_output=multimask_output
            )
            return found
        low_res, scores = decoder(**inputs, multimask_output=multimask_output)
        return low_res[scores.float() > threshold], scores

    def _decoder_inputs(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        mask_input: torch.Tensor | None,
        image_index: int | None,
    ) -> dict[str, torch.Tensor]:
        index = self._checked_index(image_index)
        features = self._require_features()
        if features.shape[0] > 1:
            features = features[index : index + 1]
        device = self.device
        points = None
        if point_coords is not None and point_labels is not None:
            points = (
                point_coords.to(device=device, dtype=torch.float32),
                point_labels.to(device=device, dtype=torch.int32),
            )
        if boxes is not None:
            boxes = boxes.to(device=device, dtype=torch.float32)
        if mask_input is not None:
            mask_input = mask_input.to(
                device=device, dtype=_floating_dtype(self.model.prompt_encoder)
            )
        sparse, dense = self.model.prompt_encoder(points=points, boxes=boxes, masks=mask_input)
        return {
            "image_embeddings": features,
            "image_pe": self.model.prompt_encoder.get_dense_pe(),
            "sparse_prompt_embeddings": sparse,
            "dense_prompt_embeddings": dense,
        }

    @torch.no_grad()
    def upscale_masks(
        self, low_res_logits: torch.Tensor, image_index: int | None = None
    ) -> torch.Tensor:
        """Low-resolution logits `[B, M, 256, 256]` to float32 `[B, M, H, W]`, the image's size."""
        index = self._checked_index(image_index)
        masks: torch.Tensor = self.model.postprocess_masks(
            low_res_logits.float(), _at(self.input_size, index), _at(self.original_size, index)
        )
        return masks

    def mask_sizes(self, image_index: int | None = None) -> Sizes:
        """How low-resolution logits become masks of the image, as `ops.measure_masks` takes it."""
        index = self._checked_index(image_index)
        frame = self.model.image_size[0]
        return Sizes((frame, frame), _at(self.input_size, index), _at(self.original_size, index))

    def _model_channels(self, pixels: np.ndarray, image_format: str) -> np.ndarray:
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        if image_format == self.model.image_format:
            return pixels
        return np.ascontiguousarray(pixels[..., ::-1])

    def _encode(self, batch: torch.Tensor) -> torch.Tensor:
        encoder = self.model.image_encoder
        if any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
            for module in encoder.modules()
        ):
            warnings.warn(
                "the image encoder is in training mode: its BatchNorm layers use this image's "
                "statistics and change their own; call model.eval() first",
                stacklevel=4,
            )
        dtype = getattr(self.model, "dtype", None)
        if not isinstance(dtype, torch.dtype):
            dtype = _floating_dtype(encoder)
        features: torch.Tensor = encoder(batch.to(device=self.device, dtype=dtype))
        return features

    def _set(self, features: torch.Tensor, original_size: Size | list[Size]) -> None:
        frame = self.model.image_size[0]
        if isinstance(original_size, list):
            self.input_size = [resized_shape(*size, frame) for size in original_size]
        else:
            self.input_size = resized_shape(*original_size, frame)
        self.original_size = original_size
        self.features = features
        self.is_image_set = True

    def _require_features(self) -> torch.Tensor:
        if not self.is_image_set or self.features is None:
            raise RuntimeError("no image is set; call set_image or set_image_batch first")
        return self.features

    def _checked_index(self, image_index: int | None) -> int:
        count = self._require_features().shape[0]
        if image_index is None:
            if count > 1:
                raise ValueError(
                    f"{count} images are set; pass image_index, 0 to {count - 1}, to say which "
                    "one the prompt is for"
                )
            return 0
        if isinstance(image_index, bool) or not isinstance(image_index, Integral):
            raise TypeError(f"image_index must be an integer, got {image_index!r}")
        if not 0 <= image_index < count:
            raise ValueError(
                f"image_index must be from 0 to {count - 1} ({count} set), got {image_index}"
            )
        return int(image_index)

    def _scale(self, im_size: Size | None) -> tuple[float, float]:
        if im_size is not None:
            return coordinate_scale(im_size, resized_shape(*im_size, self.model.image_size[0]))
        count = self._require_features().shape[0]
        if isinstance(self.original_size, list) and count > 1:
            raise ValueError(
                f"{count} images of their own sizes are set; pass im_size, for example "
                "predictor.original_size[0]"
            )
        return coordinate_scale(_at(self.original_size, 0), _at(self.input_size, 0))


def _at(sizes: Size | list[Size] | None, index: int) -> Size:
    """The size of image `index`, where one pair may stand for all."""
    if sizes is None:
        raise RuntimeError("no image is set; call set_image or set_image_batch first")
    return sizes[index] if isinstance(sizes, list) else sizes


def _first_floating(module: nn.Module) -> torch.Tensor | None:
    """First floating parameter, or buffer where a fused module has no parameters left."""
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            if tensor.is_floating_point():
                return tensor
    return None


def _floating_dtype(module: nn.Module) -> torch.dtype:
    tensor = _first_floating(module)
    return torch.float32 if tensor is None else tensor.dtype


def _checked_batch(image: torch.Tensor, side: int) -> torch.Tensor:
    if not image.is_floating_point():
        raise TypeError(
            f"image must be a preprocessed floating tensor, got {image.dtype}; pass a list of "
            "uint8 arrays to have them preprocessed"
        )
    if image.dim() != 4 or image.shape[1:] != (3, side, side) or image.shape[0] == 0:
        raise ValueError(
            f"image must be a preprocessed tensor [B, 3, {side}, {side}] of at least one image, "
            f"got {list(image.shape)}; model.transform makes one such image"
        )
    return image


def _as_tensor(name: str, value: ArrayInput) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    try:
        return torch.from_numpy(np.array(value, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error


def _checked(name: str, value: ArrayInput, shape: tuple[int | None, ...]) -> torch.Tensor:
    """`value` as a tensor, once its shape (None is any length) and values are known to be good."""
    tensor = _as_tensor(name, value)
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return tensor


def _checked_points(
    coords: ArrayInput | None, labels: ArrayInput | None, shape: tuple[None, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Coordinates `[*shape, 2]` and labels `[*shape]`, both or neither."""
    if coords is None and labels is None:
        return None, None
    if coords is None:
        raise ValueError("point_labels came without point_coords; give both or neither")
    if labels is None:
        raise ValueError(
            f"point_coords came without point_labels; give one label per point, {_POINT_LABELS}"
        )
    coords = _checked("point_coords", coords, (*shape, 2))
    labels = _checked("point_labels", labels, shape)
    if labels.shape != coords.shape[:-1]:
        raise ValueError(
            "point_labels must have one label per point: expected shape "
            f"{list(coords.shape[:-1])}, got {list(labels.shape)}"
        )
    values = labels.float()  # an unsigned dtype would read -1 as 255
    unknown = values[(values != 1) & (values != 0) & (values != -1)]
    if unknown.numel():
        raise ValueError(f"point_labels must be {_POINT_LABELS}, got {unknown[0].item():g}")
    return coords, labels


def _check_batch_lengths(
    point_coords: torch.Tensor | None, boxes: torch.Tensor | None, mask_input: torch.Tensor | None
) -> None:
    lengths = {
        name: tensor.shape[0]
        for name, tensor in (("point_coords", point_coords), ("boxes", boxes))
        if tensor is not None
    }
    if mask_input is not None and (not lengths or mask_input.shape[0] != 1):
        lengths["mask_input"] = mask_input.shape[0]
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"prompts must agree on the batch length, but {given}")
    if 0 in lengths.values():
        raise ValueError(f"{next(iter(lengths))} has no prompts; skip the call for an empty batch")


def _to_float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().to(torch.float64).numpy()


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    # NumPy has no bfloat16, and float32 holds every float16 and bfloat16 exactly.
    return tensor.float().cpu().numpy()
