"""The unmodified `diffusers.utils.remote_decode`, as a process of its own, against a real `latentq up`.

Given tiny random VAEs of the real classes; when the client decodes latents through the gateway; then it gets what the
same VAE gives when it decodes them here, with diffusers' own postprocessing. Nothing of the reference is ours.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image

from broker_config.messages import Kind
from tests.gateway import remote_client
from tests.support.redirecting import redirected_post
from tests.support.remote_clients import answers_of
from tests.support.up import Up, latentq_up

pytestmark = pytest.mark.timeout(300)

FACTORS = {"sd": (0.18215, None), "sdxl": (0.13025, None), "flux": (0.3611, 0.1159), "hunyuanvideo": (0.476986, None)}
SHAPES = {"sd": (2, 4, 8, 8), "sdxl": (1, 4, 8, 12), "flux": (1, 16, 8, 8), "hunyuanvideo": (1, 16, 3, 8, 8)}


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, tiny_catalog: Path) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    more = {"LATENTQ_CATALOG": str(tiny_catalog), "LATENTQ_GATEWAY_DEFAULT_VAE": "sdxl"}
    with latentq_up(folder, vaes=tuple(SHAPES), **more) as running:
        yield running


def latents_for(vae: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(vae))
    return torch.randn(SHAPES[vae], generator=generator)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """As pipeline_flux.py `_pack_latents` does it."""
    batch, channels, height, width = latents.shape
    latents = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(batch, (height // 2) * (width // 2), channels * 4)


def case(
    name: str, vae: str, *, latents: str = "", processor: str = "none", path: str = "", **arguments: Any
) -> dict[str, Any]:
    factor, shift = FACTORS[vae]
    scaling = {} if "do_scaling" in arguments else {"scaling_factor": factor, "shift_factor": shift}
    return {
        "name": name,
        "vae": vae,
        "url": path or f"/decode/{vae}",
        "latents": latents or vae,
        "processor": processor,
        "arguments": scaling | arguments,
    }


CASES = [
    *(
        item
        for vae in ("sd", "sdxl")
        for item in (
            case(f"{vae} png", vae, image_format="png"),
            case(f"{vae} jpg", vae, image_format="jpg"),
            case(f"{vae} raw", vae, output_type="pt", return_type="pt"),
            case(f"{vae} raw to pil", vae, output_type="pt", processor="image"),
            case(f"{vae} pixels", vae, output_type="pt", partial_postprocess=True),
            case(f"{vae} pixels as tensor", vae, output_type="pt", return_type="pt", partial_postprocess=True),
            case(f"{vae} own factors", vae, output_type="pt", return_type="pt", do_scaling=True),
            case(
                f"{vae} scaled before",
                vae,
                latents=f"{vae} scaled",
                output_type="pt",
                return_type="pt",
                do_scaling=False,
            ),
        )
    ),
    case("default vae", "sdxl", path="/", image_format="png"),
    case("half", "sd", latents="sd half", output_type="pt", return_type="pt"),
    case("brain", "sd", latents="sd brain", output_type="pt", return_type="pt"),
    case("flux packed", "flux", latents="flux packed", height=64, width=64, output_type="pt", return_type="pt"),
    case("flux packed png", "flux", latents="flux packed", height=64, width=64, image_format="png"),
    case("flux unpacked", "flux", height=64, width=64, output_type="pt", return_type="pt"),
    case("flux own factors", "flux", do_scaling=True, output_type="pt", return_type="pt"),
    case("video raw", "hunyuanvideo", output_type="pt", return_type="pt"),
    case("video raw to pil", "hunyuanvideo", output_type="pt", processor="video"),
    case("video pil", "hunyuanvideo", output_type="pil", processor="video"),
    case("video pil as tensor", "hunyuanvideo", output_type="pil", return_type="pt", processor="video"),
    case("video pixels", "hunyuanvideo", output_type="pt", partial_postprocess=True),
    case("video mp4", "hunyuanvideo", output_type="mp4", return_type="mp4"),
    case("wrong channels", "sd", latents="flux", output_type="pt", return_type="pt"),
    case("no such vae", "sd", path="/decode/nothing", output_type="pt", return_type="pt"),
    case("not latents of a picture", "sd", latents="flux packed", height=64, width=64, image_format="png"),
]


@pytest.fixture(scope="module")
def answers(up: Up, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client's process got, by case."""
    folder = tmp_path_factory.mktemp("client")
    tensors = {vae: latents_for(vae) for vae in SHAPES}
    tensors |= {f"{vae} scaled": tensors[vae] / FACTORS[vae][0] for vae in ("sd", "sdxl")}
    tensors |= {"flux packed": packed(tensors["flux"]), "sd half": tensors["sd"].half()}
    tensors["sd brain"] = tensors["sd"].bfloat16()
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pt")
    asked = [{**item, "url": up.url + item["url"], "latents": str(folder / f"{item['latents']}.pt")} for item in CASES]
    return answers_of(remote_client, asked, folder=folder, environment=up.environment)


