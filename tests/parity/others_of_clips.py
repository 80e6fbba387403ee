"""Other whole pipelines of the families of clips: from a picture or a clip, with a control net, and so on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from tests.parity import families_of_clips, families_of_frames
from tests.parity.variants import PICTURE, SIZES, one_pooled, variant
from tests.parity.whole_pipelines import (
    CONDITIONED_BY_SIZE,
    FROM_PICTURE,
    HUGE,
    SMALL,
    UNGUIDED,
    Whole,
    mask,
    one_text,
    part,
    picture,
    tiny,
)


def clip(frames: int = 9, *, height: int = SMALL["height"], width: int = SMALL["width"]) -> list[Image.Image]:
    """A clip of one picture, so often."""
    return [picture(height=height, width=width)] * frames


def _motion(**config: Any) -> Callable[[], Any]:
    return part(
        "MotionAdapter",
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        **config,
    )


#: More frames than the 16 that these decode at a time.
_LONG = 18
_FRAMES: Mapping[str, Any] = {"conditioning_frames": lambda: clip(_LONG)}
_NET = {"controlnet": lambda: tiny("ControlNetModel")}
_ANIMATED = Whole(
    pipeline="AnimateDiffPipeline",
    vae="sd",
    denoiser="UNet2DConditionModel",
    part="unet",
    scheduler=part("DDIMScheduler", steps_offset=1, clip_sample=False, beta_schedule="linear"),
    parts={"motion_adapter": _motion()},
    call={**SMALL, **UNGUIDED, "prompt_embeds": one_text, "num_frames": _LONG},
    batch=1,
)
_OF_VIDEO: Mapping[str, Any] = {"video": clip, "strength": 0.99}
_OF_LONG_VIDEO: Mapping[str, Any] = {**_OF_VIDEO, "video": lambda: clip(_LONG)}
_ANIMATED_CASES: Mapping[str, Whole] = {
    "AnimateDiffPAG": variant(_ANIMATED, "AnimateDiffPAGPipeline"),
    "AnimateDiffControlNet": variant(_ANIMATED, "AnimateDiffControlNetPipeline", parts=_NET, call=_FRAMES),
    "AnimateDiffVideoToVideo": variant(
        _ANIMATED, "AnimateDiffVideoToVideoPipeline", drop=("num_frames",), call=_OF_LONG_VIDEO
    ),
    "AnimateDiffVideoToVideoControlNet": variant(
        _ANIMATED,
        "AnimateDiffVideoToVideoControlNetPipeline",
        drop=("num_frames",),
        parts=_NET,
        call={**_OF_LONG_VIDEO, **_FRAMES},
    ),
    "AnimateDiffSparseControlNet": variant(
        _ANIMATED,
        "AnimateDiffSparseControlNetPipeline",
        parts={"controlnet": lambda: tiny("SparseControlNetModel")},
        call={"conditioning_frames": lambda: clip(1)},
    ),
    "PIA": variant(_ANIMATED, "PIAPipeline", parts={"motion_adapter": _motion(conv_in_channels=9)}, call=PICTURE),
    "AnimateDiffSDXL": variant(
        _ANIMATED,
        "AnimateDiffSDXLPipeline",
        vae="sdxl",
        config=CONDITIONED_BY_SIZE,
        parts={"motion_adapter": _motion(use_motion_mid_block=False)},
        call={"pooled_prompt_embeds": one_pooled},
    ),
    "VideoToVideoSD": variant(
        families_of_frames.CASES["text-to-video"],
        "VideoToVideoSDPipeline",
        drop=(*SIZES, "num_frames"),
        call={**_OF_LONG_VIDEO, "prompt_embeds": one_text},
        batch=1,
    ),
}

_FROM_PICTURE: Mapping[str, Any] = {**FROM_PICTURE, "num_frames": 9}
_WAN = families_of_frames.CASES["wan"]
_SKYREELS = families_of_frames.CASES["skyreels-v2"]
_FORCED: Mapping[str, Any] = {"base_num_frames": 9, "prompt": None, "prompt_embeds": one_text}
_WAN_CASES: Mapping[str, Whole] = {
    "WanImageToVideo": variant(
        _WAN,
        "WanImageToVideoPipeline",
        config={"in_channels": 36, "out_channels": 16, "image_dim": 8},
        answers={"encode_image": one_text},
        call=_FROM_PICTURE,
        batch=1,
    ),
    "WanVideoToVideo": variant(
        _WAN, "WanVideoToVideoPipeline", drop=("num_frames",), call={**_OF_VIDEO, "prompt_embeds": one_text}, batch=1
    ),
    "SkyReelsV2ImageToVideo": variant(
        _SKYREELS,
        "SkyReelsV2ImageToVideoPipeline",
        config={"in_channels": 36, "out_channels": 16, "image_dim": 8},
        answers={"encode_image": one_text},
        call=_FROM_PICTURE,
        batch=1,
    ),
    "SkyReelsV2DiffusionForcing": variant(
        _SKYREELS,
        "SkyReelsV2DiffusionForcingPipeline",
        scheduler=part("UniPCMultistepScheduler"),
        call=_FORCED,
        batch=1,
    ),
    "SkyReelsV2DiffusionForcingImageToVideo": variant(
        _SKYREELS,
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        scheduler=part("UniPCMultistepScheduler"),
        call={**_FORCED, **PICTURE},
        batch=1,
    ),
    # its last picture's latents stay in what it hands out, and are taken off before it decodes
    "SkyReelsV2DiffusionForcingImageToVideo, to a last picture": variant(
        _SKYREELS,
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        scheduler=part("UniPCMultistepScheduler"),
        call={**_FORCED, **PICTURE, "last_image": lambda: picture(height=64, width=96)},
        given={"layout": "video_canvas", "num_frames": 9},
        batch=1,
    ),
    "MotifVideoImage2Video": variant(
        families_of_frames.CASES["motif-video"],
        "MotifVideoImage2VideoPipeline",
        answers={"_get_image_embeds": lambda: None},
        call={
            **PICTURE,
            "prompt": None,
            "prompt_embeds": one_text,
            "prompt_attention_mask": lambda: mask(1),
        },
        batch=1,
    ),
    "SanaImageToVideo": variant(
        families_of_frames.CASES["sana-video"],
        "SanaImageToVideoPipeline",
        call={
            "image": lambda: picture(height=64, width=96),
            "prompt_embeds": one_text,
            "prompt_attention_mask": lambda: mask(1),
        },
        batch=1,
    ),
}

_LTX2 = families_of_clips.CASES["ltx2"]
_LTX2_ONE: Mapping[str, Any] = {"prompt_embeds": one_text, "prompt_attention_mask": lambda: mask(1)}
_COG = families_of_clips.CASES["cogvideox-2b"]
_OWN_CASES: Mapping[str, Whole] = {
    "LTXImageToVideo": variant(
        families_of_clips.CASES["ltx"],
        "LTXImageToVideoPipeline",
        call={"image": lambda: picture(**HUGE), "prompt_embeds": one_text, "prompt_attention_mask": lambda: mask(1)},
        batch=1,
    ),
    "LTX2ImageToVideo": variant(
        _LTX2, "LTX2ImageToVideoPipeline", call={**_LTX2_ONE, "image": lambda: picture(**HUGE), "image_crf": 0}, batch=1
    ),
    "LTX2Condition": variant(_LTX2, "LTX2ConditionPipeline", call=_LTX2_ONE, batch=1),
    "LTX2InContext": variant(_LTX2, "LTX2InContextPipeline", call=_LTX2_ONE, batch=1),
    "CogVideoXImageToVideo": variant(
        _COG, "CogVideoXImageToVideoPipeline", config={"in_channels": 32}, call=_FROM_PICTURE, batch=1
    ),
    "CogVideoXVideoToVideo": variant(
        _COG,
        "CogVideoXVideoToVideoPipeline",
        drop=("num_frames",),
        call={**_OF_VIDEO, "prompt_embeds": one_text},
        batch=1,
    ),
    "CogVideoXFunControl": variant(
        _COG,
        "CogVideoXFunControlPipeline",
        drop=("num_frames",),
        config={"in_channels": 32},
        call={"control_video": clip, "prompt_embeds": one_text},
        batch=1,
    ),
    "HunyuanVideo15ImageToVideo": variant(
        families_of_clips.CASES["hunyuanvideo15"],
        "HunyuanVideo15ImageToVideoPipeline",
        drop=SIZES,
        config={"task_type": "i2v"},
        answers={
            "_get_image_embeds": lambda: one_text(),
            "video_processor.calculate_default_height_width": lambda: (64, 96),
        },
        call={"image": lambda: picture(height=64, width=96)},
    ),
    "HunyuanSkyreelsImageToVideo": Whole(
        pipeline="HunyuanSkyreelsImageToVideoPipeline",
        vae="hunyuanvideo",
        denoiser="HunyuanVideoTransformer3DModel",
        config={"in_channels": 32},
        call={
            **_FROM_PICTURE,
            "pooled_prompt_embeds": one_pooled,
            "prompt_attention_mask": lambda: mask(1),
            "true_cfg_scale": 1.0,
        },
        batch=1,
    ),
    "HunyuanVideoImageToVideo": Whole(
        pipeline="HunyuanVideoImageToVideoPipeline",
        vae="hunyuanvideo",
        denoiser="HunyuanVideoTransformer3DModel",
        config={"image_condition_type": "token_replace"},
        parts={"image_processor": None},
        call={
            **_FROM_PICTURE,
            "pooled_prompt_embeds": one_pooled,
            "prompt_attention_mask": lambda: mask(1),
            "true_cfg_scale": 1.0,
        },
        batch=1,
    ),
}

CASES: Mapping[str, Whole] = {**_ANIMATED_CASES, **_WAN_CASES, **_OWN_CASES}
