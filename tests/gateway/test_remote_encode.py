"""The unmodified `diffusers.utils.remote_encode`, as a process of its own, against a real `latentq up`.

Given tiny random VAEs of the real classes; when the client encodes pictures and tensors through the gateway; then it
gets what the same VAE gives when it encodes them here, with diffusers' own preprocessing. Nothing of the reference is
ours.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from broker_config.errors import BadRequest, InvalidOption
from broker_config.messages import Kind
from producer.gateway import remote_encode
from producer.gateway.identity import LOCAL
from producer.gateway.picture_input import _check_scans, peek_picture, read_picture
from producer.tensor_input import TensorFile
from tests.gateway import remote_encode_client
from tests.gateway.conftest import problem
from tests.gateway.test_remote_decode import equal
from tests.parity.test_remote_vae_families import _vae
from tests.support.gateways import RunningGateway
from tests.support.redirecting import redirected_post
from tests.support.remote_clients import answers_of
from tests.support.tiny_families import write_family_catalog
from tests.support.up import Up, latentq_up

pytestmark = pytest.mark.timeout(300)

NAMES = ("sd", "sdxl", "flux", "wan", "playground")
FACTORS = {"sd": (0.18215, None), "sdxl": (0.13025, None), "flux": (0.3611, 0.1159)}
#: Colour modes that a PNG of the client's can have.
MODES = ("RGB", "RGBA", "L", "P", "1")


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(4).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tensor(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(6)) * 2 - 1


IMAGES: dict[str, torch.Tensor] = {
    "batch": tensor(2, 3, 48, 64),
    "half": tensor(1, 3, 48, 64).half(),
    "brain": tensor(1, 3, 48, 64).bfloat16(),
    "clip": tensor(1, 3, 5, 48, 64),
    "double": tensor(1, 3, 48, 64).double(),
    "odd": tensor(1, 3, 48, 60),
    "last": tensor(1, 48, 64, 3),
    "nan": torch.full((1, 3, 48, 64), torch.nan),
}


def case(name: str, vae: str, image: str, *, query: str = "", **arguments: Any) -> dict[str, Any]:
    return {"name": name, "url": f"/encode/{vae}{query}", "image": image, "arguments": arguments}


def factors(vae: str) -> dict[str, Any]:
    scaling, shift = FACTORS[vae]
    return {"scaling_factor": scaling} | ({} if shift is None else {"shift_factor": shift})


CASES = [
    *(
        item
        for vae in FACTORS
        for item in (
            case(f"{vae} picture", vae, "RGB.png"),
            case(f"{vae} picture scaled", vae, "RGB.png", **factors(vae)),
            case(f"{vae} tensor", vae, "batch.pt"),
            case(f"{vae} tensor scaled", vae, "batch.pt", **factors(vae)),
            case(f"{vae} sample", vae, "batch.pt", query="?seed=7"),
            case(f"{vae} own factors", vae, "batch.pt", query="?state=scaled"),
        )
    ),
    *(case(f"mode {mode}", "sd", f"{mode}.png") for mode in MODES),
    case("half", "sd", "half.pt"),
    case("brain", "sd", "brain.pt"),
    case("flux scaling alone", "flux", "batch.pt", scaling_factor=0.3611),
    case("flux shift alone", "flux", "batch.pt", shift_factor=0.1159),
    case("flux packed", "flux", "batch.pt", query="?layout=packed&state=scaled"),
    case("clip", "wan", "clip.pt"),
    case("picture as a clip", "wan", "RGB.png"),
    case("statistics left out", "playground", "batch.pt"),
    case("factor of statistics", "wan", "clip.pt", scaling_factor=0.5),
    case("double", "sd", "double.pt"),
    case("odd", "sd", "odd.pt"),
    case("odd picture", "sd", "odd.png"),
    case("last", "sd", "last.pt"),
    case("nan", "sd", "nan.pt"),
    case("deep", "sd", "deep.png"),
    case("nothing", "nothing", "RGB.png"),
    case("option of a decode", "sd", "RGB.png", query="?output=png"),
]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family_catalog(tmp_path_factory.mktemp("families"), NAMES)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, catalog: Path) -> Iterator[Up]:
    with latentq_up(tmp_path_factory.mktemp("up"), vaes=NAMES, LATENTQ_CATALOG=str(catalog)) as running:
        yield running


@pytest.fixture(scope="module")
def answers(up: Up, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client's process got, by case."""
    folder = tmp_path_factory.mktemp("client")
    for mode in MODES:
        picture(mode).save(folder / f"{mode}.png")
    picture().crop((0, 0, 60, 48)).save(folder / "odd.png")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(folder / "deep.png")
    for name, image in IMAGES.items():
        torch.save(image, folder / f"{name}.pt")
    asked = [{**item, "url": up.url + item["url"], "image": str(folder / item["image"])} for item in CASES]
    return answers_of(remote_encode_client, asked, folder=folder, environment=up.environment)


