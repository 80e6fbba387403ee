"""Every pipeline class of the pinned diffusers that offers latents: taken, and decoded as its own last lines would.

The reference is cut out of diffusers' source (`pipeline_tails.py`). Our side starts where a caller starts, with the
pipeline object and its latents, and ends with the tensor and the pixels a worker makes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from broker_config.errors import InvalidOption
from broker_config.messages import DecodeRequest
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from broker_config.vae_identity import config_digest
from producer.pipeline_table import EXCEPTED, PIPELINES
from producer.pipelines import options_of
from producer.submission import DecodeOptions, build_request
from producer.tensor_input import to_tensor_file
from tests.parity.whole_pipelines import frozen
from tests.support.tiny_families import catalogue, make
from tests.support.tiny_families import ltx as tiny_ltx
from worker.batch_decode import plan_of
from worker.decode import clip_frames, join_chunks, to_pixels
from worker.numerical_safety import finite_chunks
from worker.vae_pool import LoadedVae

tails = pytest.importorskip("tests.parity.pipeline_tails", reason="diffusers' pipelines need transformers")


@dataclass(frozen=True, kw_only=True)
class Tail:
    """Latents of a pipeline, and the variables its last lines read."""

    shape: tuple[int, ...]
    #: Variables of `__call__`, and with `self_` before them attributes of the pipeline.
    known: dict[str, Any] = field(default_factory=dict)
    #: What a caller says beside the pipeline.
    given: dict[str, Any] = field(default_factory=dict)
    #: What of the latents is handed out, where that is not all.
    handed_out: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
    #: What the last lines start from, where that is not what is handed out.
    variable: str = "latents"
    #: Whether the pipeline's own way to its latents and back rounds.
    rounds: bool = False


def test_every_class_that_offers_latents_is_taken_or_excepted_by_name_with_a_reason() -> None:
    offered = set(tails.classes_with_latents())
    assert len(offered) > 200
    assert offered == set(PIPELINES) | set(EXCEPTED)
    assert not set(PIPELINES) & set(EXCEPTED)
    assert all(len(reason) > 20 for reason in EXCEPTED.values())


#: Rows and columns of latents: not square, and no multiple of four.
ROWS, COLUMNS, FRAMES = 6, 10, 3
#: Classes that decode inside their loop, so that their last lines only postprocess: they have tests of their own below.
IN_THEIR_LOOP = ("HeliosPipeline", "HeliosPyramidPipeline", "WanAnimatePipeline", "Cosmos2_5_TransferPipeline")


def entry_name(name: str) -> str:
    return PIPELINES[name].vae_of(SimpleNamespace())


@pytest.fixture(scope="module")
def vaes() -> Callable[[str], Any]:
    """The tiny VAE of a catalogue entry, made once."""
    made: dict[str, Any] = {}

    def vae(name: str) -> Any:
        if name not in made:
            made[name] = make(name, catalogue()[name])
            if catalogue()[name].get("tiled"):
                made[name].enable_tiling()
        return made[name]

    return vae


def tail_of(name: str, vae: Any, *, rows: int = ROWS, columns: int = COLUMNS) -> Tail:
    """A case for a class: what its layout asks for, then what is its own."""
    entry = VaeCatalog.load()[entry_name(name)]
    batch, channels = 2, entry.channels
    frames = FRAMES
    if entry.tiled:  # Allegro: tiles of 6 latent frames and 128 px, one clip at a time
        batch, frames, rows, columns = 1, 6, 16, 16
    height, width = rows * entry.spatial, columns * entry.spatial
    num_frames = (frames - 1) * entry.temporal + 1
    token = channels * entry.patch_size**2
    tokens = rows * columns // entry.patch_size**2
    shape: tuple[int, ...] = {
        "unpacked": (batch, channels, rows, columns),
        "packed": (batch, tokens, token),
        "packed_frame": (batch, tokens, token),
        "video": (batch, channels, frames, rows, columns),
        "video_chunks": (batch, channels, frames, rows, columns),
        "video_channels_last": (batch, channels, frames, rows, columns),
        "video_2d": (batch, channels, frames, rows, columns),
        "frames_2d": (batch, frames, channels, rows, columns),
        "frames_first": (batch, frames, channels, rows, columns),
        "channels_last": (batch, frames, rows, columns, channels),
        "channels_last_image": (batch, 1, rows, columns, channels),
        "unpacked_frame": (batch, channels, 1, rows, columns),
        "layers": (batch, 3 * rows * columns // 4, channels * 4),
        "packed_video": (batch, frames * rows * columns, channels),
        "patched": (batch, channels * 4, rows // 2, columns // 2),
        "packed_patched": (batch, rows * columns // 4, channels * 4),
        "packed_patched_last": (batch, rows * columns // 4, channels * 4),
        "frame_pairs": (batch, channels * 2, 1, rows, columns),
        "items": (batch, 2, channels, 1, rows, columns),
        "item_patches": (batch, rows * columns // 4 + 5, channels, 1, 2, 2),
    }[str(PIPELINES[name].layout)]
    known: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "self_vae_scale_factor": entry.spatial,
        "self_vae_scale_factor_spatial": entry.spatial,
        "self_vae_scale_factor_temporal": entry.temporal,
        "use_resolution_binning": False,
    }
    given: dict[str, Any] = {}
    if LAYOUTS_BY_SIZE & {str(PIPELINES[name].layout)}:
        given = {"height": height, "width": width}
    if entry.resizes:  # a size that is none of the bins
        known |= {"use_resolution_binning": True, "orig_height": height - 12, "orig_width": width - 20}
        given = {"height": height - 12, "width": width - 20}
    tail = Tail(shape=shape, known=known, given=given)
    own = OWN.get(name)
    return tail if own is None else own(tail, vae)


LAYOUTS_BY_SIZE = {
    "packed",
    "packed_frame",
    "layers",
    "packed_patched",
    "packed_patched_last",
    "item_patches",
    "packed_video",
}


# What single classes need beside that -----------------------------------------------------------------------


def with_known(**known: Any) -> Callable[[Tail, Any], Tail]:
    return lambda tail, _: replace(tail, known=tail.known | known)


def with_given(**given: Any) -> Callable[[Tail, Any], Tail]:
    return lambda tail, _: replace(tail, known=tail.known | given, given=tail.given | given)


def upsampled(tail: Tail, vae: Any) -> Tail:
    """Latents that are normalised only to be handed out: undoing that gives them back but for rounding."""
    undone = tails.load("LTXLatentUpsamplePipeline")._normalize_latents
    return replace(
        ltx(tail, vae),
        handed_out=lambda latents: undone(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor),
        rounds=True,
    )


def denormalised(kind: str) -> Callable[[Tail, Any], Tail]:
    """LTX-2 undoes the normalisation before it hands latents out, by a method of its own."""

    def case(tail: Tail, vae: Any) -> Tail:
        undo = tails.load(kind)._denormalize_latents
        silent = SimpleNamespace(dtype=torch.float32, decode=lambda audio, return_dict: (audio,))
        own = {
            "audio_latents": torch.zeros(1, 1),
            "public_audio": torch.zeros(1, 1),
            "self_audio_vae": silent,
            "self_vocoder": Vocoder(),
            "decode_timestep": 0.0,
            "decode_noise_scale": None,
            "requested_frames": tail.known["num_frames"],
            "canvas_frames": tail.known["num_frames"],
            "frame_rate": 24.0,
            "playback_fps": 24.0,
            "self_vae_temporal_compression_ratio": 8,
            "slot_latents": None,
            "carry_keyframes": None,
        }
        return replace(
            tail,
            known=tail.known | own,
            handed_out=lambda latents: undo(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor),
            variable="video_latents" if "DFR" in kind else "latents",
        )

    return case


class Vocoder:
    """Makes no sound of anything."""

    config = SimpleNamespace(output_sampling_rate=24_000)

    def __call__(self, spectrogram: torch.Tensor) -> torch.Tensor:
        return spectrogram


def ltx(tail: Tail, vae: Any) -> Tail:
    own = {
        "latent_num_frames": FRAMES,
        "latent_height": ROWS,
        "latent_width": COLUMNS,
        "self_transformer_spatial_patch_size": 1,
        "self_transformer_temporal_patch_size": 1,
        "decode_timestep": 0.0,
        "decode_noise_scale": None,
    }
    given = {"num_frames": tail.known["num_frames"]} if len(tail.shape) == 3 else {}
    return replace(tail, known=tail.known | own, given=tail.given | given)


def sigma(tail: Tail, vae: Any) -> Tail:
    scheduler = SimpleNamespace(config=frozen({"sigma_data": 0.5}))
    return replace(tail, known=tail.known | {"self_scheduler": scheduler, "vae_dtype": torch.float32})


def cosmos2_image(tail: Tail, vae: Any) -> Tail:
    return replace(sigma(tail, vae), handed_out=lambda latents: latents[:, :, 0])


def cosmos25(tail: Tail, vae: Any) -> Tail:
    """pipeline_cosmos2_5_predict.py `__init__`: statistics as buffers of the pipeline, std as its reciprocal."""
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).float()
    std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).float()
    return replace(tail, known=tail.known | {"self_latents_mean": mean, "self_latents_std": std})


def cosmos3(tail: Tail, vae: Any) -> Tail:
    """pipeline_cosmos3_omni.py `__init__`."""
    mean = torch.tensor(vae.config.latents_mean, dtype=vae.dtype)
    inverse = 1.0 / torch.tensor(vae.config.latents_std, dtype=vae.dtype)
    own = {"self__vae_latents_mean": mean, "self__vae_latents_inv_std": inverse, "enable_safety_check": False}
    return replace(tail, known=tail.known | own)


def cogvideox(tail: Tail, vae: Any) -> Tail:
    own = {"self_vae_scaling_factor_image": vae.config.scaling_factor, "additional_frames": 0}
    return replace(tail, known=tail.known | own)


def hunyuan_image_to_video(tail: Tail, vae: Any) -> Tail:
    own = {"self_vae_scaling_factor": vae.config.scaling_factor, "image_condition_type": "token_replace"}
    return replace(tail, known=tail.known | own)


def flux2(tail: Tail, vae: Any) -> Tail:
    grid = torch.zeros(2, 4, ROWS // 2, COLUMNS // 2)
    ids = tails.load("Flux2Pipeline")._prepare_latent_ids(grid)
    return replace(tail, known=tail.known | {"latent_ids": ids})


def joy_plus(tail: Tail, vae: Any) -> Tail:
    patches = ROWS * COLUMNS // 4
    mask = torch.zeros(tail.shape[:2], dtype=torch.bool)
    mask[:, :patches] = True
    own = {
        "target_mask": mask,
        "clean_reference_backup": torch.ones(tail.shape),
        "shape_list": [[(1, ROWS // 2, COLUMNS // 2)]] * tail.shape[0],
        "self_transformer": SimpleNamespace(config=frozen({"patch_size": (1, 2, 2)})),
    }
    return replace(tail, known=tail.known | own)


def latte(tail: Tail, vae: Any) -> Tail:
    # 18 frames in all: more than the 14 that are decoded at a time
    return replace(
        tail, shape=(2, 4, 9, ROWS, COLUMNS), known=tail.known | {"video_length": 9, "decode_chunk_size": 14}
    )


def many_frames(**known: Any) -> Callable[[Tail, Any], Tail]:
    """18 frames in all: more than the 16 that AnimateDiff decodes at a time."""
    return lambda tail, _: replace(tail, shape=(2, 4, 9, ROWS, COLUMNS), known=tail.known | known)


def permuted(*order: int) -> Callable[[Tail, Any], Tail]:
    """Latents as these pipelines have them in the end: seen through a permutation, not contiguous."""

    def case(tail: Tail, vae: Any) -> Tail:
        return replace(tail, known=tail.known | {"sample_audio": False, "permutation": order})

    return case


def half(tail: Tail, vae: Any) -> Tail:
    """One clip."""
    return replace(tail, shape=(1, *tail.shape[1:]))


_LTX2 = (
    "LTX2Pipeline",
    "LTX2ConditionPipeline",
    "LTX2InContextPipeline",
    "LTX2ImageToVideoPipeline",
    "LTX2DFRPipeline",
    "LTX2DFRTemporalRefinePipeline",
)
_CHUNKED = "AnimateDiff AnimateDiffControlNet AnimateDiffVideoToVideo AnimateDiffVideoToVideoControlNet AnimateDiffPAG"
OWN: dict[str, Callable[[Tail, Any], Tail]] = {
    **{name: denormalised(name) for name in _LTX2},
    **{f"{name}Pipeline": many_frames(decode_chunk_size=16) for name in _CHUNKED.split()},
    "AnimateDiffSDXLPipeline": many_frames(needs_upcasting=False),
    "AnimateDiffSparseControlNetPipeline": many_frames(),
    "PIAPipeline": many_frames(),
    "TextToVideoSDPipeline": many_frames(),
    "VideoToVideoSDPipeline": many_frames(),
    "I2VGenXLPipeline": with_known(decode_chunk_size=1),
    "LattePipeline": latte,
    "StableVideoDiffusionPipeline": with_known(needs_upcasting=False, num_frames=FRAMES, decode_chunk_size=FRAMES),
    "LTXPipeline": ltx,
    "LTXImageToVideoPipeline": ltx,
    "LTXConditionPipeline": ltx,
    "LTX2LatentUpsamplePipeline": ltx,
    "SanaWMPipeline": lambda tail, vae: replace(half(tail, vae), known=tail.known | {"c2w": torch.zeros(99)}),
    "CogVideoXPipeline": cogvideox,
    "CogVideoXImageToVideoPipeline": cogvideox,
    "CogVideoXFunControlPipeline": cogvideox,
    "CogVideoXVideoToVideoPipeline": cogvideox,
    "ConsisIDPipeline": cogvideox,
    "HunyuanVideoImageToVideoPipeline": hunyuan_image_to_video,
    # autoencoder_kl_hunyuanvideo15.py prepare_causal_attention_mask has no room for a second clip
    "HunyuanVideo15Pipeline": half,
    "HunyuanVideo15ImageToVideoPipeline": half,
    "WanVACEPipeline": lambda tail, vae: replace(
        tail, known=tail.known | {"num_reference_images": 1, "vae_dtype": torch.float32}, given={"additional_frames": 1}
    ),
    "BriaPipeline": with_known(self_vae_scale_factor=16),  # pipeline_bria.py __init__: 2 ** len(block_out_channels)
    "AllegroPipeline": with_given(num_frames=21),  # of the 24 that 6 latent frames become
    "LTXLatentUpsamplePipeline": upsampled,
    "CosmosTextToWorldPipeline": sigma,
    "CosmosVideoToWorldPipeline": sigma,
    "Cosmos2VideoToWorldPipeline": sigma,
    "Cosmos2TextToImagePipeline": cosmos2_image,
    "Cosmos2_5_PredictBasePipeline": cosmos25,
    "Cosmos3OmniPipeline": cosmos3,
    "Flux2Pipeline": flux2,
    "Ideogram4Pipeline": with_known(grid_h=ROWS // 2, grid_w=COLUMNS // 2, self_patch_size=2),
    "Krea2Pipeline": with_known(self_patch_size=2),
    "NucleusMoEImagePipeline": with_known(
        patch_size=2, self_transformer=SimpleNamespace(config=frozen({"patch_size": 2}))
    ),
    # Tokens of one latent pixel: a view of (B, C, h, w), as `_pack_latents` leaves them.
    "BriaFiboPipeline": with_known(do_patching=False, permutation=(0, 2, 1)),
    "BriaFiboEditPipeline": with_known(do_patching=False, permutation=(0, 2, 1)),
    "QwenImage21Pipeline": with_known(permutation=(0, 2, 1)),
    "QwenImageLayeredPipeline": lambda tail, vae: replace(
        tail, known=tail.known | {"layers": 2}, given=tail.given | {"layers": 2}
    ),
    "FluxControlNetInpaintPipeline": with_known(global_height=ROWS * 8, global_width=COLUMNS * 8),
    "LongCatImageEditPipeline": with_known(calculated_height=ROWS * 8, calculated_width=COLUMNS * 8),
    "LatentConsistencyModelPipeline": lambda tail, vae: replace(tail, variable="denoised"),
    "LatentConsistencyModelImg2ImgPipeline": lambda tail, vae: replace(tail, variable="denoised"),
    "StableDiffusionPanoramaPipeline": with_known(circular_padding=False),
    "JoyImageEditPipeline": with_known(enable_denormalization=True),
    "JoyImageEditPlusPipeline": joy_plus,
    "MotifVideoPipeline": with_known(vae_batch_size=None),
    "ChronoEditPipeline": with_known(enable_temporal_reasoning=False),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": with_known(last_image=None),
    # The caller's own clip comes before what is decoded: here it is empty.
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": with_known(
        video_original=torch.zeros(2, 3, 0, ROWS * 8, COLUMNS * 8)
    ),
    "AnyFlowPipeline": permuted(0, 2, 1, 3, 4),
    "AnyFlowFARPipeline": permuted(0, 2, 1, 3, 4),
    "Kandinsky6TI2VAPipeline": permuted(0, 2, 3, 4, 1),
}


# Ours --------------------------------------------------------------------------------------------------------


def our_way(name: str, vae: Any, latents: torch.Tensor, tail: Tail) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """From a caller's latents and pipeline to what a worker makes of them: the tensor, and the pixels."""
    catalog, settings = VaeCatalog.load(), load_settings(_env_file=None)
    parts = {key[5:]: value for key, value in tail.known.items() if key.startswith("self_")}
    pipeline = type(name, (SimpleNamespace,), {})(**parts, vae=vae)
    options = options_of(pipeline, tail.given, catalog=catalog)
    assert options["vae_class"] == type(vae).__name__
    tensor = to_tensor_file(latents, max_bytes=settings.max_latents_bytes)
    request = build_request(tensor, DecodeOptions(**options), catalog=catalog, settings=settings)
    return decode(request, vae, latents)


