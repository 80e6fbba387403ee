"""Latents, facts and VAE must match: each mismatch is refused by field, with what was expected and what was found.

At the door without torch where the catalogue can tell; at the worker where only the weights can.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from broker_config.errors import (
    InvalidChannels,
    InvalidOption,
    InvalidRank,
    InvalidSize,
    UnknownPipeline,
    WeightsMismatch,
)
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog
from broker_config.vae_identity import config_digest
from producer import DecodeClient
from producer.pipelines import options_of
from tests.support.thread_worker import ThreadWorker


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("latents", "options", "kind", "field", "expected", "found"),
    [
        # channels
        (zeros(1, 16, 1, 6, 8), {"vae": "wan22-5b"}, InvalidChannels, "latents", "takes 48", "16"),
        (zeros(1, 4, 6, 8), {"vae": "sd3"}, InvalidChannels, "latents", "takes 16", "4 channels"),
        (zeros(1, 12, 32), {"vae": "flux2", "height": 48, "width": 64}, InvalidChannels, "latents", "takes 128", "32"),
        # rank
        (zeros(1, 16, 6, 8), {"vae": "wan"}, InvalidRank, "latents", "(batch, channels, frames, h, w)", "4 dimensions"),
        (
            zeros(1, 3, 16, 6, 8),
            {"vae": "qwen-image", "layout": "packed_frame"},
            InvalidRank,
            "latents",
            "(batch, length",
            "5 dimensions",
        ),
        # compression and size
        (zeros(1, 12, 64), {"vae": "qwen-image", "height": 64, "width": 64}, InvalidSize, "height", "12", "16 patches"),
        (zeros(1, 16, 3, 6, 8), {"vae": "wan", "num_frames": 8}, InvalidSize, "num_frames", "decode to 9", "is 8"),
        (zeros(1, 32, 6, 8), {"vae": "flux2-klein", "width": 65}, InvalidSize, "width", "decode to 64", "is 65"),
        (
            zeros(1, 96, 128),
            {"vae": "ltx", "height": 192, "width": 256},
            InvalidSize,
            "num_frames",
            "give num_frames",
            "do not say",
        ),
        # normalisation
        (
            zeros(1, 16, 1, 6, 8),
            {"vae": "wan", "scaling_factor": 0.5},
            InvalidOption,
            "scaling_factor",
            "standardised_inverse",
            "0.5",
        ),
        (
            zeros(1, 32, 6, 8),
            {"vae": "flux2-klein", "shift_factor": 0.1},
            InvalidOption,
            "shift_factor",
            "denormalised",
            "0.1",
        ),
        (
            zeros(1, 4, 6, 8),
            {"vae": "sd", "state": "sideways"},
            InvalidOption,
            "state",
            "scaled, reciprocal",
            "sideways",
        ),
        (
            zeros(1, 16, 1, 6, 8),
            {"vae": "cosmos2"},
            InvalidOption,
            "sigma_data",
            "scheduler.config.sigma_data",
            "missing",
        ),
        (zeros(1, 16, 1, 6, 8), {"vae": "wan", "sigma_data": 0.5}, InvalidOption, "sigma_data", "leave it out", "0.5"),
        # facts
        (zeros(1, 16, 1, 6, 8), {"vae": "wan", "patch_size": 2}, InvalidOption, "patch_size", "packed", "is 2"),
        (zeros(1, 16, 6, 8), {"vae": "sd3", "layers": 2}, InvalidOption, "layers", "layers", "is 2"),
        (zeros(1, 128, 2, 6, 8), {"vae": "ltx", "seed": 1}, InvalidOption, "seed", "give both", "decode_timestep"),
        (
            zeros(1, 128, 2, 6, 8),
            {"vae": "ltx", "decode_timestep": 2},
            InvalidOption,
            "decode_timestep",
            "from 0 to 1",
            "2",
        ),
        (
            zeros(1, 128, 2, 6, 8),
            {"vae": "ltx", "decode_timestep": 0.1, "seed": -1},
            InvalidOption,
            "seed",
            "2^64",
            "-1",
        ),
        # what the VAE makes
        (
            zeros(1, 12, 64),
            {"vae": "qwen-image-21", "height": 48, "width": 64, "output": "jpg"},
            InvalidOption,
            "output",
            "png or webp",
            "RGBA",
        ),
        (zeros(1, 128, 2, 6, 8), {"vae": "ltx2-hdr", "output": "mp4"}, InvalidOption, "output", "choose tensor", "mp4"),
    ],
    ids=lambda item: item["vae"] if isinstance(item, dict) else None,
)
def test_a_mismatch_is_refused_by_field_with_what_was_expected_and_found(
    latents: Any, options: dict[str, Any], kind: Any, field: str, expected: str, found: str, client: DecodeClient
) -> None:
    with pytest.raises(kind) as refusal:
        client.submit(latents, **options)
    assert type(refusal.value) is kind
    assert refusal.value.field == field
    assert expected in refusal.value.message
    assert found in refusal.value.message
    assert "\n" not in refusal.value.message


def test_what_the_catalogue_can_tell_is_told_without_torch() -> None:
    """In a process that cannot import torch."""
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from types import SimpleNamespace
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from producer.pipelines import options_of
from producer.submission import build_request
from producer.decode_options import DecodeOptions
from producer.tensor_input import to_tensor_file
WanPipeline = type("WanPipeline", (SimpleNamespace,), {})
options = options_of(WanPipeline(vae=None), {}, catalog=VaeCatalog.load())
for channels in (16, 15):
    tensor = to_tensor_file(np.zeros((1, channels, 3, 6, 8), np.float32), max_bytes=1 << 20)
    try:
        print(build_request(tensor, DecodeOptions(**options), catalog=VaeCatalog.load(),
                            settings=load_settings(_env_file=None)).num_frames)
    except ValueError as error:
        print(error.code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["9", "latents_channels"], done.stderr


# From a pipeline --------------------------------------------------------------------------------------------


def pipeline(name: str, **parts: Any) -> Any:
    return type(name, (SimpleNamespace,), {})(**parts)


def part(name: str, **config: Any) -> Any:
    return type(name, (SimpleNamespace,), {})(config=config)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FluxPipelin", ["FluxPipeline", "near it"]),
        ("WanImageToVideo", ["WanImageToVideoPipeline"]),
        ("Zzz", ["no name is near it", "docs/vaes.md"]),
        ("StableAudioPipeline", ["they are sound"]),
        ("AmusedPipeline", ["codebook"]),
        ("VisualClozeGenerationPipeline", ["several sizes"]),
    ],
)
def test_a_pipeline_that_is_not_in_the_table_is_refused(name: str, words: list[str], client: DecodeClient) -> None:
    with pytest.raises(UnknownPipeline) as refusal:
        client.submit(zeros(1, 4, 8, 8), pipeline=pipeline(name, vae=None))
    assert (refusal.value.code, refusal.value.field) == ("unknown_pipeline", "pipeline")
    assert all(word in refusal.value.message for word in words), refusal.value.message


@pytest.mark.parametrize(
    ("made", "given", "expected"),
    [
        (pipeline("StableDiffusionXLPipeline", vae=None), {}, {"vae": "sdxl", "layout": "unpacked"}),
        (
            pipeline("StableDiffusionXLPipeline", vae=part("AutoencoderKL", latents_mean=[0.0], latents_std=[1.0])),
            {},
            {"vae": "playground"},
        ),
        # SDXL's own VAE asks for float32, the one that was trained on from it does not
        (
            pipeline("StableDiffusionXLPipeline", vae=part("AutoencoderKL", force_upcast=True)),
            {},
            {"vae": "sdxl-original"},
        ),
        (pipeline("StableDiffusionXLPipeline", vae=part("AutoencoderKL", force_upcast=False)), {}, {"vae": "sdxl"}),
        (
            pipeline("AnimateDiffSDXLPipeline", vae=part("AutoencoderKL", force_upcast=True)),
            {},
            {"vae": "sdxl-original"},
        ),
        (pipeline("WanPipeline", vae=None, transformer=part("T", out_channels=48)), {}, {"vae": "wan22-5b"}),
        (pipeline("WanPipeline", vae=None, transformer=part("T", out_channels=16)), {}, {"vae": "wan"}),
        (
            pipeline("CogVideoXPipeline", vae=None, transformer=part("T", num_attention_heads=30)),
            {},
            {"vae": "cogvideox-2b"},
        ),
        (
            pipeline("CogVideoXPipeline", vae=None, transformer=part("T", num_attention_heads=48)),
            {},
            {"vae": "cogvideox-5b"},
        ),
        (
            pipeline("Cosmos2VideoToWorldPipeline", vae=None, scheduler=part("S", sigma_data=0.5)),
            {},
            {"sigma_data": 0.5},
        ),
        (pipeline("Krea2Pipeline", vae=None, patch_size=1), {}, {"patch_size": 1}),
        # 81 frames are 21 latent frames, which CogVideoX 1.5 pads to 22; 85 are 22
        (
            pipeline("CogVideoXPipeline", transformer=part("T", patch_size_t=2)),
            {"num_frames": 81},
            {"additional_frames": 1},
        ),
        (
            pipeline("CogVideoXPipeline", transformer=part("T", patch_size_t=2)),
            {"num_frames": 85},
            {"additional_frames": 0},
        ),
        ("Flux2Pipeline", {}, {"vae": "flux2", "layout": "packed_patched"}),
        (pipeline("StableDiffusion3InpaintPipeline", vae=None), {}, {"vae": "sd3", "shift_factor": 0.0}),
        (
            pipeline("FluxPipeline", vae=None),
            {"vae": "taef1", "layout": "unpacked"},
            {"vae": "taef1", "layout": "unpacked"},
        ),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, SimpleNamespace) else None,
)
def test_what_a_pipeline_tells(made: Any, given: dict[str, Any], expected: dict[str, Any]) -> None:
    told = options_of(made, given, catalog=VaeCatalog.load())
    assert {name: told[name] for name in expected} == expected


def test_a_pipeline_with_a_vae_of_another_class_than_the_catalogues_is_refused(client: DecodeClient) -> None:
    made = pipeline("StableDiffusionPipeline", vae=part("AutoencoderTiny"))
    with pytest.raises(InvalidOption) as refusal:
        client.submit(zeros(1, 4, 8, 8), pipeline=made)
    assert refusal.value.field == "vae"
    assert "AutoencoderTiny" in refusal.value.message
    assert "AutoencoderKL" in refusal.value.message


def test_padded_clips_need_the_frames_that_were_asked_for(client: DecodeClient) -> None:
    made = pipeline("CogVideoXPipeline", vae=None, transformer=part("T", patch_size_t=2))
    with pytest.raises(InvalidOption, match="pads its clips") as refusal:
        client.submit(zeros(1, 22, 16, 6, 8), pipeline=made)
    assert refusal.value.field == "num_frames"


@pytest.mark.parametrize(
    ("asked", "latent_frames", "made"),
    [
        (84, 22, 81),  # 21 latent frames, padded to 22 in front
        (81, 22, 81),
        (85, 22, 88),  # two latent frames at a time: an even number of them makes four frames each
        (77, 20, 80),
    ],
)
def test_any_number_of_frames_that_cogvideox_makes_so_many_latents_of_is_taken(
    asked: int, latent_frames: int, made: int, client: DecodeClient
) -> None:
    padded = pipeline("CogVideoXPipeline", vae=None, transformer=part("T", patch_size_t=2))
    job = client.submit(zeros(1, latent_frames, 16, 6, 8), pipeline=padded, num_frames=asked)
    request = job.snapshot().request
    assert request is not None
    assert request.num_frames == made
    with pytest.raises(InvalidSize, match="num_frames"):
        client.submit(zeros(1, latent_frames, 16, 6, 8), pipeline=padded, num_frames=asked + 8)


def test_what_is_normalised_in_patches_has_even_sides(client: DecodeClient) -> None:
    with pytest.raises(InvalidSize, match="odd side") as refusal:
        client.submit(zeros(1, 32, 7, 8), vae="bria-fibo2")
    assert refusal.value.field == "latents"


def test_a_shift_that_nothing_adds_is_refused(client: DecodeClient) -> None:
    with pytest.raises(InvalidOption, match="leave it out") as refusal:
        client.submit(zeros(1, 4, 6, 8), vae="sd", state="reciprocal", shift_factor=0.1)
    assert refusal.value.field == "shift_factor"
    assert client.submit(zeros(1, 4, 6, 8), vae="sd", state="reciprocal", shift_factor=0.0).cancel() == "canceled"


def test_an_encode_takes_over_of_a_pipeline_what_belongs_to_its_vae(client: DecodeClient) -> None:
    """pipeline_stable_diffusion_3_inpaint.py leaves the shift out of its decode, and subtracts it as it encodes."""
    picture = np.zeros((48, 64, 3), np.uint8)
    requests = []
    for options in ({}, {"shift_factor": 0.5}):
        request = client.encode(picture, pipeline="StableDiffusion3InpaintPipeline", **options).snapshot().request
        assert request is not None
        requests.append(request)
    assert [request.vae for request in requests] == ["sd3", "sd3"]
    assert [request.shift_factor for request in requests] == [None, 0.5]


@pytest.mark.parametrize(("vae", "frames"), [("wan", 80), ("cogvideox-5b", 48), ("minimax-h3", 20)])
def test_how_many_frames_a_vaes_own_input_has_is_its_business(vae: str, frames: int, client: DecodeClient) -> None:
    """`AutoencoderKLWan._encode` drops what is more than whole groups; a pipeline's own code counts on it."""
    clip = zeros(1, 3, frames, 16, 16)
    assert client.encode(clip, vae=vae, state="posterior", layout="video").cancel() == "canceled"
    with pytest.raises(InvalidSize, match=f"{frames} frames"):
        client.encode(clip, vae=vae, state="denormalised", layout="video")


