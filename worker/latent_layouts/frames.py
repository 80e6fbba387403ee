"""Frames and channels: where they are in latents, where `decode` wants them, and where it leaves them."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F

#: The statistics pixels of ImageNet are normalised with, which MiniMax-H3's VAE returns them in
#: (modular_pipelines/minimax_h3/modular_pipeline.py `MiniMaxH3ModularPipeline.pixel_mean`, `pixel_std`).
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)


#: ARRI LogC3 at EI 800 (pipelines/ltx2/image_processor.py `LTX2VideoHDRProcessor`): light up to `CUT` is linear in the
#: code value, above it the logarithm is.
_A, _B, _C, _D, _E, _F, _CUT = 5.555556, 0.052272, 0.247190, 0.385537, 5.367655, 0.092809, 0.010591


def fold_frames(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, F, h, w) → (B·F, C, h, w), for image VAEs that decode frame by frame.

    Source: pipelines/animatediff/pipeline_animatediff.py `decode_latents`.
    """
    batch, channels, frames, rows, columns = latents.shape
    # B, C, F, h, w → B, F, C, h, w → B·F, C, h, w
    return latents.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, rows, columns)


def unfold_frames(decoded: torch.Tensor, *, num_frames: int) -> torch.Tensor:
    """(B·F, 3, H, W) → (B, 3, F, H, W), float32 whatever the VAE's dtype.

    Source: pipelines/animatediff/pipeline_animatediff.py `decode_latents`.
    """
    # B·F, 3, H, W → B, F, 3, H, W → B, 3, F, H, W
    return decoded.reshape(-1, num_frames, *decoded.shape[1:]).permute(0, 2, 1, 3, 4).float()


def frames_first(latents: torch.Tensor, *, skip: int) -> torch.Tensor:
    """(B, f, C, h, w) → (B, C, f - skip, h, w).

    Source: pipelines/cogvideo/pipeline_cogvideox.py `__call__` (additional_frames), `decode_latents`.
    """
    return latents[:, skip:].permute(0, 2, 1, 3, 4)


def channels_last(latents: torch.Tensor) -> torch.Tensor:
    """(B, f, h, w, C) → (B, C, f, h, w).

    Source: pipelines/kandinsky5/pipeline_kandinsky.py `Kandinsky5T2VPipeline.__call__`. Not made contiguous: there the
    VAE gets the strides of channels last, too, for which convolutions have other kernels; and by way of six dimensions,
    as there: of a single clip or picture, that gives the first dimension a stride that is not taken for channels last.
    """
    batch, count, rows, columns, channels = latents.shape
    latents = latents.reshape(batch, 1, count, rows, columns, channels).permute(0, 1, 5, 2, 3, 4)  # B, 1, C, f, h, w
    return latents.reshape(batch, channels, count, rows, columns)


def channels_last_image(latents: torch.Tensor) -> torch.Tensor:
    """(B, 1, h, w, C) → (B, C, h, w).

    Source: pipelines/kandinsky5/pipeline_kandinsky_t2i.py `Kandinsky5T2IPipeline.__call__`, with strides as above.
    """
    batch, _, rows, columns, channels = latents.shape
    latents = latents.reshape(batch, 1, 1, rows, columns, channels).permute(0, 1, 5, 2, 3, 4)  # B, 1, C, 1, h, w
    return latents.reshape(batch, channels, rows, columns)


def split_frame_pairs(latents: torch.Tensor) -> torch.Tensor:
    """(B, 2·C, f, h, w) → (B, C, 2·f - 1, h, w): channels hold two frames, of which the very first is left out.

    Source: pipelines/hunyuan_image/pipeline_hunyuanimage_refiner.py `_restore_image_tokens_order`.
    """
    batch, channels, frames, rows, columns = latents.shape
    latents = latents.permute(0, 2, 1, 3, 4)  # B, f, 2·C, h, w
    latents = latents.reshape(batch, frames * 2, channels // 2, rows, columns)  # B, 2·f, C, h, w
    return latents.permute(0, 2, 1, 3, 4)[:, :, 1:]  # B, C, 2·f - 1, h, w


def resize_and_crop(decoded: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """(n, 3, H, W) or (n, 3, F, H, W) scaled so that it covers height × width, then cropped from the middle.

    Sources: image_processor.py `PixArtImageProcessor.resize_and_crop_tensor`, video_processor.py
    `VideoProcessor.resize_and_crop_tensor`.
    """
    found_height, found_width = decoded.shape[-2:]
    if (found_height, found_width) == (height, width):
        return decoded
    ratio = max(height / found_height, width / found_width)
    size = int(found_height * ratio), int(found_width * ratio)
    is_clip = decoded.ndim == 5
    batch = decoded.shape[0]
    if is_clip:  # n, 3, F, H, W → n·F, 3, H, W
        decoded = decoded.permute(0, 2, 1, 3, 4).flatten(0, 1)
    decoded = F.interpolate(decoded, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    decoded = decoded[:, :, top : top + height, left : left + width]
    if is_clip:  # n·F, 3, H, W → n, F, 3, H, W → n, 3, F, H, W
        decoded = decoded.reshape(batch, -1, *decoded.shape[1:]).permute(0, 2, 1, 3, 4)
    return decoded


def undo_imagenet(decoded: torch.Tensor) -> torch.Tensor:
    """(n, 3, F, H, W) normalised as ImageNet's pixels → the same in [0, 1], float32.

    Source: modular_pipelines/minimax_h3/decoders.py `MiniMaxH3VideoDecodeStep.__call__`.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=decoded.device).view(1, -1, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=decoded.device).view(1, -1, 1, 1, 1)
    return (decoded.float() * std + mean).clamp(0, 1)


def expand_logc3(decoded: torch.Tensor) -> torch.Tensor:
    """(n, 3, F, H, W) of LogC3 in [-1, 1] → linear light from 0 to 55, 1 is white, float32.

    Source: pipelines/ltx2/image_processor.py `LTX2VideoHDRProcessor.postprocess_hdr_video`, `_logc3_decompress`.
    """
    code = (decoded.float() * 0.5 + 0.5).clamp(0, 1)
    above = (torch.pow(10.0, (code - _D) / _C) - _B) / _A
    below = (code - _F) / _E
    return torch.where(code >= _E * _CUT + _F, above, below)
