"""The table of pipeline classes: which VAE and layout their latents are for, and which classes cannot be taken.

A class that decodes with the lines of another one stands in the same row. tests/parity/test_every_pipeline.py holds
every row against diffusers' own code, and that no class of the pinned diffusers is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from broker_config.errors import InvalidOption
from broker_config.latent_geometry import LatentLayout as Layout
from broker_config.latent_geometry import LatentState as State
from producer.pipelines import PipelineEntry, Reader, config_of

#: More frames than any clip has: all of them in one call.
_ALL_FRAMES: Final = 4096


def _of(
    names: str,
    vae: str | Callable[[Any], str],
    layout: Layout | None = None,
    *,
    state: State | None = None,
    options: Mapping[str, Any] | None = None,
    readers: Mapping[str, Reader] | None = None,
) -> dict[str, PipelineEntry]:
    """A row: class names without `Pipeline` at their end, and what holds for all of them."""
    entry = PipelineEntry(vae=vae, layout=layout, state=state, options=options or {}, readers=readers or {})
    return {f"{name}Pipeline": entry for name in names.split()}


# Which of several VAEs -------------------------------------------------------------------------------------


def _sd(pipeline: Any) -> str:
    """Stable Diffusion takes two other decoders for its latents."""
    others = {"AsymmetricAutoencoderKL": "sd-asymmetric", "ConsistencyDecoderVAE": "consistency-decoder"}
    return others.get(type(getattr(pipeline, "vae", None)).__name__, "sd")


def _sd_inpaint(pipeline: Any) -> str:
    """As `_sd`, but for the decoder that would be given the picture and its mask."""
    name = _sd(pipeline)
    if name == "sd-asymmetric":
        raise InvalidOption(
            f"{type(pipeline).__name__} decodes with an AsymmetricAutoencoderKL by its picture and mask, which its "
            "latents do not tell: use the VAE of Stable Diffusion",
            field="pipeline",
        )
    return name


def _sdxl(pipeline: Any) -> str:
    """Playground 2.5 is an SDXL whose VAE has per-channel statistics."""
    return "playground" if config_of(pipeline, "vae").get("latents_mean") else _sdxl_weights(pipeline)


def _sdxl_weights(pipeline: Any) -> str:
    """SDXL's own VAE asks for float32 (`force_upcast`); the one that is exact in float16 was trained on from it."""
    return "sdxl-original" if config_of(pipeline, "vae").get("force_upcast") else "sdxl"


def _wan(pipeline: Any) -> str:
    """Wan 2.2 TI2V 5B has latents of 48 channels, every other Wan of 16."""
    channels = config_of(pipeline, "vae").get("z_dim") or config_of(pipeline, "transformer").get("out_channels")
    return "wan22-5b" if channels == 48 else "wan"


def _cogvideox(pipeline: Any) -> str:
    """The 2B model has 30 attention heads and a VAE scaled by 1.15, the 5B models 48 and 0.7."""
    scale = config_of(pipeline, "vae").get("scaling_factor")
    if scale is not None:
        return "cogvideox-2b" if scale > 1 else "cogvideox-5b"
    heads = config_of(pipeline, "transformer").get("num_attention_heads", 48)
    return "cogvideox-2b" if heads == 30 else "cogvideox-5b"


def _prx(pipeline: Any) -> str:
    """PRX comes with FLUX.1's VAE or with a deep-compression one of 32 channels."""
    channels = config_of(pipeline, "vae").get("latent_channels") or config_of(pipeline, "transformer").get(
        "in_channels"
    )
    return "prx-dc" if channels == 32 else "prx"


def _sana_video(pipeline: Any) -> str:
    """SANA-Video comes with Wan's VAE or with LTX-2's."""
    channels = config_of(pipeline, "vae").get("latent_channels") or config_of(pipeline, "transformer").get(
        "in_channels"
    )
    return "sana-video-ltx2" if channels == 128 else "sana-video"


# Facts read off a pipeline ---------------------------------------------------------------------------------


def _sigma_data(pipeline: Any, given: Mapping[str, Any]) -> Any:
    return config_of(pipeline, "scheduler").get("sigma_data")


def _own_patch_size(pipeline: Any, given: Mapping[str, Any]) -> Any:
    return getattr(pipeline, "patch_size", None)


