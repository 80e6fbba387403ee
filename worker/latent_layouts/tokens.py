"""Sequences of patches back to grids of latents."""

from __future__ import annotations

import torch


def unpack(latents: torch.Tensor, *, rows: int, columns: int, patch: int) -> torch.Tensor:
    """Packed square patches back to pictures of latents.

    Args:
        latents: (B, (h/p)·(w/p), p²·C).
        rows: h/p.
        columns: w/p.
        patch: p.

    Returns:
        (B, C, h, w).

    Sources: pipelines/flux/pipeline_flux.py `FluxPipeline._unpack_latents`; pipelines/krea2/pipeline_krea2.py
    `Krea2Pipeline._unpack_latents` (any patch size); pipelines/bria_fibo/pipeline_bria_fibo.py
    `BriaFiboPipeline._unpack_latents_no_patch` and pipelines/qwenimage21/pipeline_qwenimage21.py
    `QwenImage21Pipeline._unpack_latents` (patches of one).
    """
    batch, _, packed = latents.shape
    channels = packed // (patch * patch)
    latents = latents.view(batch, rows, columns, channels, patch, patch)  # B, h/p, w/p, C, p, p
    latents = latents.permute(0, 3, 1, 4, 2, 5)  # B, C, h/p, p, w/p, p
    # With patches of one, pipelines hold their tokens as a view of (B, C, h, w), which steps of a scheduler keep: so
    # their VAE gets contiguous latents, for which convolutions have other kernels than for those of channels last.
    return latents.reshape(batch, channels, rows * patch, columns * patch).contiguous()  # B, C, h, w


def unpack_layers(latents: torch.Tensor, *, layers: int, rows: int, columns: int) -> torch.Tensor:
    """The pictures behind the first, each as a clip of one frame.

    Args:
        latents: (B, (n+1)·(h/2)·(w/2), 4·C).
        layers: n.
        rows: h/2.
        columns: w/2.

    Returns:
        (B·n, C, 1, h, w).

    Source: pipelines/qwenimage/pipeline_qwenimage_layered.py `QwenImageLayeredPipeline._unpack_latents`, `__call__`.
    """
    batch, _, packed = latents.shape
    channels = packed // 4
    latents = latents.view(batch, layers + 1, rows, columns, channels, 2, 2)  # B, n+1, h/2, w/2, C, 2, 2
    latents = latents.permute(0, 1, 4, 2, 5, 3, 6)  # B, n+1, C, h/2, 2, w/2, 2
    latents = latents.reshape(batch, layers + 1, channels, rows * 2, columns * 2)  # B, n+1, C, h, w
    latents = latents.permute(0, 2, 1, 3, 4)[:, :, 1:]  # B, C, n, h, w
    # B, C, n, h, w → B, n, C, h, w → B·n, C, 1, h, w
    return latents.permute(0, 2, 1, 3, 4).reshape(-1, channels, 1, rows * 2, columns * 2)


def unpack_video(latents: torch.Tensor, *, frames: int, rows: int, columns: int, patch: int) -> torch.Tensor:
    """Packed clips of latents, patches of one frame.

    Args:
        latents: (B, f·(h/p)·(w/p), p²·C).
        frames: f.
        rows: h/p.
        columns: w/p.
        patch: p.

    Returns:
        (B, C, f, h, w).

    Source: pipelines/ltx/pipeline_ltx.py `LTXPipeline._unpack_latents`.
    """
    batch = latents.shape[0]
    latents = latents.reshape(batch, frames, rows, columns, -1, 1, patch, patch)  # B, f, h/p, w/p, C, 1, p, p
    latents = latents.permute(0, 4, 1, 5, 2, 6, 3, 7)  # B, C, f, 1, h/p, p, w/p, p
    return latents.flatten(6, 7).flatten(4, 5).flatten(2, 3)  # B, C, f, h, w


def tokens_to_grid(latents: torch.Tensor, *, rows: int, columns: int) -> torch.Tensor:
    """(B, h·w, C) → (B, C, h, w), tokens in raster order.

    Source: pipelines/flux2/pipeline_flux2.py `Flux2Pipeline._unpack_latents_with_ids`, whose ids count rows and columns
    of a picture from zero (`_prepare_latent_ids`), so that scattering by them is this.
    """
    batch, _, channels = latents.shape
    # The pipeline permutes each picture and stacks them, which makes the result contiguous.
    return latents.view(batch, rows, columns, channels).permute(0, 3, 1, 2).contiguous()


def patchify(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) → (B, 4·C, h/2, w/2): 2×2 patches as channels.

    Source: pipelines/bria_fibo2/pipeline_bria_fibo2.py `BriaFibo2Pipeline._patchify_latents`.
    """
    batch, channels, rows, columns = latents.shape
    latents = latents.view(batch, channels, rows // 2, 2, columns // 2, 2)  # B, C, h/2, 2, w/2, 2
    latents = latents.permute(0, 1, 3, 5, 2, 4)  # B, C, 2, 2, h/2, w/2
    return latents.reshape(batch, channels * 4, rows // 2, columns // 2)


def unpatchify(latents: torch.Tensor) -> torch.Tensor:
    """(B, 4·C, h/2, w/2) → (B, C, h, w).

    Source: pipelines/flux2/pipeline_flux2.py `Flux2Pipeline._unpatchify_latents`.
    """
    batch, channels, rows, columns = latents.shape
    latents = latents.reshape(batch, channels // 4, 2, 2, rows, columns)  # B, C, 2, 2, h/2, w/2
    latents = latents.permute(0, 1, 4, 2, 5, 3)  # B, C, h/2, 2, w/2, 2
    return latents.reshape(batch, channels // 4, rows * 2, columns * 2)


def unpatchify_last(latents: torch.Tensor) -> torch.Tensor:
    """(B, 4·C, h/2, w/2), the channel innermost → (B, C, h, w).

    Source: pipelines/ideogram4/pipeline_ideogram4.py `Ideogram4Pipeline.__call__`.
    """
    batch, channels, rows, columns = latents.shape
    latents = latents.permute(0, 2, 3, 1).reshape(batch, rows, columns, 2, 2, channels // 4)  # B, h/2, w/2, 2, 2, C
    latents = latents.permute(0, 5, 1, 3, 2, 4).contiguous()  # B, C, h/2, 2, w/2, 2
    return latents.view(batch, channels // 4, rows * 2, columns * 2)


def item_patches(latents: torch.Tensor, *, rows: int, columns: int) -> torch.Tensor:
    """Patches of the result, which come before those of its references, to a clip of one frame.

    Args:
        latents: (B, N, C, 1, p, p).
        rows: h/p.
        columns: w/p.

    Returns:
        (B, C, 1, h, w).

    Source: pipelines/joyimage/pipeline_joyimage_edit_plus.py `JoyImageEditPlusPipeline.__call__`.
    """
    batch, _, channels, _, patch, _ = latents.shape
    latents = latents[:, : rows * columns].reshape(batch, 1, rows, columns, channels, 1, patch, patch)
    latents = latents.permute(0, 4, 1, 5, 2, 6, 3, 7)  # B, C, 1, 1, h/p, p, w/p, p
    return latents.reshape(batch, channels, 1, rows * patch, columns * patch)