def decode(request: DecodeRequest, vae: Any, latents: torch.Tensor) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """What `worker.batch_decode` does with a job of its own, given the latents as they arrive: contiguous."""
    loaded = LoadedVae(
        entry=VaeCatalog.load()[request.vae],
        module=vae,
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights={"class": type(vae).__name__, "config": config_digest(vae.config)},
        size_bytes=0,
    )
    assert DecodeRequest.from_wire(request.to_wire()) == request, "every fact survives the wire"
    plan = plan_of(request, loaded, batch=request.batch)
    chunks = list(finite_chunks(vae, latents.contiguous(), plan))
    frames = torch.cat([to_pixels(clip_frames(chunk, plan), unit=plan.imagenet) for chunk in chunks]).numpy()
    if request.is_video:
        frames = frames.reshape(request.batch, request.num_frames, *frames.shape[1:])
    whole = join_chunks(chunks, plan)
    assert whole.shape[-2:] == (request.height, request.width), "what was measured at submit is what comes out"
    assert whole.shape[0] == request.batch
    return whole, frames


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in IN_THEIR_LOOP])
def test_what_comes_out_is_what_the_pipelines_own_last_lines_make(name: str, vaes: Callable[[str], Any]) -> None:
    vae = vaes(entry_name(name))
    tail = tail_of(name, vae)
    order = tail.known.get("permutation")
    latents = torch.randn(tail.shape, generator=torch.Generator().manual_seed(5))
    if order is not None:
        inverse = [order.index(place) for place in range(len(order))]
        latents = latents.permute(order).contiguous().permute(inverse)
        assert not latents.is_contiguous()
    handed_out = tail.handed_out(latents.clone())
    kind = tails.load(name)
    expected, pixels = tails.run_tail(kind, vae, latents, variable=tail.variable, **tail.known)
    made, made_pixels = our_way(name, vae, handed_out, tail)
    if expected.ndim == made.ndim + 1:  # a picture that the pipeline postprocesses as a clip of one frame
        expected, pixels = expected[:, :, 0], pixels[:, 0]
    assert len(np.unique(pixels)) > 8, "a flat picture is equal to any other"
    assert made.dtype == expected.dtype == torch.float32
    if tail.rounds:
        assert torch.allclose(made, expected, atol=1e-5)
        assert int(np.abs(made_pixels.astype(int) - pixels).max()) <= 1
        return
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


