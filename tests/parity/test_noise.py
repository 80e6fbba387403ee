"""VAEs that draw noise as they decode: LTX-Video's from 0.9.1 on, and the consistency decoder of Stable Diffusion.

A pipeline's generator has drawn the latents' first noise when it comes to the decode. So the generator goes along with
the latents, as the call for latents left it, and the worker draws what the pipeline would have drawn next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from broker_config.errors import InvalidOption
from broker_config.vae_catalog import VaeCatalog
from producer.pipelines import options_of
from tests.parity.families import CASES, OTHERS, Reference, reference
from tests.parity.our_way import our_way
from tests.parity.tail_cases import Tail
from tests.parity.whole_pipelines import Whole, diffusers_class, keeping_generators
from tests.support.serving import Serving, serving
from tests.support.tiny_families import catalogue, make, write_family_catalog
from tests.support.tiny_families import ltx as tiny_ltx

pytestmark = [
    pytest.mark.usefixtures("pipelines_importable"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # schedulers, with numpy 2
]


@pytest.fixture(scope="module")
def ltx(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loaded from files, as a worker's is: where weights lie in memory decides the last bits of a clip by itself."""
    folder = tmp_path_factory.mktemp("ltx")
    torch.manual_seed(3)
    tiny_ltx(catalogue()["ltx"], timestep_conditioning=True).save_pretrained(folder)
    return diffusers_class("AutoencoderKLLTXVideo").from_pretrained(folder, low_cpu_mem_usage=False)


@pytest.fixture(scope="module")
def served(ltx: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    names = ("ltx", "consistency-decoder")
    catalog = write_family_catalog(tmp_path_factory.mktemp("noise"), names)
    ltx.save_pretrained(catalog.parent / "ltx")
    with serving(tmp_path_factory.mktemp("noise-broker"), catalog=catalog, vaes=names) as started:
        yield started


def assert_a_worker_makes_the_same(served: Serving, expected: Reference, **given: Any) -> None:
    given = {"pipeline": expected.pipeline, **given}
    made = served.decode(expected.latents, output="tensor", **given).tensor()
    assert torch.equal(made, expected.decoded)
    pixels = served.decode(expected.latents, output="uint8", **given).array()
    assert np.array_equal(pixels, expected.pixels)
    other = {name: value for name, value in given.items() if name != "generator"} | {"seed": 78}
    made = served.decode(expected.latents, output="tensor", **other).tensor()
    assert not torch.allclose(made, expected.decoded, atol=1e-4), "the noise is in the pictures"


def with_noise(case: Whole, **facts: float | None) -> Whole:
    return replace(case, call={**case.call, **facts})


@pytest.mark.parametrize("scale", [{}, {"decode_noise_scale": 0.025}])
@pytest.mark.parametrize("name", ["ltx", "ltx, unpacked"])
def test_ltx_mixes_in_what_the_pipelines_generator_draws_next(
    name: str, scale: dict[str, float], ltx: Any, served: Serving
) -> None:
    facts = {"decode_timestep": 0.05, **scale}
    case, generators = keeping_generators(with_noise(CASES[name], **facts))
    expected = reference(case, ltx)
    assert_a_worker_makes_the_same(served, expected, generator=generators[0], **facts, **case.given)


def test_ltx_of_several_prompts_draws_for_its_repeated_frame_as_well(ltx: Any, served: Serving) -> None:
    facts = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    case, generators = keeping_generators(with_noise(OTHERS["LTXI2VLongMultiPrompt"], **facts))
    expected = reference(case, ltx)
    assert_a_worker_makes_the_same(served, expected, generator=generators[0], **facts, **case.given)


def test_ltx_of_several_prompts_mixes_in_nothing_unless_told(ltx: Any, served: Serving) -> None:
    facts = {"decode_timestep": 0.05, "decode_noise_scale": None}
    case = with_noise(OTHERS["LTXI2VLongMultiPrompt"], **facts)
    expected = reference(case, ltx)
    given = {"pipeline": expected.pipeline, "decode_timestep": 0.05, **case.given}
    made = served.decode(expected.latents, output="tensor", **given).tensor()
    assert torch.equal(made, expected.decoded)


def test_a_seed_stands_for_a_generator_that_has_drawn_nothing(ltx: Any, served: Serving) -> None:
    noise = torch.randn((2, 96, 128), generator=torch.Generator().manual_seed(5))
    case = with_noise(CASES["ltx"], decode_timestep=0.05)
    expected = reference(replace(case, call={**case.call, "latents": noise}), ltx)
    assert_a_worker_makes_the_same(served, expected, seed=13, decode_timestep=0.05, **case.given)


def test_the_consistency_decoder_starts_from_what_the_pipelines_generator_draws_next(served: Serving) -> None:
    case, generators = keeping_generators(replace(CASES["sd-asymmetric"], vae="consistency-decoder"))
    expected = reference(case, make("consistency-decoder", catalogue()["consistency-decoder"]))
    assert_a_worker_makes_the_same(served, expected, generator=generators[0])


def test_latents_are_not_decoded_without_the_timestep(ltx: Any) -> None:
    with pytest.raises(InvalidOption, match="decode_timestep is missing") as refusal:
        our_way("LTXConditionPipeline", ltx, torch.zeros(2, 128, 2, 6, 8), Tail(shape=()))
    assert refusal.value.field == "decode_timestep"


def test_nor_without_where_noise_starts(ltx: Any) -> None:
    given = {"decode_timestep": 0.05}
    with pytest.raises(InvalidOption, match="seed is missing") as refusal:
        our_way("LTXConditionPipeline", ltx, torch.zeros(2, 128, 2, 6, 8), Tail(shape=(), given=given))
    assert refusal.value.field == "seed"


def test_nor_by_a_state_that_is_none(ltx: Any) -> None:
    given = {"decode_timestep": 0.05, "noise_state": "A" * 3500}
    with pytest.raises(InvalidOption, match="noise_state") as refusal:
        our_way("LTXConditionPipeline", ltx, torch.zeros(2, 128, 2, 6, 8), Tail(shape=(), given=given))
    assert refusal.value.field == "noise_state"


LATENTS = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "seed"),
        ({"seed": 1, "generator": torch.Generator()}, "noise_state"),
        ({"generator": 5}, "generator"),
        ({"noise_state": "short"}, "noise_state"),
    ],
)
def test_what_is_wrong_with_noise_is_refused_at_the_door(options: dict[str, Any], field: str, served: Serving) -> None:
    with pytest.raises(InvalidOption) as refusal:
        served.client.submit(LATENTS, vae="consistency-decoder", **options)
    assert refusal.value.field == field


def test_a_generator_is_refused_where_no_noise_is_drawn(served: Serving) -> None:
    with pytest.raises(InvalidOption, match="decode_timestep") as refusal:
        served.client.submit(torch.zeros(1, 128, 2, 6, 8), vae="ltx", layout="video", generator=torch.Generator())
    assert refusal.value.field == "noise_state"


def test_a_decoder_that_is_given_the_picture_and_its_mask_is_refused() -> None:
    vae = make("sd-asymmetric", catalogue()["sd-asymmetric"])
    pipeline = type("StableDiffusionInpaintPipeline", (SimpleNamespace,), {})(vae=vae)
    with pytest.raises(InvalidOption, match="picture and mask") as refusal:
        options_of(pipeline, {}, catalog=VaeCatalog.load())
    assert refusal.value.field == "pipeline"