def test_a_padded_canvas_needs_the_frames_that_were_asked_for(client: DecodeClient) -> None:
    with pytest.raises(InvalidSize, match="give num_frames") as refusal:
        client.submit(zeros(1, 128, 4, 3, 4), pipeline="LTX2DFRPipeline")
    assert refusal.value.field == "num_frames"


def test_what_has_a_high_dynamic_range_becomes_a_tensor_unless_told_otherwise(client: DecodeClient) -> None:
    job = client.submit(zeros(1, 128, 2, 3, 4), pipeline="LTX2HDRPipeline")
    request = job.snapshot().request
    assert request is not None
    assert (request.vae, request.output) == ("ltx2-hdr", "tensor")


def test_latents_that_lack_their_first_frame_are_refused(client: DecodeClient) -> None:
    made = pipeline(
        "HunyuanVideoImageToVideoPipeline", vae=None, transformer=part("T", image_condition_type="latent_concat")
    )
    with pytest.raises(InvalidOption, match="token_replace") as refusal:
        client.submit(zeros(1, 16, 3, 6, 8), pipeline=made)
    assert refusal.value.field == "pipeline"


# At the worker ----------------------------------------------------------------------------------------------


@pytest.fixture
def failed(client: DecodeClient, settings: Settings) -> Callable[..., dict[str, Any]]:
    """Decodes, and returns the error of the only attempt."""

    def decode(latents: Any, vaes: tuple[str, ...] = ("sd",), **options: Any) -> dict[str, Any]:
        with ThreadWorker(settings, vaes=vaes):
            snapshot = client.submit(latents, **options).wait(60)
        assert snapshot.status == "failed"
        assert snapshot.error_count == 1, "trying again would change nothing"
        return dict(snapshot.errors[-1])

    return decode


