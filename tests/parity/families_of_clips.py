"""Families of clips with a video VAE of their own: a whole pipeline of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.parity.whole_pipelines import (
    FROM_MASKED_WORDS,
    FROM_PICTURE,
    FROM_WORDS,
    GUARDED,
    HUGE,
    MASKED,
    PROMPT,
    SMALL,
    TEXT,
    UNGUIDED,
    Whole,
    ends,
    mask,
    no_guidance,
    one_text,
    part,
    picture,
    pooled,
    text,
)


def _tiled(vae: Any) -> None:
    vae.enable_tiling()


#: Beside its denoiser; sound is made and thrown away.
_LTX2_PARTS: Mapping[str, Any] = {
    "connectors": part(
        "pipelines.ltx2.connectors.LTX2TextConnectors",
        caption_channels=TEXT,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        rope_type="split",
    ),
    "audio_vae": part(
        "AutoencoderKLLTX2Audio",
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    ),
    "vocoder": part(
        "pipelines.ltx2.vocoder.LTX2Vocoder",
        in_channels=16,
        hidden_channels=16,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    ),
}

CASES: Mapping[str, Whole] = {
    "hunyuanvideo15": Whole(
        pipeline="HunyuanVideo15Pipeline",
        vae="hunyuanvideo15",
        denoiser="HunyuanVideo15Transformer3DModel",
        parts={"guider": no_guidance},
        call={
            "height": 64,
            "width": 96,
            "num_frames": 5,
            "prompt_embeds": one_text,
            "prompt_embeds_mask": lambda: mask(1),
            "prompt_embeds_2": one_text,
            "prompt_embeds_mask_2": lambda: mask(1),
        },
        # autoencoder_kl_hunyuanvideo15.py prepare_causal_attention_mask has no room for a second clip
        batch=1,
    ),
    "kandinsky5-video": Whole(
        pipeline="Kandinsky5T2VPipeline",
        vae="kandinsky5-video",
        denoiser="Kandinsky5Transformer3DModel",
        call={
            **SMALL,
            **UNGUIDED,
            "prompt_embeds_qwen": text,
            "prompt_embeds_clip": pooled,
            "prompt_cu_seqlens": ends,
            "num_frames": 9,
        },
    ),
    "kandinsky6": Whole(
        pipeline="Kandinsky6TI2VAPipeline",
        vae="kandinsky6",
        denoiser="Kandinsky6Transformer3DModel",
        call={
            **SMALL,
            **PROMPT,
            **UNGUIDED,
            "pooled_prompt_embeds": pooled,
            "num_frames": 9,
            "sample_audio": False,
        },
    ),
    "ltx": Whole(
        pipeline="LTXPipeline",
        vae="ltx",
        denoiser="LTXVideoTransformer3DModel",
        call={**HUGE, **MASKED, **UNGUIDED, "num_frames": 9},
        given={**HUGE, "num_frames": 9},
    ),
    "ltx, unpacked": Whole(
        pipeline="LTXConditionPipeline",
        vae="ltx",
        denoiser="LTXVideoTransformer3DModel",
        call={**HUGE, **MASKED, **UNGUIDED, "num_frames": 9, "image": lambda: picture(**HUGE)},
    ),
    "ltx2": Whole(
        pipeline="LTX2Pipeline",
        vae="ltx2",
        denoiser="LTX2VideoTransformer3DModel",
        parts=_LTX2_PARTS,
        call={
            **HUGE,
            **MASKED,
            **UNGUIDED,
            "num_frames": 9,
            "stg_scale": 0.0,
            "modality_scale": 1.0,
            "guidance_rescale": 0.0,
            "audio_guidance_scale": 1.0,
            "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0,
            "audio_guidance_rescale": 0.0,
            "spatio_temporal_guidance_blocks": None,
            "use_cross_timestep": False,
        },
    ),
    "ltx2-hdr": Whole(
        pipeline="LTX2HDRPipeline",
        vae="ltx2-hdr",
        denoiser="LTX2VideoTransformer3DModel",
        parts=_LTX2_PARTS,
        call={**MASKED, "height": 96, "width": 128, "num_frames": 9},
    ),
    "sana-wm": Whole(
        pipeline="SanaWMPipeline",
        vae="sana-wm",
        denoiser="SanaWMTransformer3DModel",
        call={
            "height": 64,
            "width": 96,
            **UNGUIDED,
            "image": lambda: picture(height=64, width=96),
            "prompt": "a fox",
            "prompt_embeds": one_text,
            "prompt_attention_mask": lambda: mask(1),
            "negative_prompt_embeds": one_text,
            "negative_prompt_attention_mask": lambda: mask(1),
            "c2w": lambda: np.tile(np.eye(4), (9, 1, 1)),
            "intrinsics": [90.0, 90.0, 48.0, 32.0],
            "num_frames": 9,
        },
        batch=1,
    ),
    "cogvideox-2b": Whole(
        pipeline="CogVideoXPipeline",
        vae="cogvideox-2b",
        denoiser="CogVideoXTransformer3DModel",
        scheduler=part("CogVideoXDDIMScheduler"),
        call={**FROM_WORDS, "num_frames": 9},
    ),
    "cogvideox-5b, padded in front": Whole(
        pipeline="CogVideoXPipeline",
        vae="cogvideox-5b",
        denoiser="CogVideoXTransformer3DModel",
        config={"patch_size_t": 2, "patch_bias": False, "use_rotary_positional_embeddings": True},
        scheduler=part("CogVideoXDPMScheduler"),
        call={**FROM_WORDS, "num_frames": 9},
        given={"num_frames": 9},
    ),
    "consisid": Whole(
        pipeline="pipelines.consisid.pipeline_consisid.ConsisIDPipeline",
        vae="consisid",
        denoiser="ConsisIDTransformer3DModel",
        scheduler=part("CogVideoXDPMScheduler"),
        call={
            **FROM_PICTURE,
            "num_frames": 9,
            "id_vit_hidden": lambda: [text(1, 2, 2)],
            "id_cond": lambda: text(1, 1, 2)[0],
        },
        batch=1,
    ),
    "mochi": Whole(
        pipeline="MochiPipeline",
        vae="mochi",
        denoiser="MochiTransformer3DModel",
        call={**FROM_MASKED_WORDS, "num_frames": 7},
    ),
    "allegro": Whole(
        pipeline="AllegroPipeline",
        vae="allegro",
        denoiser="AllegroTransformer3DModel",
        scheduler=part("EulerAncestralDiscreteScheduler"),
        prepare=_tiled,
        call={
            **UNGUIDED,
            "prompt_embeds": one_text,
            "prompt_attention_mask": lambda: mask(1),
            "height": 128,
            "width": 128,
            "num_frames": 24,
        },
        batch=1,
    ),
    "easyanimate": Whole(
        pipeline="EasyAnimatePipeline",
        vae="easyanimate",
        denoiser="EasyAnimateTransformer3DModel",
        call={**FROM_MASKED_WORDS, "num_frames": 9},
    ),
    "cosmos1": Whole(
        pipeline="CosmosTextToWorldPipeline",
        vae="cosmos1",
        denoiser="CosmosTransformer3DModel",
        scheduler=part("EDMEulerScheduler", sigma_data=0.5, sigma_max=80.0),
        names=GUARDED,
        call={**FROM_WORDS, "num_frames": 9},
    ),
    "cosmos1, from a picture": Whole(
        pipeline="CosmosVideoToWorldPipeline",
        vae="cosmos1",
        denoiser="CosmosTransformer3DModel",
        config={"in_channels": 17},
        scheduler=part("EDMEulerScheduler", sigma_data=0.5, sigma_max=80.0),
        names=GUARDED,
        call={
            **FROM_PICTURE,
            "num_frames": 9,
        },
        batch=1,
    ),
}
