"""The fast way decodes what diffusers decodes, on the same weights, and leaves what diffusers loaded as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import tiny_families
from tests.support.kl_vaes import FAMILIES, family
from worker import lowmem_decode
from worker.fast_path import FastOptions, FastVaes, refusal, view_of
from worker.fast_path.families import families
from worker.fast_path.view import fused_norms
from worker.frame_stream import can_stream, stream_frames

#: Catalogue entries of clips whose classes have a fast way; the latents decoded have two frames.
CLIPS = ("wan", "wan22-5b", "qwen-image", "hunyuanvideo", "ltx", "ltx2")


def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        decoded: torch.Tensor = vae.decode(z, return_dict=False)[0]
        return decoded


def clip_vae(name: str) -> Any:
    return tiny_families.make(name, tiny_families.catalogue()[name])


def latents_of(vae: Any, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name in CLIPS:
        channels = tiny_families.catalogue()[name]["channels"]
        return torch.randn(1, channels, 2, 3, 4, generator=generator)
    return torch.randn(2, vae.config.latent_channels, 9, 7, generator=generator)


def storage(vae: Any) -> set[int]:
    return {parameter.data_ptr() for part in (vae.decoder, getattr(vae, "post_quant_conv", None)) if part is not None
            for parameter in part.parameters()}  # fmt: skip


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", [*FAMILIES, *CLIPS])
def test_it_decodes_as_diffusers_does_and_changes_nothing_it_was_given(name: str, memory_format: str) -> None:
    vae = clip_vae(name) if name in CLIPS else family(name)
    if name in CLIPS and memory_format == "channels_last":
        memory_format = "channels_last_3d"
    z = latents_of(vae, name)
    expected = decode(vae, z)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    modules = [id(part) for part in vae.modules()]

    view = view_of(vae, memory_format=memory_format, dtype=torch.float32)
    found = decode(view, z)

    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-4
    assert storage(view) == storage(vae)  # shared, not copied
    assert [id(part) for part in vae.modules()] == modules
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())
    assert torch.equal(decode(vae, z), expected)


def test_every_norm_before_a_silu_is_fused() -> None:
    """Two in each of 3 · 4 + 2 resnets of the decoder, and the last one; the attention's norm has no SiLU after it."""
    view = view_of(family("sd"), memory_format="contiguous", dtype=torch.float32)
    assert fused_norms(view) == 2 * (4 * 3 + 2) + 1
    wan = clip_vae("wan")
    norms = sum(type(part).__name__ == "WanRMS_norm" for part in wan.decoder.modules())
    attentions = sum(type(part).__name__ == "WanAttentionBlock" for part in wan.decoder.modules())
    assert fused_norms(view_of(wan, memory_format="contiguous", dtype=torch.float32)) == norms - attentions


def test_activations_are_in_the_memory_format_asked_for() -> None:
    view = view_of(family("sd"), memory_format="channels_last", dtype=torch.float32)
    seen = []
    view.decoder.conv_out.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    decode(view, torch.randn(1, 4, 8, 8))
    for activation in seen[0]:
        assert activation.is_contiguous(memory_format=torch.channels_last)
        assert not activation.is_contiguous()


def test_frames_of_a_clip_stream_from_it_too() -> None:
    vae = clip_vae("wan")
    view = view_of(vae, memory_format="channels_last_3d", dtype=torch.float32)
    z = latents_of(vae, "wan")
    assert can_stream(view)
    with torch.inference_mode():
        frames = torch.cat(list(stream_frames(view, z)), dim=2)
    assert float((frames - decode(vae, z)).abs().max()) <= 1e-4


def test_weights_in_bfloat16_are_copies_and_the_picture_is_near() -> None:
    vae = family("sd")
    z = latents_of(vae, "sd")
    view = view_of(vae, memory_format="contiguous", dtype=torch.bfloat16)
    assert (view.dtype, vae.dtype) == (torch.bfloat16, torch.float32)
    assert not storage(view) & storage(vae)
    expected = decode(vae, z)
    error = (decode(view, z.bfloat16()).float() - expected).square().mean()
    decibels = 10 * torch.log10((expected.max() - expected.min()).square() / error)
    assert decibels > 35  # 8 bits of mantissa: some 40 dB after thirty layers


def test_the_low_memory_decoder_takes_the_vae_as_before() -> None:
    vae = family("sd")
    view_of(vae, memory_format="channels_last", dtype=torch.float32)
    assert lowmem_decode.supports(vae) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda vae: setattr(vae, "decode", lambda z: z), "decode of the VAE was replaced"),
        (lambda vae: setattr(vae.decoder.conv_in, "forward", lambda z: z), "forward of decoder.conv_in"),
        (lambda vae: vae.decoder.conv_in.register_forward_hook(lambda *_: None), "hooks"),
        (lambda vae: vae.train(), "training"),
    ],
)
def test_what_was_changed_after_loading_is_refused(change: Any, reason: str) -> None:
    vae = family("one_level")
    assert refusal(vae) is None
    ways = FastVaes()
    assert ways.of(vae) is not None
    change(vae)
    assert reason in str(refusal(vae))
    assert ways.of(vae) is None  # though there was one


def test_a_class_nobody_knows_and_a_switch_that_is_off_have_no_fast_way() -> None:
    vae = clip_vae("mochi")
    assert FastVaes().of(vae) is None
    assert FastVaes().why_not(vae) == "nothing is known of AutoencoderKLMochi"
    assert FastVaes(FastOptions(use="off")).of(family("one_level")) is None


def test_fast_ways_last_as_long_as_their_vae() -> None:
    ways = FastVaes()
    vae = family("one_level")
    first = ways.of(vae)
    assert ways.of(vae) is first
    other = family("one_level")
    assert ways.of(other) is not first


def test_every_family_names_a_class_of_diffusers_and_its_evidence() -> None:
    import diffusers

    for name, known in families().items():
        assert hasattr(diffusers, name)
        assert known.evidence
        assert known.compile in ("allow", "deny", "unmeasured")
