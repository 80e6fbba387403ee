"""The demo VAE decodes its stored latents to the photographs they were made from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
skimage_data = pytest.importorskip("skimage.data")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

FOLDER = Path(__file__).resolve().parents[2] / "worker" / "demo_vae"
WEIGHTS = FOLDER / "diffusion_pytorch_model.safetensors"
LATENTS = sorted((FOLDER / "latents").glob("*.safetensors"))
PHOTOS = [path for path in LATENTS if path.stem != "clip"]
CLIP = FOLDER / "latents" / "clip.safetensors"
NEEDED_PSNR = 26.0
REQUIRED_KEYS = {"vae", "height", "width", "title", "source", "crop", "licence"}


def read(path: Path) -> tuple[Any, dict[str, str]]:
    """Return the tensor and the metadata of a latents file, which holds nothing else."""
    with safetensors.safe_open(path, framework="pt") as handle:
        assert list(handle.keys()) == ["latents"]
        return handle.get_tensor("latents"), dict(handle.metadata())


def source_pixels(meta: dict[str, str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the whole source photograph (H, W, 3)."""
    return np.asarray(getattr(skimage_data, meta["source"])())[..., :3]


def psnr(shown: Any, wanted: Any) -> float:
    """PSNR in dB between two 8-bit pictures."""
    error = np.asarray(shown, dtype=np.float64) - np.asarray(wanted, dtype=np.float64)
    return 10.0 * math.log10(255.0**2 / max(float(np.mean(error**2)), 1e-9))


def clip_corners(meta: dict[str, str]) -> list[tuple[int, int]]:
    """Return the top left corner of every clip frame, as the training script documents it."""
    y0, x0, y1, x1 = map(int, meta["pan"].split(","))
    last = int(meta["num_frames"]) - 1
    return [
        (math.floor(y0 + (y1 - y0) * i / last + 0.5), math.floor(x0 + (x1 - x0) * i / last + 0.5))
        for i in range(last + 1)
    ]


@pytest.fixture(scope="module")
def vae() -> Any:
    """The demo VAE as a worker loads it."""
    model = diffusers.AutoencoderKL.from_pretrained(FOLDER, torch_dtype=torch.float32, local_files_only=True)
    return model.eval()


def decode(vae: Any, latents: Any) -> Any:
    """Decode a (1, C, h, w) scaled latent to a PIL image."""
    with torch.no_grad():
        sample = vae.decode(latents.float() / vae.config.scaling_factor).sample
    assert bool(torch.isfinite(sample).all())
    processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=8)
    return processor.postprocess(sample, output_type="pil")[0]


def test_the_set_is_complete() -> None:
    assert CLIP in LATENTS
    assert len(PHOTOS) >= 4
    shapes = [read(path)[0].shape for path in PHOTOS]
    assert any(shape[2] != shape[3] for shape in shapes), "one photograph is not square"


def test_files_stay_small() -> None:
    assert WEIGHTS.stat().st_size <= 4_000_000
    assert sum(path.stat().st_size for path in LATENTS) <= 1_400_000
    known = {FOLDER / "config.json", WEIGHTS, FOLDER / "README.md", *LATENTS}
    assert {path for path in FOLDER.rglob("*") if path.is_file()} <= known


def test_weights_are_finite() -> None:
    tensors = safetensors_torch.load_file(WEIGHTS)
    assert sum(tensor.numel() for tensor in tensors.values()) <= 2_000_000
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


@pytest.mark.parametrize("path", LATENTS, ids=lambda path: path.stem)
def test_latents_fit_their_metadata(path: Path, vae: Any) -> None:
    latents, meta = read(path)
    assert meta.keys() >= REQUIRED_KEYS
    assert meta["vae"] == "demo"
    height, width = int(meta["height"]), int(meta["width"])
    frames = (int(meta["num_frames"]),) if path == CLIP else ()
    assert tuple(latents.shape) == (1, vae.config.latent_channels, *frames, height // 8, width // 8)
    assert height % 8 == 0
    assert width % 8 == 0
    assert latents.dtype == torch.float16
    assert bool(torch.isfinite(latents).all())
    assert 0.5 < float(latents.float().std()) < 2.0, "scaled latents have about unit std"


@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_photograph_decodes_to_its_source(path: Path, vae: Any) -> None:
    latents, meta = read(path)
    y, x, height, width = map(int, meta["crop"].split(","))
    wanted = source_pixels(meta)[y : y + height, x : x + width]
    image = decode(vae, latents)
    assert image.size == (int(meta["width"]), int(meta["height"])) == (width, height)
    assert psnr(image, wanted) >= NEEDED_PSNR


def test_clip_decodes_to_its_source(vae: Any) -> None:
    latents, meta = read(CLIP)
    pixels = source_pixels(meta)
    height, width = int(meta["height"]), int(meta["width"])
    scores = []
    for index, (y, x) in enumerate(clip_corners(meta)):
        wanted = pixels[y : y + height, x : x + width]
        assert wanted.shape == (height, width, 3), "the window stays inside the photograph"
        scores.append(psnr(decode(vae, latents[:, :, index]), wanted))
    assert sum(scores) / len(scores) >= NEEDED_PSNR


def test_encoder_gives_the_stored_latents(vae: Any) -> None:
    latents, meta = read(PHOTOS[0])
    y, x, height, width = map(int, meta["crop"].split(","))
    crop = source_pixels(meta)[y : y + height, x : x + width]
    batch = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    with torch.no_grad():
        again = vae.encode(batch).latent_dist.mode() * vae.config.scaling_factor
    assert float((again - latents.float()).abs().max()) < 0.05
