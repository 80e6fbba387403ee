"""`QueuedVAE` in diffusers' own pipelines: what they return with it is what they return with the VAE itself.

Given a pipeline around a tiny VAE, and once more around its stand-in, whose work a worker process does; when both are
called with the same seed; then they return the same numbers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from broker_config.errors import InvalidOption, JobFailed, UnknownVae, WaitTimeout, WeightsMissing
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient, JobStatus, queued_vae
from producer.pipelines import noise_state
from producer.queued_vae import QueuedVAE
from tests.parity import test_remote_vae_families
from tests.parity.families import CASES as WHOLE
from tests.parity.test_remote_vae_families import TEXT, _flux, _stable_diffusion, _unet, _vae
from tests.parity.whole_pipelines import build, call, diffusers_class
from tests.support.serving import Serving, serving
from tests.support.tiny_families import make, write_family_catalog

pytestmark = [
    pytest.mark.usefixtures("pipelines_importable"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # schedulers, with numpy 2
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # diffusers of its own classes
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi
]

#: Encodes pictures with an alpha channel, which jobs do not take.
_OF_RGBA = "qwen-image-layered"
#: Of a high dynamic range: its pipeline works with the stand-in of `ltx2`, which is the same VAE.
_HDR = "ltx2-hdr"

NAMES = {case.vae for case in WHOLE.values()} - {_HDR} | {"sd", "flux", "taesd", "svd", "sana", "sd3", "anyflow"}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_catalog(tmp_path_factory.mktemp("queued"), NAMES)


@pytest.fixture(scope="module")
def served(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("queued-broker"), catalog=catalog, vaes=tuple(sorted(NAMES))) as started:
        yield started


def pair(served: Serving, name: str, **options: Any) -> tuple[Any, Any]:
    """The VAE itself and its stand-in."""
    real = _vae(Path(served.client.catalog[name].weights))
    return real, QueuedVAE(name, client=served.client, wait_s=120, **options)


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# Whole pipelines -----------------------------------------------------------------------------------------


def test_a_stand_in_of_a_high_dynamic_range_is_refused(served: Serving) -> None:
    with pytest.raises(InvalidOption, match="ltx2") as refusal:
        QueuedVAE(_HDR, client=served.client)
    assert refusal.value.field == "vae"


def test_a_stand_in_whose_jobs_end_with_what_the_pipeline_does_afterwards_is_refused(served: Serving) -> None:
    with pytest.raises(InvalidOption, match="submit its latents") as refusal:
        QueuedVAE("minimax-h3", client=served.client)
    assert refusal.value.field == "vae"


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in (_OF_RGBA, _HDR)])
def test_a_pipeline_makes_the_same_with_it(name: str, served: Serving) -> None:
    case = WHOLE[name]
    real, queued = pair(served, case.vae)
    expected = call(build(case, real), case, "np")
    made = call(build(case, queued), case, "np")
    assert len(np.unique(expected)) > 32, "a flat picture is equal to any other"
    assert np.array_equal(np.asarray(made), np.asarray(expected))


@pytest.mark.parametrize("name", ["sd, batch of 2, landscape", "sd, clips of AnimateDiff", "flux, packed", "sdxl"])
def test_a_pipeline_with_its_own_denoiser_makes_the_same_with_it(name: str, served: Serving, parity: Serving) -> None:
    case = test_remote_vae_families.CASES[name]
    made = []
    for vae in pair(parity, case.vae):
        torch.manual_seed(7)  # the denoiser's weights
        pipeline = quiet(case.build(vae))
        arguments = {"prompt_embeds": embeddings(case.batch), **case.call}
        if name in ("flux, packed", "sdxl"):
            arguments["pooled_prompt_embeds"] = embeddings(case.batch)[:, 0]
        if case.num_frames is not None:
            arguments["num_frames"] = case.num_frames
        made.append(drawn(pipeline, height=case.height, width=case.width, **arguments))
    assert torch.equal(*made)


def embeddings(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, TEXT, generator=torch.Generator().manual_seed(11))


def drawn(pipeline: Any, **arguments: Any) -> torch.Tensor:
    made: torch.Tensor = pipeline(
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(13),
        output_type="pt",
        return_dict=False,
        **arguments,
    )[0]
    return made


def photograph(height: int = 64, width: int = 96, *, seed: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_image_to_image_of_stable_diffusion_encodes_and_decodes_through_the_queue(served: Serving) -> None:
    made = []
    for vae in pair(served, "sd"):
        torch.manual_seed(7)
        parts = _stable_diffusion(vae).components
        pipeline = quiet(diffusers_class("StableDiffusionImg2ImgPipeline")(**parts, requires_safety_checker=False))
        made.append(drawn(pipeline, image=photograph(), prompt_embeds=embeddings(), guidance_scale=1.0, strength=0.99))
    assert made[0].shape == (1, 3, 64, 96)
    assert torch.equal(*made)


def test_inpainting_of_stable_diffusion_encodes_what_is_no_picture(served: Serving) -> None:
    """The masked picture has grey holes, which are no values of bytes."""
    mask = Image.fromarray(np.kron([[255, 0], [0, 255]], np.ones((32, 48))).astype(np.uint8))
    made = []
    for vae in pair(served, "sd"):
        torch.manual_seed(7)
        parts = _stable_diffusion(vae).components | {"unet": _unet()}
        pipeline = quiet(diffusers_class("StableDiffusionInpaintPipeline")(**parts, requires_safety_checker=False))
        made.append(
            drawn(
                pipeline,
                image=photograph(),
                mask_image=mask,
                prompt_embeds=embeddings(),
                guidance_scale=1.0,
                height=64,
                width=96,
            )
        )
    assert torch.equal(*made)


def test_image_to_image_of_flux_draws_from_the_posterior_with_the_callers_generator(served: Serving) -> None:
    made = []
    for vae in pair(served, "flux"):
        torch.manual_seed(7)
        parts = {name: part for name, part in _flux(vae).components.items()}
        pipeline = quiet(diffusers_class("FluxImg2ImgPipeline")(**parts))
        made.append(
            drawn(
                pipeline,
                image=photograph(),
                prompt_embeds=embeddings(),
                pooled_prompt_embeds=embeddings()[:, 0],
                height=64,
                width=96,
                strength=0.9,
            )
        )
    assert torch.equal(*made)


def test_video_to_video_of_wan_encodes_clips(served: Serving) -> None:
    case = WHOLE["wan"]
    clip = [photograph(48, 64, seed=number) for number in range(5)]
    made = []
    for vae in pair(served, "wan"):
        whole = build(case, vae)
        parts = {
            name: getattr(whole, name) for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
        }
        pipeline = quiet(diffusers_class("WanVideoToVideoPipeline")(**parts))
        made.append(
            drawn(
                pipeline,
                video=clip,
                prompt_embeds=torch.randn(1, 3, TEXT, generator=torch.Generator().manual_seed(11)),
                guidance_scale=1.0,
                height=48,
                width=64,
                strength=0.9,
            )
        )
    assert torch.equal(*made)


# The VAE's own calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape"), [("taesd", (2, 4, 6, 8)), ("sana", (2, 32, 3, 4)), ("sd3", (1, 16, 6, 8))])
def test_its_calls_return_what_the_class_returns(name: str, shape: tuple[int, ...], served: Serving) -> None:
    real, queued = pair(served, name)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        for theirs, ours in (
            (real.decode(latents), queued.decode(latents)),
            (real.encode(pixels), queued.encode(pixels)),
        ):
            assert type(ours) is type(theirs)
            assert list(ours) == list(theirs)
        assert torch.equal(queued.decode(latents).sample, real.decode(latents).sample)
        assert torch.equal(queued.decode(latents, return_dict=False)[0], real.decode(latents, return_dict=False)[0])
        theirs, ours = real.encode(pixels), queued.encode(pixels)
        if "latent_dist" in theirs:
            draws = [item.latent_dist.sample(torch.Generator().manual_seed(5)) for item in (theirs, ours)]
            assert torch.equal(*draws)
            assert torch.equal(ours.latent_dist.mode(), theirs.latent_dist.mode())
        else:
            assert torch.equal(ours[0], theirs[0])


def test_frames_of_stable_video_diffusion_are_decoded_with_their_neighbours(served: Serving) -> None:
    real, queued = pair(served, "svd")
    frames = torch.randn(6, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = real.decode(frames, num_frames=3).sample
        assert torch.equal(queued.decode(frames, num_frames=3).sample, expected)
        assert torch.equal(queued.decode(frames, 3, return_dict=False)[0], expected)
        assert not torch.equal(expected, real.decode(frames, num_frames=6).sample)


def test_a_vae_that_decodes_from_noise_is_given_the_generator(served: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its state; a worker draws from it what the pipeline would have drawn."""
    monkeypatch.setattr(queued_vae, "_read_statistics", lambda module, entry: None)  # its weights are on a hub
    queued = QueuedVAE("consistency-decoder", client=served.client, wait_s=0.01, config={})
    generator = torch.Generator().manual_seed(3)
    generator.manual_seed(5)
    with pytest.raises(WaitTimeout) as timeout:
        queued.decode(torch.zeros(1, 4, 6, 8), generator=generator)
    assert timeout.value.job_id is not None
    job = served.client.job(timeout.value.job_id)
    request = job.snapshot().request
    job.cancel()
    assert request is not None
    assert request.noise_state == noise_state(torch.Generator().manual_seed(5))