@pytest.mark.parametrize(
    ("name", "value"),
    [("vae_class", "AutoencoderTiny"), ("vae_config", "0123456789abcdef"), ("vae_revision", "refs-pr-1")],
)
def test_another_vae_than_the_pipelines_is_refused_by_the_worker(
    name: str, value: str, failed: Callable[..., dict[str, Any]]
) -> None:
    error = failed(zeros(1, 4, 8, 8), vae="sd", **{name: value})
    assert (error["code"], error["field"]) == ("weights_mismatch", name)
    assert f"is {value}" in error["message"]


def test_a_factor_that_contradicts_a_vaes_statistics_is_refused_by_the_worker(
    client: DecodeClient, settings: Settings, tiny_catalog: Path
) -> None:
    config = tiny_catalog.parent / "sdxl" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}))
    try:
        with ThreadWorker(settings, vaes=("sdxl",)):
            snapshot = client.submit(zeros(1, 4, 8, 8), vae="sdxl", scaling_factor=0.5).wait(60)
            same = client.submit(zeros(1, 4, 8, 8), vae="sdxl", scaling_factor=0.13025).wait(60)
    finally:
        config.write_text(text)
    error = snapshot.errors[-1]
    assert (error["code"], error["field"]) == ("invalid_option", "scaling_factor")
    assert "0.5" in error["message"]
    assert "0.13025" in error["message"]
    assert same.status == "succeeded"