def _transformer_patch_size(pipeline: Any, given: Mapping[str, Any]) -> Any:
    return config_of(pipeline, "transformer").get("patch_size")


def _ltx_patch_size(pipeline: Any, given: Mapping[str, Any]) -> Any:
    if getattr(pipeline, "transformer_temporal_patch_size", 1) != 1:
        raise InvalidOption("patches of more than one frame are not known of any LTX-Video", field="pipeline")
    return getattr(pipeline, "transformer_spatial_patch_size", None)


def _padded_frames(pipeline: Any, given: Mapping[str, Any]) -> Any:
    """CogVideoX 1.5 pads its clips in front to whole patches of latent frames (pipeline_cogvideox.py `__call__`)."""
    patch, num_frames = config_of(pipeline, "transformer").get("patch_size_t"), given.get("num_frames")
    if patch is None or "additional_frames" in given:
        return None
    if not isinstance(num_frames, int):
        raise InvalidOption(
            "num_frames is missing: this CogVideoX pads its clips, and the frames it was asked for tell by how many",
            field="num_frames",
        )
    return -((num_frames - 1) // 4 + 1) % patch


def _not_concatenated(pipeline: Any, given: Mapping[str, Any]) -> Any:
    """HunyuanVideo image to video, `latent_concat`: latents without their first frame, which the VAE needs."""
    if config_of(pipeline, "transformer").get("image_condition_type") == "latent_concat":
        raise InvalidOption(
            "this HunyuanVideo hands latents out without their first frame, which its VAE decodes the others by: "
            "only image_condition_type token_replace can be decoded elsewhere",
            field="pipeline",
        )


_FRAMES_AT_ONCE: Final = {"frames_per_call": _ALL_FRAMES}
_SIGMA: Final = {"sigma_data": _sigma_data}

#: Pipeline class → what its latents are.
PIPELINES: Final[Mapping[str, PipelineEntry]] = {
    # AutoencoderKL, 4 channels
    **_of(
        "StableDiffusion StableDiffusionImg2Img StableDiffusionControlNet StableDiffusionControlNetImg2Img",
        _sd,
        Layout.UNPACKED,
    ),
    **_of("StableDiffusionInpaint StableDiffusionPAGInpaint", _sd_inpaint, Layout.UNPACKED),
    **_of(
        "StableDiffusionInstructPix2Pix StableDiffusionDepth2Img StableDiffusionImageVariation "
        "StableDiffusionLatentUpscale StableUnCLIP StableUnCLIPImg2Img StableDiffusionControlNetInpaint "
        "StableDiffusionControlNetXS StableDiffusionControlNetPAG StableDiffusionControlNetPAGInpaint "
        "StableDiffusionPAG StableDiffusionPAGImg2Img LatentConsistencyModel LatentConsistencyModelImg2Img "
        "AltDiffusion AltDiffusionImg2Img CycleDiffusion PaintByExample SemanticStableDiffusion "
        "StableDiffusionAttendAndExcite StableDiffusionDiffEdit StableDiffusionGLIGEN "
        "StableDiffusionGLIGENTextImage StableDiffusionModelEditing "
        "StableDiffusionPanorama StableDiffusionParadigms StableDiffusionPix2PixZero StableDiffusionSAG "
        "VersatileDiffusionDualGuided VersatileDiffusionImageVariation VersatileDiffusionTextToImage",
        "sd",
        Layout.UNPACKED,
    ),
    "StableDiffusionInpaintPipelineLegacy": PipelineEntry(vae="sd", layout=Layout.UNPACKED),
    "LEditsPPPipelineStableDiffusion": PipelineEntry(vae="sd", layout=Layout.UNPACKED),
    "LEditsPPPipelineStableDiffusionXL": PipelineEntry(vae=_sdxl_weights, layout=Layout.UNPACKED),
    **_of("StableDiffusionAdapter TextToVideoZero", "sd", Layout.UNPACKED, state=State.RECIPROCAL),
    **_of("StableDiffusionUpscale", "sd-x4-upscaler", Layout.UNPACKED),
    **_of(
        "StableDiffusionXL StableDiffusionXLImg2Img StableDiffusionXLInpaint StableDiffusionXLInstructPix2Pix "
        "StableDiffusionXLControlNet StableDiffusionXLControlNetImg2Img StableDiffusionXLControlNetUnion "
        "StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLControlNetPAG StableDiffusionXLControlNetPAGImg2Img "
        "StableDiffusionXLPAG StableDiffusionXLPAGImg2Img StableDiffusionXLPAGInpaint",
        _sdxl,
        Layout.UNPACKED,
    ),
    **_of(  # these divide by the scaling factor whatever statistics the VAE has
        "StableDiffusionXLControlNetInpaint StableDiffusionXLControlNetUnionInpaint StableDiffusionXLControlNetXS "
        "StableDiffusionXLAdapter TextToVideoZeroSDXL",
        _sdxl_weights,
        Layout.UNPACKED,
    ),
    **_of("Kolors KolorsImg2Img KolorsPAG", "kolors", Layout.UNPACKED),
    **_of("PixArtAlpha", "pixart-alpha", Layout.UNPACKED),
    **_of("PixArtSigma PixArtSigmaPAG", "pixart-sigma", Layout.UNPACKED),
    **_of("HunyuanDiT HunyuanDiTControlNet HunyuanDiTPAG", "hunyuandit", Layout.UNPACKED),
    **_of("AuraFlow", "auraflow", Layout.UNPACKED),
    **_of("Lumina", "lumina", Layout.UNPACKED),
    **_of("OmniGen", "omnigen", Layout.UNPACKED),
    # AutoencoderKL, 4 channels, frame by frame
    **_of(
        "AnimateDiff AnimateDiffControlNet AnimateDiffVideoToVideo AnimateDiffVideoToVideoControlNet AnimateDiffPAG",
        "sd",
        Layout.VIDEO_2D,
    ),
    **_of("AnimateDiffSparseControlNet PIA", "sd", Layout.VIDEO_2D, options=_FRAMES_AT_ONCE),
    **_of("AnimateDiffSDXL", _sdxl_weights, Layout.VIDEO_2D, options=_FRAMES_AT_ONCE),
    **_of("TextToVideoSD VideoToVideoSD", "text-to-video", Layout.VIDEO_2D, options=_FRAMES_AT_ONCE),
    **_of("I2VGenXL", "i2vgen-xl", Layout.VIDEO_2D, options={"frames_per_call": 1}),
    **_of("Latte", "latte", Layout.VIDEO_2D, options={"frames_per_call": 14}),
    **_of("StableVideoDiffusion", "svd", Layout.FRAMES_2D),
    # AutoencoderKL, 16 channels
    **_of(
        "StableDiffusion3 StableDiffusion3Img2Img StableDiffusion3ControlNet StableDiffusion3ControlNetInpainting "
        "StableDiffusion3PAG StableDiffusion3PAGImg2Img",
        "sd3",
        Layout.UNPACKED,
    ),
    # pipeline_stable_diffusion_3_inpaint.py leaves the shift out
    **_of("StableDiffusion3Inpaint", "sd3", Layout.UNPACKED, options={"shift_factor": 0.0}),
    **_of("CogView3Plus", "cogview3", Layout.UNPACKED),
    **_of("CogView4 CogView4Control", "cogview4", Layout.UNPACKED),
    **_of("Lumina2", "lumina2", Layout.UNPACKED),
    **_of("HiDreamImage", "hidream", Layout.UNPACKED),
    **_of(
        "ZImage ZImageControlNet ZImageControlNetInpaint ZImageImg2Img ZImageInpaint ZImageOmni",
        "z-image",
        Layout.UNPACKED,
    ),
    **_of("PRX", _prx, Layout.UNPACKED),
    **_of("GlmImage", "glm-image", Layout.UNPACKED),
    **_of(
        "Flux FluxControl FluxControlImg2Img FluxControlInpaint FluxControlNet FluxControlNetImg2Img "
        "FluxControlNetInpaint FluxFill FluxImg2Img FluxInpaint FluxKontext FluxKontextInpaint",
        "flux",
        Layout.PACKED,
    ),
    **_of("Chroma ChromaImg2Img ChromaInpaint", "chroma", Layout.PACKED),
    **_of("Bria", "bria", Layout.PACKED),
    **_of("LongCatImage LongCatImageEdit", "longcat-image", Layout.PACKED),
    **_of("OvisImage", "ovis-image", Layout.PACKED),
    **_of("Kandinsky5T2I Kandinsky5I2I", "kandinsky5-image", Layout.CHANNELS_LAST_IMAGE),
    # AutoencoderKLFlux2
    **_of("Flux2", "flux2", Layout.PACKED_PATCHED),
    **_of("Flux2Klein Flux2KleinInpaint Flux2KleinKV", "flux2-klein", Layout.UNPACKED),
    **_of("ErnieImage", "ernie-image", Layout.PATCHED),
    **_of("BriaFibo2", "bria-fibo2", Layout.UNPACKED),
    **_of("Ideogram4", "ideogram4", Layout.PACKED_PATCHED_LAST),
    # image VAEs of other classes
    **_of("HunyuanImage", "hunyuan-image", Layout.UNPACKED),
    **_of("HunyuanImageRefiner", "hunyuan-image-refiner", Layout.FRAME_PAIRS),
    **_of("Sana SanaControlNet SanaPAG", "sana", Layout.UNPACKED),
    **_of("SanaSprint SanaSprintImg2Img", "sana-sprint", Layout.UNPACKED),
    **_of("DreamLite DreamLiteMobile", "dreamlite", Layout.UNPACKED),
    # pictures from video VAEs
    **_of(
        "QwenImage QwenImageControlNet QwenImageControlNetInpaint QwenImageEdit QwenImageEditInpaint QwenImageEditPlus "
        "QwenImageImg2Img QwenImageInpaint",
        "qwen-image",
        Layout.PACKED_FRAME,
    ),
    **_of("QwenImageLayered", "qwen-image-layered", Layout.LAYERS),
    **_of("QwenImage21", "qwen-image-21", Layout.PACKED_FRAME),
    **_of("Krea2", "krea2", Layout.PACKED_FRAME, readers={"patch_size": _own_patch_size}),
    **_of("NucleusMoEImage", "nucleus-image", Layout.PACKED_FRAME, readers={"patch_size": _transformer_patch_size}),
    **_of("BriaFibo BriaFiboEdit", "bria-fibo", Layout.PACKED_FRAME),
    **_of("JoyImageEdit", "joyimage", Layout.UNPACKED_FRAME),
    **_of("JoyImageEditPlus", "joyimage-plus", Layout.ITEM_PATCHES),
    **_of("Cosmos2TextToImage", "cosmos2-image", Layout.UNPACKED_FRAME, readers=_SIGMA),
    # AutoencoderKLWan
    **_of("Wan WanImageToVideo WanVACE WanVideoToVideo", _wan, Layout.VIDEO),
    **_of("WanAnimate", "wan-animate", Layout.VIDEO, options={"additional_frames": 1}),
    **_of(
        "SkyReelsV2 SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingImageToVideo "
        "SkyReelsV2DiffusionForcingVideoToVideo SkyReelsV2ImageToVideo",
        "skyreels-v2",
        Layout.VIDEO,
    ),
    **_of("ChronoEdit", "chronoedit", Layout.VIDEO),
    **_of("LucyEdit", "lucy-edit", Layout.VIDEO),
    **_of("AnyFlow AnyFlowFAR", "anyflow", Layout.VIDEO),
    **_of("Helios HeliosPyramid", "helios", Layout.VIDEO_CHUNKS, options={"frames_per_call": 9}),
    **_of("MotifVideo MotifVideoImage2Video", "motif-video", Layout.VIDEO),
    **_of("SanaVideo SanaImageToVideo", _sana_video, Layout.VIDEO),
    **_of("Cosmos2VideoToWorld", "cosmos2", Layout.VIDEO, readers=_SIGMA),
    "Cosmos2_5_PredictBasePipeline": PipelineEntry(vae="cosmos25", layout=Layout.VIDEO),
    "Cosmos2_5_TransferPipeline": PipelineEntry(vae="cosmos25", layout=Layout.VIDEO, state=State.STANDARDISED),
    **_of("Cosmos3Omni", "cosmos3", Layout.VIDEO),
    # video VAEs of other classes
    **_of("HunyuanVideo HunyuanSkyreelsImageToVideo", "hunyuanvideo", Layout.VIDEO),
    **_of("HunyuanVideoImageToVideo", "hunyuanvideo", Layout.VIDEO, readers={"additional_frames": _not_concatenated}),
    **_of("HunyuanVideoFramepack", "hunyuanvideo", Layout.VIDEO_SECTIONS, options={"frames_per_call": 9}),
    **_of("HunyuanVideo15 HunyuanVideo15ImageToVideo", "hunyuanvideo15", Layout.VIDEO),
    **_of("Kandinsky5T2V Kandinsky5I2V", "kandinsky5-video", Layout.CHANNELS_LAST),
    **_of("Kandinsky6TI2VA", "kandinsky6", Layout.VIDEO_CHANNELS_LAST),
    **_of("LTX LTXImageToVideo", "ltx", Layout.PACKED_VIDEO, readers={"patch_size": _ltx_patch_size}),
    **_of("LTXCondition LTXLatentUpsample", "ltx", Layout.VIDEO),
    **_of("LTXI2VLongMultiPrompt", "ltx", Layout.VIDEO_BLENDED),
    **_of(
        "LTX2 LTX2Condition LTX2DFRTemporalRefine LTX2InContext LTX2ImageToVideo LTX2LatentUpsample",
        "ltx2",
        Layout.VIDEO,
    ),
    **_of("LTX2DFR", "ltx2", Layout.VIDEO_CANVAS),  # hands out a whole number of segments, whatever was asked for
    **_of("LTX2HDR", "ltx2-hdr", Layout.VIDEO),
    **_of("SanaWM", "sana-wm", Layout.VIDEO),
    **_of(
        "CogVideoX CogVideoXImageToVideo",
        _cogvideox,
        Layout.FRAMES_FIRST,
        readers={"additional_frames": _padded_frames},
    ),
    **_of("CogVideoXFunControl CogVideoXVideoToVideo", _cogvideox, Layout.FRAMES_FIRST),
    **_of("ConsisID", "consisid", Layout.FRAMES_FIRST),
    **_of("Mochi", "mochi", Layout.VIDEO),
    **_of("Allegro", "allegro", Layout.VIDEO),
    **_of("EasyAnimate EasyAnimateInpaint", "easyanimate", Layout.VIDEO),
    **_of("CosmosTextToWorld CosmosVideoToWorld", "cosmos1", Layout.VIDEO, readers=_SIGMA),
}

_AUDIO: Final = "they are sound, and latentq makes pictures"
_CODES: Final = "they are indices into a codebook, not latents of a VAE"
_VQ: Final = "they belong to a vector-quantised model, which the catalogue has none of"
_THREE_D: Final = "they describe a shape that a renderer draws, not a picture of a VAE"


def _because(reason: str, names: str) -> dict[str, str]:
    return {f"{name}Pipeline": reason for name in names.split()}


#: Pipeline class that offers latents → why they are not taken.
EXCEPTED: Final[Mapping[str, str]] = {
    **_because(
        _AUDIO,
        "AceStep AudioLDM2 MusicLDM LongCatAudioDiT StableAudio StableAudio3 StableAudio3AudioToAudio "
        "StableAudio3Inpaint",
    ),
    **_because(_CODES, "Amused AmusedImg2Img AmusedInpaint"),
    **_because(
        _VQ,
        "Kandinsky3 Kandinsky3Img2Img KandinskyV22 KandinskyV22Img2Img KandinskyV22Inpaint StableCascadeDecoder "
        "WuerstchenDecoder",
    ),
    **_because(_THREE_D, "ShapE ShapEImg2Img"),
    "PRXPixelPipeline": "it works on pixels: what it calls latents is the picture",
    "StableDiffusionLDM3DPipeline": "its VAE makes a picture and a depth map in six channels, which need a pipeline's "
    "own postprocessing",
    "UniDiffuserPipeline": "one tensor holds latents of a picture, of CLIP and of a text",
    "EasyAnimateControlPipeline": "its own decode calls a method the class lacks (decode_latents)",
    "VisualClozeGenerationPipeline": "a row of pictures of several sizes is packed into one sequence",
    "SanaWMLTX2Refiner": "a part of SanaWMPipeline, which keeps frames of its first stage to itself",
}