def test_noise_that_was_said_of_every_job_goes_before_the_callers_generator(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued_vae, "_read_statistics", lambda module, entry: None)
    queued = QueuedVAE("consistency-decoder", client=served.client, wait_s=0.01, config={}, seed=7)
    with pytest.raises(WaitTimeout) as timeout:
        queued.decode(torch.zeros(1, 4, 6, 8), generator=torch.Generator())
    assert timeout.value.job_id is not None
    job = served.client.job(timeout.value.job_id)
    request = job.snapshot().request
    job.cancel()
    assert request is not None
    assert (request.seed, request.noise_state) == (7, None)


def test_a_clip_of_any_length_is_encoded_as_the_class_does_it(served: Serving) -> None:
    """By `encode`, and by `_encode`, which AnyFlow's pipelines call."""
    real, queued = pair(served, "anyflow")
    for frames in (8, 9):
        clip = torch.randn(1, 3, frames, 48, 64, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert torch.equal(queued.encode(clip).latent_dist.mode(), real.encode(clip).latent_dist.mode())
            assert torch.equal(queued._encode(clip), real._encode(clip))


def test_a_vae_with_timestep_conditioning_is_told_the_timestep(tmp_path: Path, catalog: Path) -> None:
    from tests.support.tiny_families import catalogue, ltx

    folder = tmp_path / "ltx-timestep"
    torch.manual_seed(5)
    ltx(catalogue()["ltx"], timestep_conditioning=True).eval().save_pretrained(folder)
    own = tmp_path / "catalog.toml"
    table = {
        key: catalogue()["ltx"][key] for key in ("title", "vae_class", "channels", "spatial", "temporal", "layouts")
    }
    lines = [
        "[ltx]",
        f'weights = "{folder}"',
        *(f"{key} = {value!r}".replace("'", '"') for key, value in table.items()),
    ]
    own.write_text("\n".join(lines))
    with serving(tmp_path / "broker", catalog=own, vaes=("ltx",)) as started:
        real, queued = pair(started, "ltx")
        latents = torch.randn(2, 128, 2, 2, 3, generator=torch.Generator().manual_seed(1))
        step = torch.tensor([0.05, 0.05])
        with torch.no_grad():
            expected = real.decode(latents, step, return_dict=False)[0]
            assert torch.equal(queued.decode(latents, step, return_dict=False)[0], expected)
            assert torch.equal(queued.decode(latents, temb=step).sample, expected)
        with pytest.raises(InvalidOption, match="several timesteps"):
            queued.decode(latents, torch.tensor([0.05, 0.1]))
        assert torch.equal(queued.latents_mean, real.latents_mean), "read off the weights' file"


# What a pipeline asks a VAE ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_it_is_of_the_vaes_class_with_its_config_and_without_weights(name: str, served: Serving) -> None:
    real, queued = pair(served, name)
    assert isinstance(queued, type(real))
    ours, theirs = ({key: list(value) if isinstance(value, tuple) else value for key, value in vae.config.items()}
                    for vae in (queued, real))  # fmt: skip
    assert ours | {"_name_or_path": None} == theirs | {"_name_or_path": None}
    # SVD's mixing factors, made without regard to the device: a number each
    assert sum(item.numel() for item in queued.parameters() if not item.is_meta) < 32
    for owner, buffer in real.named_buffers():
        if not owner.startswith(("encoder", "decoder")):
            assert torch.equal(queued.get_buffer(owner), buffer), owner


def test_dtype_and_device_are_what_the_caller_made_them(served: Serving) -> None:
    _, queued = pair(served, "sd")
    assert (queued.dtype, queued.device) == (torch.float32, torch.device("cpu"))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    assert queued.to(torch.bfloat16).dtype == torch.bfloat16
    assert queued.decode(latents.bfloat16()).sample.dtype == torch.bfloat16
    assert queued.half().dtype == torch.float16
    assert queued.float().to("cpu").dtype == torch.float32
    assert next(iter(queued.post_quant_conv.parameters())).dtype == torch.float32
    for switch in ("enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing"):
        getattr(queued, switch)()
    assert queued.decode(latents).sample.shape == (1, 3, 32, 32)


def test_from_pretrained_takes_it_in_place_of_the_vae(served: Serving, tmp_path: Path) -> None:
    real, queued = pair(served, "sd")
    torch.manual_seed(7)
    _stable_diffusion(real).save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    load = diffusers_class("StableDiffusionPipeline").from_pretrained
    made = []
    for vae in ({}, {"vae": queued}):
        pipeline = load(tmp_path, requires_safety_checker=False, low_cpu_mem_usage=False, **absent, **vae)
        assert pipeline.to(torch.float32).device == torch.device("cpu")
        arguments = {"prompt_embeds": embeddings(), "guidance_scale": 1.0, "height": 64, "width": 64}
        made.append(drawn(quiet(pipeline), **arguments))
    assert torch.equal(*made)
    with pytest.raises(InvalidOption, match="no weights to save"):
        queued.save_pretrained(tmp_path)


# Jobs ----------------------------------------------------------------------------------------------------


def test_a_failed_decode_raises_with_the_job_whose_latents_are_kept(served: Serving) -> None:
    _, queued = pair(served, "sd", start_within_s=0.001, priority="low")
    ahead = [served.client.submit(torch.zeros(1, 4, 32, 32), vae="sd", priority="high") for _ in range(20)]
    with pytest.raises(JobFailed) as caught:
        queued.decode(torch.zeros(1, 4, 4, 4))
    job = served.client.job(str(caught.value.job_id))
    assert job.status() is JobStatus.FAILED
    for item in ahead:
        served.finished(item)
    served.finished(job.redecode(start_within_s=600.0))


def test_what_was_fetched_is_freed(served: Serving) -> None:
    _, queued = pair(served, "sd", job_id="freed")
    queued.decode(torch.zeros(1, 4, 4, 4))
    assert served.client.job("freed").status() is JobStatus.EXPIRED


def test_errors_say_what_is_wrong(served: Serving, tmp_path: Path) -> None:
    _, queued = pair(served, "sd")
    with pytest.raises(InvalidOption, match="causal"):
        queued.decode(torch.zeros(1, 4, 4, 4), causal=True)
    with pytest.raises(UnknownVae):
        QueuedVAE("no-such", client=served.client)
    own = tmp_path / "catalog.toml"
    own.write_text(
        f'[gone]\ntitle = "x"\nweights = "{tmp_path}/gone"\nvae_class = "AutoencoderKL"\nchannels = 4\nspatial = 8\n'
        'layouts = ["unpacked"]\n'
    )
    client = DecodeClient(served.client.store.connections, settings=served.settings, catalog=VaeCatalog.load(own))
    with pytest.raises(WeightsMissing, match=r"config\.json"):
        QueuedVAE("gone", client=client)
    stand_in = QueuedVAE(
        "gone",
        client=client,
        config=dict(make("sd", {"spatial": 8, "channels": 4, "vae_class": "AutoencoderKL"}).config),
    )
    assert stand_in.config.scaling_factor == 0.18215


def test_an_event_loop_goes_on_meanwhile(served: Serving) -> None:
    async def story() -> torch.Tensor:
        _, queued = pair(served, "sd")
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        made = await asyncio.to_thread(queued.decode, torch.zeros(1, 4, 4, 4))
        ticking.cancel()
        assert ticks > 10
        return made.sample  # type: ignore[no-any-return]

    assert asyncio.run(story()).shape == (1, 3, 32, 32)