@pytest.fixture(scope="module")
def local(catalog: Path) -> Callable[..., torch.Tensor]:
    """What the VAE makes of an image in this process."""
    vaes = {name: _vae(catalog.parent / name) for name in NAMES}

    def encode(name: str, image: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                posterior = vaes[name].encode(image.float()).latent_dist
            made = posterior.mode() if seed is None else posterior.sample(torch.Generator().manual_seed(seed))
        finally:
            torch.set_num_threads(threads)
        assert isinstance(made, torch.Tensor)
        return made

    return encode


def preprocessed(image: Image.Image) -> torch.Tensor:
    made: torch.Tensor = VaeImageProcessor().preprocess(image)
    return made


def scaled(latents: torch.Tensor, vae: str) -> torch.Tensor:
    """As `_encode_vae_image` of the pipelines (pipeline_flux_img2img.py, pipeline_stable_diffusion_inpaint.py)."""
    scaling, shift = FACTORS[vae]
    return scaling * latents if shift is None else (latents - shift) * scaling


@pytest.mark.parametrize("vae", FACTORS)
def test_latents_are_those_of_a_local_encode(answers: dict[str, Any], local: Any, vae: str) -> None:
    of_picture, of_tensor = local(vae, preprocessed(picture())), local(vae, IMAGES["batch"])
    assert of_picture.shape == (1, {"flux": 16}.get(vae, 4), 6, 8)
    equal(answers[f"{vae} picture"], of_picture)
    equal(answers[f"{vae} tensor"], of_tensor)
    equal(answers[f"{vae} picture scaled"], scaled(of_picture, vae))
    equal(answers[f"{vae} tensor scaled"], scaled(of_tensor, vae))
    equal(answers[f"{vae} own factors"], scaled(of_tensor, vae))
    equal(answers[f"{vae} sample"], local(vae, IMAGES["batch"], seed=7))
    assert not torch.equal(answers[f"{vae} sample"], of_tensor)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_of_every_mode(answers: dict[str, Any], local: Any, mode: str) -> None:
    equal(answers[f"mode {mode}"], local("sd", preprocessed(picture(mode).convert("RGB"))))


def test_tensors_of_sixteen_bits(answers: dict[str, Any], local: Any) -> None:
    equal(answers["half"], local("sd", IMAGES["half"]))
    equal(answers["brain"], local("sd", IMAGES["brain"]))


def test_a_factor_alone_is_applied_alone(answers: dict[str, Any], local: Any) -> None:
    latents = local("flux", IMAGES["batch"])
    equal(answers["flux scaling alone"], latents * 0.3611)
    equal(answers["flux shift alone"], latents - 0.1159)


def test_the_layout_can_be_asked_for(answers: dict[str, Any], local: Any) -> None:
    from diffusers import FluxImg2ImgPipeline

    pack: Any = FluxImg2ImgPipeline._pack_latents
    equal(answers["flux packed"], pack(scaled(local("flux", IMAGES["batch"]), "flux"), 2, 16, 6, 8))


def test_clips_and_statistics(answers: dict[str, Any], local: Any) -> None:
    equal(answers["clip"], local("wan", IMAGES["clip"]))
    equal(answers["picture as a clip"], local("wan", preprocessed(picture()).unsqueeze(2)))
    equal(answers["statistics left out"], local("playground", IMAGES["batch"]))


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("factor of statistics", "invalid_option", "leave the factors out"),
        ("double", "latents_dtype", "convert them first"),
        ("odd", "latents_size", "multiples of 8: resize"),
        ("odd picture", "latents_size", "multiples of 8: resize"),
        ("last", "latents_rank", "floats have them first"),
        ("nan", "latents_not_finite", "9216 of 9216"),
        ("deep", "latents_dtype", "convert it to 8 bits"),
        ("nothing", "unknown_vae", "nothing"),
        ("option of a decode", "invalid_option", "output is not an option of an encode"),
    ],
)
def test_a_refusal_reaches_the_user_as_a_dictionary(answers: dict[str, Any], name: str, code: str, words: str) -> None:
    assert answers[name].startswith("RuntimeError: {")
    assert f"'code': '{code}'" in answers[name]
    assert words in answers[name]


