"""Low-memory decode in bfloat16 against diffusers', with trained weights: `python -m tools.trained_clip_rounding`.

Random weights amplify rounding (tests/support/last_bits.py). Here small VAEs of clips learn for some minutes to
reproduce moving discs. They learn little by then, but their weights no longer amplify.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from tests.support.clip_vaes import hunyuan_video
from tests.support.last_bits import psnr_db, rounding_db
from tests.support.pixel_norm_vaes import wan
from worker import lowmem_decode

VAES: Final[Mapping[str, Callable[[], Any]]] = {
    "hunyuan_video": lambda: hunyuan_video(block_out_channels=(16, 32, 32, 32), norm_num_groups=8, latent_channels=8),
    "wan": lambda: wan(base_dim=16, z_dim=8),
}


def moving_discs(count: int, *, frames: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """Clips (B, 3, F, H, W) in [-1, 1]: four discs that move over a slope of colour."""
    time = torch.linspace(0, 1, frames)[None, None, :, None, None]
    y, x = torch.linspace(-1, 1, side)[:, None], torch.linspace(-1, 1, side)

    def drawn(channels: int) -> torch.Tensor:
        return torch.rand(count, channels, 1, 1, 1, generator=generator) * 2 - 1

    out = 0.6 * drawn(3) + 0.4 * drawn(3) * y + 0.4 * drawn(3) * x + torch.zeros(count, 3, frames, side, side)
    for _ in range(4):
        across, down = drawn(1) + drawn(1) * time / 2, drawn(1) + drawn(1) * time / 2
        distance = ((x - across) ** 2 + (y - down) ** 2).sqrt()
        disc = torch.sigmoid((0.35 + 0.2 * drawn(1) - distance) * 30)
        out = out * (1 - disc) + drawn(3) * disc
    return out.clamp(-1, 1)


def trained(name: str, *, steps: int) -> Any:
    """One of the VAEs after so many steps."""
    torch.manual_seed(0)
    vae = VAES[name]()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        clips = moving_discs(4, frames=5, side=32, generator=generator)
        loss = (vae.decode(vae.encode(clips).latent_dist.mode()).sample - clips).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"{name} step {step}: {float(loss):.3f}", flush=True)
    return vae.eval()


def main(name: str, *, steps: int) -> None:
    """Trains and prints PSNR."""
    vae = trained(name, steps=steps)
    clips = moving_discs(2, frames=9, side=64, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        z = vae.encode(clips).latent_dist.mode()
        exact = vae.decode(z).sample
        half, z = vae.to(torch.bfloat16), z.to(torch.bfloat16)

        def plain() -> torch.Tensor:
            return half.decode(z).sample.float()  # type: ignore[no-any-return]

        expected = plain()
        for lean in (False, True):
            low = lowmem_decode.decode(half, z, lean=lean).float()
            print(f"{name}, {'lean' if lean else 'low_memory'} from plain: {psnr_db(low, expected):.1f} dB")
        print(f"{name}, plain from float32: {psnr_db(expected, exact):.1f} dB")
        print(f"{name}, plain from itself with last bits changed: {rounding_db(half, plain):.1f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", action="append", choices=list(VAES))
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    for chosen in arguments.vae or VAES:
        main(chosen, steps=arguments.steps)