def test_a_clip_of_chronoedit_that_reasons_is_decoded_in_its_two_parts(vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("chronoedit"), "ChronoEditPipeline"
    tail = tail_of(name, vae)
    tail = replace(tail, known=tail.known | {"enable_temporal_reasoning": True}, given={"layout": "video_reasoned"})
    latents = torch.randn((2, 16, 4, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


@pytest.mark.parametrize("frames", [2, 3, 4, 5])
def test_cogvideox_leaves_out_the_frames_it_padded(frames: int, vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("cogvideox-5b"), "CogVideoXPipeline"
    tail = tail_of(name, vae)
    tail = replace(tail, known=tail.known | {"additional_frames": 1}, given={"additional_frames": 1})
    latents = torch.randn((2, frames, 16, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


@pytest.mark.parametrize("name", ["LTXPipeline", "LTXConditionPipeline"])
@pytest.mark.parametrize("scale", [None, 0.025])
def test_ltx_with_timestep_conditioning_mixes_in_the_same_noise(name: str, scale: float | None) -> None:
    vae = tiny_ltx(catalogue()["ltx"], timestep_conditioning=True).eval()
    tail = tail_of(name, vae)
    noise = {"decode_timestep": 0.05, "decode_noise_scale": scale}
    tail = replace(
        tail,
        known=tail.known | noise | {"generator": torch.Generator().manual_seed(77)},
        given=tail.given | noise | {"seed": 77},
    )
    latents = torch.randn(tail.shape, generator=torch.Generator().manual_seed(5))
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


@pytest.mark.parametrize("missing", ["decode_timestep", "seed"])
def test_ltx_with_timestep_conditioning_is_not_decoded_without_its_facts(missing: str) -> None:
    vae = tiny_ltx(catalogue()["ltx"], timestep_conditioning=True).eval()
    tail = tail_of("LTXConditionPipeline", vae)
    given = {} if missing == "decode_timestep" else {"decode_timestep": 0.05}
    with pytest.raises(InvalidOption, match=f"{missing} is missing") as refusal:
        our_way("LTXConditionPipeline", vae, torch.zeros(tail.shape), replace(tail, given=given))
    assert refusal.value.field == missing


def test_bria_fibo_with_patches(vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("bria-fibo"), "BriaFiboPipeline"
    tail = tail_of(name, vae)
    tail = replace(tail, known=tail.known | {"do_patching": True}, given=tail.given | {"patch_size": 2})
    latents = torch.randn((2, ROWS * COLUMNS // 4, 48 * 4), generator=torch.Generator().manual_seed(5))
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline",
        "StableDiffusion3Pipeline",
        "SanaPipeline",
        "Flux2KleinPipeline",
        "WanPipeline",
        "HunyuanVideoPipeline",
        "CogVideoXPipeline",
        "MochiPipeline",
        "LTXConditionPipeline",
        "CosmosTextToWorldPipeline",
        "StableVideoDiffusionPipeline",
        "Kandinsky5T2IPipeline",
    ],
)
def test_latents_of_odd_sizes(name: str, vaes: Callable[[str], Any]) -> None:
    vae = vaes(entry_name(name))
    tail = tail_of(name, vae, rows=5, columns=7)
    latents = torch.randn(tail.shape, generator=torch.Generator().manual_seed(5))
    expected, pixels = tails.run_tail(tails.load(name), vae, latents, **tail.known)
    made, made_pixels = our_way(name, vae, latents, tail)
    assert torch.equal(made, expected)
    assert np.array_equal(made_pixels, pixels)


def test_more_than_forty_pairs_of_class_layout_and_state_are_held_against_diffusers() -> None:
    catalog = VaeCatalog.load()
    pairs = set()
    for name, pipeline in PIPELINES.items():
        entry = catalog[entry_name(name)]
        layout = entry.layout(pipeline.layout)
        pairs.add((entry.vae_class, layout, entry.state_of(layout, pipeline.state)))
    assert len(pairs) > 40, len(pairs)


# Pipelines that decode inside their loop -------------------------------------------------------------------------


def test_wan_animate_hands_out_what_it_decodes_without_the_reference_frame(vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("wan-animate"), "WanAnimatePipeline"
    latents = torch.randn((2, 16, FRAMES, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    after = tails.run_lines(
        name,
        "latents = latents.to(self.vae.dtype)",
        "out_frames = self.vae.decode",
        self=SimpleNamespace(vae=vae),
        latents=latents,
    )
    made, _ = our_way(name, vae, after["latents"], tail_of(name, vae))
    assert torch.equal(made, after["out_frames"])


def test_a_clip_of_one_chunk_of_cosmos_transfer(vaes: Callable[[str], Any]) -> None:
    vae, name = vaes("cosmos25"), "Cosmos2_5_TransferPipeline"
    statistics = [
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    ]
    known = tails.run_lines(
        name,
        "latents_mean = self.latents_mean.to(dtype=vae_dtype",
        "return video",
        self=SimpleNamespace(vae=vae, latents_mean=statistics[0], latents_std=statistics[1]),
        vae_dtype=torch.float32,
        device="cpu",
    )
    latents = torch.randn((2, 16, FRAMES, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = known["decode_latents"](latents)
    made, _ = our_way(name, vae, latents, tail_of(name, vae))
    assert torch.equal(made, expected)


@pytest.mark.parametrize("name", ["HeliosPipeline", "HeliosPyramidPipeline"])
def test_helios_decodes_each_chunk_afresh(name: str, vaes: Callable[[str], Any]) -> None:
    vae, each = vaes("helios"), 2
    latents = torch.randn((2, 16, 3 * each, ROWS, COLUMNS), generator=torch.Generator().manual_seed(5))
    shape = (1, 16, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape)
    history: Any = None
    for end in range(each, 3 * each + 1, each):
        after = tails.run_lines(
            name,
            "current_latents = (",
            "history_video = torch.cat([history_video, current_video], dim=2)",
            self=SimpleNamespace(vae=vae),
            real_history_latents=latents[:, :, :end],
            num_latent_frames_per_chunk=each,
            vae_dtype=torch.float32,
            latents_mean=mean,
            latents_std=1.0 / torch.tensor(vae.config.latents_std).view(shape),
            history_video=history,
        )
        history = after["history_video"]
    tail = tail_of(name, vae)
    made, _ = our_way(name, vae, latents, replace(tail, given={"frames_per_call": each}))
    generated = (history.shape[2] - 1) // 4 * 4 + 1  # pipeline_helios.py __call__
    assert torch.equal(made, history[:, :, :generated])