def encoded_as(kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, format=kind, **how)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats_are_told_by_their_first_bytes(up: Up, local: Any, kind: str) -> None:
    data = encoded_as(kind)
    answer = requests.post(f"{up.url}/encode/sd", data=data, headers={"Content-Type": "text/plain"}, timeout=60)
    assert answer.status_code == 200, answer.text
    found = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(
        json.loads(answer.headers["shape"])
    )
    equal(found, local("sd", preprocessed(Image.open(io.BytesIO(data)))))


def test_decoding_without_factors_applies_nothing(up: Up, catalog: Path) -> None:
    for name, latents in {"playground": tensor(1, 4, 6, 8), "wan": tensor(1, 16, 2, 6, 8)}.items():
        params: dict[str, Any] = {"shape": list(latents.shape), "dtype": "float32", "output_type": "pt"}
        answer = requests.post(
            f"{up.url}/decode/{name}",
            params=params,
            data=latents.numpy().tobytes(),
            headers={"Content-Type": "tensor/binary"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        found = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(
            json.loads(answer.headers["shape"])
        )
        with torch.no_grad():
            equal(found, _vae(catalog.parent / name).decode(latents, return_dict=False)[0])


# An encode that takes longer than an answer may -----------------------------------------------------------------


def test_past_the_bound_the_client_is_sent_on_and_follows(up: Up, local: Any, catalog: Path, tmp_path: Path) -> None:
    answer, job = redirected_post(up, "/encode/sd", catalog=catalog, folder=tmp_path, data=encoded_as("PNG"))
    assert job.kind is Kind.ENCODE
    found = torch.frombuffer(bytearray(answer.content), dtype=torch.float32).reshape(1, 4, 6, 8)
    equal(found, local("sd", preprocessed(picture())))


# What is refused ------------------------------------------------------------------------------------------------


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, and which has hardly any data (PNG specification, 5.3 and 11.2)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def of_many_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again, so many in all."""
    data = encoded_as("JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - data.count(b"\xff\xda")) + data[-2:]


def animated() -> bytes:
    return encoded_as("WEBP", save_all=True, append_images=[picture("L").convert("RGB")])


@pytest.mark.parametrize(
    ("body", "query", "expected"),
    [
        (b"GIF89a and more than sixteen bytes", "", (415, "media_type_unsupported")),
        (b"short", "", (415, "media_type_unsupported")),
        (b"", "", (400, "bad_request")),
        (encoded_as("PNG")[:-100], "", (400, "bad_request")),
        (encoded_as("JPEG")[:20], "", (400, "bad_request")),
        (encoded_as("WEBP")[:40], "", (400, "bad_request")),
        (encoded_as("PNG")[:16] + b"nonsense" * 8, "", (400, "bad_request")),
        (png_of_size(64, 48), "", (400, "bad_request")),
        (png_of_size(8008, 8008), "", (422, "pixel_limit_exceeded")),
        (png_of_size(40_000, 40_000), "", (422, "pixel_limit_exceeded")),
        (animated(), "", (422, "invalid_option")),
        (bytes(16), "?shape=1&shape=3&shape=8&shape=8&dtype=float16", (422, "tensor_file_truncated")),
        (bytes(400), "?shape=1&shape=3&shape=8&shape=8&dtype=float16", (422, "tensor_file_oversized")),
        (bytes(192), "?shape=1&shape=3&shape=8&shape=8&dtype=uint8", (422, "latents_dtype")),
        (bytes(16), "?shape=1&shape=3&shape=8&shape=8", (422, "invalid_option")),
        (bytes(16), "?dtype=float32", (422, "invalid_option")),
        (bytes(16), "?dtype=float32&dtype=float16&shape=4", (422, "invalid_option")),
        (encoded_as("PNG"), "?scaling_factor=much", (422, "invalid_option")),
        (encoded_as("PNG"), "?scaling_factor=0", (422, "invalid_option")),
        (encoded_as("PNG"), "?shift_factor=nan", (422, "invalid_option")),
        (encoded_as("PNG"), "?seed=one", (422, "invalid_option")),
        (encoded_as("PNG"), "?layout=video_2d", (422, "unknown_layout")),
        (of_many_scans(101), "", (422, "invalid_option")),
    ],
    ids=range(23),
)
def test_what_cannot_be_encoded_is_refused_and_leaves_nothing(
    gateway: RunningGateway, admin: Any, body: bytes, query: str, expected: tuple[int, str]
) -> None:
    before = set(admin.scan_iter("*"))
    answer = requests.post(f"{gateway.url}/encode/sd{query}", data=body, timeout=30)
    assert problem(answer) == expected
    assert set(admin.scan_iter("*")) - before == set()
    assert (gateway.parts.uploads.count, gateway.parts.uploads.size_bytes) == (0, 0)


def test_a_picture_counts_by_its_pixels_while_it_is_unpacked(gateways: Callable[..., RunningGateway]) -> None:
    running = gateways(max_uploads_bytes=20_000)
    with running.parts.uploads.admitted(LOCAL, 15_000):
        answer = requests.post(f"{running.url}/encode/sd", data=encoded_as("WEBP", quality=1), timeout=30)
    assert problem(answer) == (503, "gateway_busy")
    assert running.parts.uploads.size_bytes == 0


@pytest.mark.parametrize(("kind", "bytes_per_px"), [("PNG", 8), ("JPEG", 12), ("WEBP", 18)])
def test_a_picture_has_room_for_what_its_decoder_takes(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, kind: str, bytes_per_px: int
) -> None:
    held: list[int] = []

    def read(data: bytes, *, kind: str) -> TensorFile:
        held.append(gateway.parts.uploads.size_bytes)
        raise BadRequest("that is enough")

    monkeypatch.setattr(remote_encode, "read_picture", read)
    data = encoded_as(kind)
    assert problem(requests.post(f"{gateway.url}/encode/sd", data=data, timeout=30)) == (400, "bad_request")
    assert held == [len(data) + 48 * 64 * bytes_per_px]


# What is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in (*MODES, "LA")),
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_a_picture_is_what_pillow_makes_of_it(kind: str, mode: str) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (300, 200, 3), dtype=np.uint8)  # no whole number of strips
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format=kind)
    found = read_picture(buffer.getvalue(), kind=kind)
    assert found.shape == (1, 300, 200, 3)
    assert found.data.endswith(Image.open(buffer).convert("RGB").tobytes())  # behind its header


def test_a_picture_is_copied_once() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2000)).save(buffer, format="PNG")
    data = buffer.getvalue()
    tracemalloc.start()  # numpy's memory and that of bytes, not Pillow's own
    try:
        read_picture(data, kind="PNG")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 3 <= peak / 2000**2 < 4


@pytest.mark.parametrize("at", [0, 1, (1 << 20) - 2, (1 << 20) - 1, 1 << 20])
def test_scans_are_counted_wherever_they_begin(at: int) -> None:
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    data = bytes(at) + scan + bytes(1 << 20) + scan * 99
    _check_scans(data)
    with pytest.raises(InvalidOption, match="more than 100 scans") as refusal:
        _check_scans(data + scan)
    assert refusal.value.field == "pictures"


def test_what_lies_in_the_metadata_of_a_jpeg_and_behind_its_end_is_no_scan_of_it() -> None:
    """A thumbnail; the clip of a phone's "motion photo", in 8 MB of which such bytes occur a hundred times."""
    picture_itself = encoded_as("JPEG")
    within = b"\xff\xe1" + (2 + 2 * 200 + 2).to_bytes(2) + b"\xff\xda" * 200 + b"\xff\xd9"
    data = picture_itself[:2] + within + picture_itself[2:] + b"\xff\xda" * 200
    _check_scans(data)
    assert peek_picture(data, kind="JPEG").shape == (1, 48, 64, 3)


def test_a_jpeg_of_a_hundred_scans_is_read() -> None:
    data = of_many_scans(100)
    assert peek_picture(data, kind="JPEG").shape == read_picture(data, kind="JPEG").shape == (1, 48, 64, 3)