@pytest.fixture(scope="module")
def vaes(tiny_catalog: Path) -> dict[str, Any]:
    """The same VAEs here."""
    import diffusers

    found = {}
    for name in SHAPES:
        folder = tiny_catalog.parent / name
        kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
        found[name] = kind.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    return found


def local(vaes: dict[str, Any], vae: str, latents: torch.Tensor | None = None) -> torch.Tensor:
    """What the VAE makes of these latents in this process, as the pipelines call it."""
    factor, shift = FACTORS[vae]
    latents = (latents_for(vae) if latents is None else latents).float() / factor
    if shift is not None:
        latents = latents + shift
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            decoded: torch.Tensor = vaes[vae].decode(latents, return_dict=False)[0]
            return decoded
    finally:
        torch.set_num_threads(threads)


def pictures(decoded: torch.Tensor) -> list[torch.Tensor]:
    from diffusers.image_processor import VaeImageProcessor

    made: Any = VaeImageProcessor().postprocess(decoded, output_type="pil")
    return [torch.from_numpy(np.array(picture)) for picture in made]


def as_jpeg(picture: torch.Tensor) -> torch.Tensor:
    """The picture after Pillow's own JPEG of quality 95 without subsampling, which docs/options.md promises."""
    buffer = io.BytesIO()
    Image.fromarray(picture.numpy()).save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB")))


def frames(decoded: torch.Tensor) -> list[torch.Tensor]:
    from diffusers.video_processor import VideoProcessor

    made: Any = VideoProcessor().postprocess_video(decoded, output_type="pil")[0]
    return [torch.from_numpy(np.array(frame)) for frame in made]


def equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found, expected), (found.float() - expected.float()).abs().max()


@pytest.mark.parametrize("vae", ["sd", "sdxl"])
def test_pictures_are_those_of_a_local_decode(answers: dict[str, Any], vaes: dict[str, Any], vae: str) -> None:
    decoded = local(vaes, vae)
    expected = pictures(decoded)
    png, jpg = answers[f"{vae} png"], answers[f"{vae} jpg"]
    assert (png["format"], jpg["format"]) == ("png", "jpeg")
    equal(png["pixels"], expected[0])
    equal(jpg["pixels"], as_jpeg(expected[0]))
    equal(answers[f"{vae} raw"], decoded)
    equal(answers[f"{vae} raw to pil"]["pixels"], expected[0])
    pixels = answers[f"{vae} pixels"]
    pixels = pixels if isinstance(pixels, list) else [pixels]
    assert len(pixels) == len(expected)
    for found, wanted in zip(pixels, expected, strict=True):
        equal(found["pixels"], wanted)
    equal(answers[f"{vae} pixels as tensor"], torch.stack(expected))


@pytest.mark.parametrize("vae", ["sd", "sdxl"])
def test_factors_of_the_request_the_vaes_own_or_none(answers: dict[str, Any], vaes: dict[str, Any], vae: str) -> None:
    decoded = local(vaes, vae)
    equal(answers[f"{vae} own factors"], decoded)
    equal(answers[f"{vae} scaled before"], decoded)


def test_the_default_vae_is_at_the_root(answers: dict[str, Any], vaes: dict[str, Any]) -> None:
    equal(answers["default vae"]["pixels"], pictures(local(vaes, "sdxl"))[0])


def test_latents_of_sixteen_bits(answers: dict[str, Any], vaes: dict[str, Any]) -> None:
    equal(answers["half"], local(vaes, "sd", latents_for("sd").half()))
    equal(answers["brain"], local(vaes, "sd", latents_for("sd").bfloat16()))


def test_flux_packed_and_unpacked(answers: dict[str, Any], vaes: dict[str, Any]) -> None:
    decoded = local(vaes, "flux")
    equal(answers["flux packed"], decoded)
    equal(answers["flux packed png"]["pixels"], pictures(decoded)[0])
    equal(answers["flux unpacked"], decoded)
    equal(answers["flux own factors"], decoded)


