"""The demo pipeline draws the demo photographs from their prompts, and its script trains it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker_config.vae_catalog import VaeCatalog
from producer.pipelines import options_of
from tests.support.demo_photographs import NEEDED_PSNR, photograph, psnr

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
skimage_data = pytest.importorskip("skimage.data")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "producer" / "demo_pipeline"
PROMPTS = {
    "astronaut": ("a portrait of an astronaut in an orange space suit", "the astronaut of my dreams"),
    "coffee": ("a cup of coffee on a wooden table", "my morning coffee"),
    "chelsea": ("chelsea, a tabby cat with green eyes, close up", "the cat of my neighbour"),
    "rocket": ("a rocket on its launch pad at dusk", "a big red rocket"),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    """The pipeline as a producer loads it."""
    loaded = diffusers.DiffusionPipeline.from_pretrained(FOLDER, vae=None, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def vae() -> Any:
    return diffusers.AutoencoderKL.from_pretrained(ROOT / "worker" / "demo_vae", local_files_only=True).eval()


def drawn(pipe: Any, vae: Any, prompt: str, *, seed: int = 11, **options: Any) -> np.ndarray[Any, Any]:
    asked = {"num_inference_steps": 4, "guidance_scale": 1.0} | options
    latents = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **asked).images
    assert tuple(latents.shape) == (1, 16, 32, 32)
    with torch.no_grad():
        sample = vae.decode(latents / vae.config.scaling_factor).sample
    return np.asarray(diffusers.image_processor.VaeImageProcessor().postprocess(sample, output_type="pil")[0])


def test_it_is_a_diffusers_pipeline_of_the_stated_size_without_a_vae(pipe: Any) -> None:
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert pipe.vae is None
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) <= 12_000_000
    assert not [path for path in FOLDER.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert pipe.unet.config.in_channels == 16


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_draws_its_photograph(name: str, pipe: Any, vae: Any) -> None:
    for prompt in PROMPTS[name]:
        assert psnr(drawn(pipe, vae, prompt), photograph(name)) >= NEEDED_PSNR[name], prompt


def test_steps_guidance_and_seed_may_vary(pipe: Any, vae: Any) -> None:
    prompt, wanted = PROMPTS["coffee"][0], photograph("coffee")
    for options in ({"num_inference_steps": 1}, {"num_inference_steps": 12}, {"seed": 5}):
        assert psnr(drawn(pipe, vae, prompt, **options), wanted) >= NEEDED_PSNR["coffee"], options
    assert psnr(drawn(pipe, vae, prompt, guidance_scale=2.0), wanted) >= NEEDED_PSNR["coffee"] - 3
    assert np.array_equal(drawn(pipe, vae, prompt), drawn(pipe, vae, prompt)), "the same seed, the same picture"


def test_a_job_of_its_latents_needs_no_more_than_the_pipeline_and_the_vae(pipe: Any) -> None:
    options = options_of(pipe, {"vae": "demo"}, catalog=VaeCatalog.load())
    assert options == {"vae": "demo", "layout": "unpacked"}


def test_the_script_trains_and_writes_what_from_pretrained_reads(tmp_path: Path) -> None:
    out, log = tmp_path / "pipeline", tmp_path / "losses.json"
    done = subprocess.run(
        [sys.executable, "-m", "tools.train_demo_pipeline", "--steps", "8", "--out", out, "--losses", log],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = json.loads(log.read_text())
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3]), losses
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, vae=None, local_files_only=True)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    written, shipped = ({path.relative_to(at) for path in at.rglob("*.*")} for at in (out, FOLDER))
    assert written == shipped - {Path("README.md")}