def test_a_state_that_goes_by_statistics_the_vae_lacks_is_refused_by_the_worker(
    failed: Callable[..., dict[str, Any]],
) -> None:
    error = failed(zeros(1, 4, 8, 8), vae="sd", state="standardised")
    assert (error["code"], error["field"]) == ("invalid_option", "state")
    error = failed(zeros(1, 4, 8, 8), vae="sd", state="batch_norm")
    assert (error["code"], error["field"]) == ("invalid_option", "state")


def test_a_timestep_for_a_vae_that_knows_none_is_refused_by_the_worker(failed: Callable[..., dict[str, Any]]) -> None:
    error = failed(zeros(1, 4, 8, 8), vae="sd", decode_timestep=0.05, seed=1)
    assert (error["code"], error["field"]) == ("invalid_option", "decode_timestep")


def test_weights_whose_config_is_not_the_catalogues_are_not_loaded(tiny_catalog: Path, tmp_path: Path) -> None:
    from worker.vae_pool import VaePool

    torch = pytest.importorskip("torch")
    own = tmp_path / "own.toml"

    def pool(digest: str) -> VaePool:
        own.write_text(
            f'[mine]\ntitle = "mine"\nweights = "{tiny_catalog.parent / "sd"}"\nvae_class = "AutoencoderKL"\n'
            f'channels = 4\nspatial = 8\nlayouts = ["unpacked"]\nconfig_digest = "{digest}"\n'
        )
        return VaePool(VaeCatalog.load(own), device=torch.device("cpu"))

    with pytest.raises(WeightsMismatch, match="0123456789abcdef") as refusal:
        pool("0123456789abcdef").get("mine")
    assert refusal.value.field == "config_digest"
    found = config_digest(json.loads((tiny_catalog.parent / "sd" / "config.json").read_text()))
    assert pool(found).get("mine").weights["config"] == found


def test_a_digest_is_that_of_what_decides_the_numbers() -> None:
    config = {"latent_channels": 4, "scaling_factor": 0.18215, "block_out_channels": (128, 256), "sample_size": 512}
    assert config_digest(config) == config_digest(json.loads(json.dumps(config)))
    assert config_digest(config) == config_digest(config | {"sample_size": 1024, "_name_or_path": "x"})
    assert config_digest(config) != config_digest(config | {"scaling_factor": 0.13025})
    assert config_digest(config | {"scaling_factor": 1}) == config_digest(config | {"scaling_factor": 1.0})