def test_clips(answers: dict[str, Any], vaes: dict[str, Any], tmp_path: Path) -> None:
    decoded = local(vaes, "hunyuanvideo")
    expected = frames(decoded)
    assert len(expected) == 9
    equal(answers["video raw"], decoded)
    for name in ("video raw to pil", "video pil", "video pixels"):
        assert len(answers[name]) == 9
        for found, wanted in zip(answers[name], expected, strict=True):
            equal(found["pixels"], wanted)
    unit = answers["video pil as tensor"]
    assert unit.shape == (9, 3, 64, 64)
    assert unit.min() >= 0
    assert unit.max() <= 1
    (tmp_path / "clip.mp4").write_bytes(answers["video mp4"])
    assert count_frames_and_secs(str(tmp_path / "clip.mp4"))[0] == 9


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("wrong channels", "latents_channels"),
        ("no such vae", "unknown_vae"),
        ("not latents of a picture", "latents_rank"),
    ],
)
def test_a_refusal_reaches_the_user_as_a_dictionary(answers: dict[str, Any], name: str, code: str) -> None:
    assert answers[name].startswith("RuntimeError: {")
    assert f"'code': '{code}'" in answers[name]


# Other clients ----------------------------------------------------------------------------------------------


def query(*shape: int) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": "float32", "do_scaling": "True", "output_type": "pt"}


def raw(latents: torch.Tensor) -> bytes:
    return latents.numpy().tobytes()


def test_the_helper_of_comfyui_sends_base64_and_gets_it(up: Up, vaes: dict[str, Any]) -> None:
    latents = latents_for("sd") / FACTORS["sd"][0]
    params: dict[str, Any] = {
        "do_scaling": "False",
        "output_type": "pt",
        "partial_postprocess": "False",
        "image_format": "png",
        "shape": list(latents.shape),
        "dtype": "float32",
        "height": 64,
        "width": 64,
        "input_tensor_type": "base64",
        "output_tensor_type": "base64",
    }
    answer = requests.post(
        f"{up.url}/decode/sd",
        params=params,
        headers={"Content-Type": "tensor/base64", "Accept": "tensor/base64"},
        data=json.dumps({"inputs": base64.b64encode(raw(latents)).decode()}),
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    told = answer.json()
    found = torch.frombuffer(bytearray(base64.b64decode(told["inputs"])), dtype=torch.float32)
    assert told["parameters"]["dtype"] == "float32"
    equal(found.reshape(told["parameters"]["shape"]), local(vaes, "sd"))


@pytest.mark.parametrize("loaded", [True, False], ids=["with a vae loaded", "without"])
def test_sd_next_leaves_parameters_out(up: Up, vaes: dict[str, Any], loaded: bool) -> None:
    params: dict[str, Any] = {
        "input_tensor_type": "binary",
        "shape": list(SHAPES["sd"]),
        "dtype": "float32",
        "image_format": "png",
        "output_type": "pil",
    }
    if loaded:
        params["scaling_factor"] = FACTORS["sd"][0]
    answer = requests.post(
        f"{up.url}/decode/sd",
        params=params,
        headers={"Content-Type": "tensor/binary", "Accept": "image/png"},
        data=raw(latents_for("sd")),
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    equal(
        torch.from_numpy(np.array(Image.open(io.BytesIO(answer.content)).convert("RGB"))),
        pictures(local(vaes, "sd"))[0],
    )


# A decode that takes longer than an answer may ------------------------------------------------------------------


def test_past_the_bound_the_client_is_sent_on_and_follows(
    up: Up, vaes: dict[str, Any], tiny_catalog: Path, tmp_path: Path
) -> None:
    answer, job = redirected_post(
        up,
        "/decode/sd",
        catalog=tiny_catalog,
        folder=tmp_path,
        params=query(*SHAPES["sd"]),
        headers={"Content-Type": "tensor/binary", "Accept": "tensor/binary"},
        data=raw(latents_for("sd")),
    )
    assert job.kind is Kind.DECODE
    found = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(
        json.loads(answer.headers["shape"])
    )
    equal(found, local(vaes, "sd"))


def test_several_clients_at_once_get_their_own_pictures(up: Up, vaes: dict[str, Any]) -> None:
    expected = {}
    barrier = threading.Barrier(4)

    def ask(seed: int) -> torch.Tensor:
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        barrier.wait(30)
        answer = requests.post(
            f"{up.url}/decode/sd",
            params=query(1, 4, 8, 8),
            headers={"Content-Type": "tensor/binary", "Accept": "tensor/binary"},
            data=raw(latents),
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        return torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(1, 3, 64, 64)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    for seed in range(4):
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
        expected[seed] = local(vaes, "sd", latents)
        equal(found[seed], expected[seed])
