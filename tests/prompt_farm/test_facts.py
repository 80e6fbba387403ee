"""What is read off a pipeline before the first prompt: of every family's pipelines, loaded without their VAE."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from broker_config.errors import ConfigurationError, InvalidOption, InvalidRow
from broker_config.settings import load_settings
from broker_config.vae_catalog import VaeCatalog
from producer import DecodeClient
from producer.prompt_farm import Farm
from producer.prompt_farm.denoiser import Denoiser, identity_of, load_pipeline
from producer.prompt_farm.facts import check_output, check_tasks, facts_of
from producer.prompt_farm.plan import Recipe, plan
from producer.prompt_farm.rows import rows_of
from producer.queued_vae import QueuedVAE
from tests.conftest import need_tool
from tests.parity.families import CASES
from tests.parity.whole_pipelines import build
from tests.support.thread_worker import ThreadWorker
from tests.support.tiny_families import catalogue
from tests.support.tiny_families import ltx as tiny_ltx
from tests.support.tiny_pipelines import save_tiny_pipeline, text_to_video, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, as it makes its pipelines

CATALOG = VaeCatalog.load()
#: Case → what it is refused for: they make pictures of something else than text.
_NOT_OF_TEXT: Final[Mapping[str, str]] = {
    "svd": "takes no prompt",
    "wan-animate": "needs image, pose_video, face_video",
    "chronoedit": "needs image",
    "chronoedit that reasons": "needs image",
    "lucy-edit": "needs video",
    "sana-wm": "needs image",
    "hunyuanvideo, in sections": "needs image",
    "consisid": "needs image",
}
#: Cases that only the VAE itself, or the size of the model, tells apart from another one.
_UNTOLD: Final = ("playground", "cogvideox-2b", "sd-asymmetric")
#: Classes that ask their VAE for its config when they are made.
_NEED_A_VAE: Final = ("bria", "cosmos25", "cosmos3", "hunyuanvideo15", "allegro")


_TELLING: Final = [
    name
    for name, case in CASES.items()
    if "vae" not in case.given and name not in (*_NOT_OF_TEXT, *_UNTOLD, *_NEED_A_VAE)
]


@pytest.mark.parametrize("name", _TELLING)
def test_a_pipeline_without_its_vae_tells_who_decodes(name: str) -> None:
    facts = facts_of(build(CASES[name], None), vae=None, catalog=CATALOG)
    assert facts.vae == CASES[name].vae
    assert facts.layout in CATALOG[facts.vae].layouts


def test_a_high_dynamic_range_is_written_as_tensors_only() -> None:
    facts = facts_of(build(CASES["ltx2-hdr"], None), vae=None, catalog=CATALOG)
    assert check_output(None, facts) == "tensor"
    with pytest.raises(InvalidOption, match="choose tensor") as refusal:
        check_output("mp4", facts)
    assert refusal.value.field == "format"


@pytest.mark.parametrize("name", _NOT_OF_TEXT)
def test_a_pipeline_that_needs_more_than_a_prompt_is_refused(name: str) -> None:
    with pytest.raises(InvalidOption, match=_NOT_OF_TEXT[name]):
        facts_of(build(CASES[name], None), vae=None, catalog=CATALOG)


@pytest.mark.parametrize("vae", [None, "ltx"])
def test_a_vae_in_the_pipelines_folder_that_mixes_noise_in_is_refused(tmp_path: Path, vae: str | None) -> None:
    pipeline = build(CASES["ltx"], None)
    tiny_ltx(catalogue()["ltx"]).save_pretrained(tmp_path / "vae")
    assert Denoiser(pipeline, catalog=CATALOG, folder=tmp_path, vae=vae).facts.vae == "ltx"
    tiny_ltx(catalogue()["ltx"], timestep_conditioning=True).save_pretrained(tmp_path / "vae")
    with pytest.raises(InvalidOption, match="VAE ltx of this LTXPipeline draws noise as it decodes") as refusal:
        Denoiser(pipeline, catalog=CATALOG, folder=tmp_path, vae=vae)
    assert refusal.value.field == "vae"


def test_a_vae_that_starts_from_noise_is_refused() -> None:
    with pytest.raises(InvalidOption, match="VAE consistency-decoder of this StableDiffusionPipeline draws noise"):
        Denoiser(tiny_pipeline(channels=4), catalog=CATALOG, vae="consistency-decoder")


def test_a_size_that_packed_latents_do_not_tell_must_be_given() -> None:
    facts = facts_of(build(CASES["cogvideox-5b, padded in front"], None), vae=None, catalog=CATALOG)
    assert facts.tells == ("num_frames",)
    recipe = Recipe(pipeline="p", vae=facts.vae, output="mp4")
    tasks = plan(rows_of([{"prompt": "a", "num_frames": 9}, "b"]), recipe)
    with pytest.raises(InvalidRow, match="line 2: num_frames is missing"):
        check_tasks(tasks, facts, catalog=CATALOG, settings=load_settings(_env_file=None))
    check_tasks(tasks[:1], facts, catalog=CATALOG, settings=load_settings(_env_file=None))


def test_the_vae_in_a_pipelines_folder_is_compared_with_the_catalogues(tmp_path: Path) -> None:
    folder = save_tiny_pipeline(tmp_path / "pipeline", channels=4)
    pipeline = load_pipeline(folder, device="cpu", dtype=None, compiled=False)
    assert "vae_config" not in _asked(Denoiser(pipeline, catalog=CATALOG, folder=folder))
    kind: Any = AutoencoderKL
    kind(block_out_channels=(4,), norm_num_groups=1, latent_channels=4).save_pretrained(folder / "vae")
    asked = _asked(Denoiser(pipeline, catalog=CATALOG, folder=folder))
    assert asked["vae_class"] == "AutoencoderKL"
    assert len(asked["vae_config"]) == 16
    assert "vae_config" not in _asked(Denoiser(pipeline, catalog=CATALOG, folder=folder, vae="sd"))


def test_a_pipeline_that_asks_its_vae_for_its_config_gets_a_stand_in(
    client: DecodeClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    init: Any = StableDiffusionPipeline.__init__

    @functools.wraps(init)
    def asks(self: Any, vae: Any, *parts: Any, **more: Any) -> None:
        assert vae.config.latent_channels == 16
        init(self, vae, *parts, **more)

    monkeypatch.setattr(StableDiffusionPipeline, "__init__", asks)
    with pytest.raises(ConfigurationError, match="'NoneType' object has no attribute 'config'"):
        load_pipeline(folder, device="cpu", dtype=None, compiled=False)
    pipeline = load_pipeline(
        folder, device="cpu", dtype=None, compiled=False, stand_in=lambda: QueuedVAE("demo", client=client)
    )
    tasks = plan(rows_of(["a fox"]), Recipe(pipeline="p", vae="demo", output="png", defaults={"steps": 1}))
    (latents,) = Denoiser(pipeline, catalog=CATALOG, vae="demo").latents_of(tasks)
    assert latents.shape == (1, 16, 8, 8)


def _asked(denoiser: Denoiser) -> dict[str, Any]:
    from producer.pipelines import options_of

    options = dict(denoiser.options)
    return options_of(options.pop("pipeline"), options, catalog=CATALOG)


def test_weights_that_differ_are_told_apart_and_a_copy_is_not(tmp_path: Path) -> None:
    one = save_tiny_pipeline(tmp_path / "one")
    same = save_tiny_pipeline(tmp_path / "same")
    (same / "README.md").write_text("a card")
    other = save_tiny_pipeline(tmp_path / "other", seed=1)
    assert identity_of(one) == identity_of(same)
    assert identity_of(one) != identity_of(other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own compiler
def test_compiled_or_not_the_latents_are_the_same(tmp_path: Path) -> None:
    need_tool("g++")
    folder = save_tiny_pipeline(tmp_path / "pipeline")
    recipe = Recipe(pipeline="p", vae="demo", output="png", defaults={"steps": 1})
    tasks = plan(rows_of(["a fox"]), recipe)
    made = [
        Denoiser(
            load_pipeline(folder, device="cpu", dtype=None, compiled=compiled), catalog=CATALOG, vae="demo"
        ).latents_of(tasks)[0]
        for compiled in (False, True)
    ]
    assert torch.allclose(made[0], made[1], atol=1e-4)


def test_prompts_become_clips(client: DecodeClient, settings: Any, tmp_path: Path) -> None:
    with ThreadWorker(settings, vaes=["sd"]):
        farm = Farm(
            text_to_video(),
            client,
            [{"prompt": "a fox", "num_frames": 3}],
            vae="sd",
            out=tmp_path,
            defaults={"steps": 1, "height": 32, "width": 48},
        )
        (result,) = farm
    assert result.error is None
    assert result.file is not None
    assert result.file.endswith(".mp4")
    assert (tmp_path / result.file).read_bytes()[4:8] == b"ftyp"


def test_packed_latents_come_with_the_size_they_do_not_tell(client: DecodeClient, settings: Any) -> None:
    case = CASES["taef1"]
    pipeline = build(case, None)
    call = {name: value() if callable(value) else value for name, value in case.call.items()}
    embeds, pooled = call["prompt_embeds"][:1], call["pooled_prompt_embeds"][:1]
    pipeline.encode_prompt = lambda **_: (embeds, pooled, torch.zeros(embeds.shape[1], 3))
    with ThreadWorker(settings, vaes=["flux"]):
        rows = [{"prompt": "a fox", "height": 48, "width": 64}, {"prompt": "a door", "height": 32, "width": 32}]
        results = {result.prompt: result for result in Farm(pipeline, client, rows, vae="flux", defaults={"steps": 1})}
    assert results["a fox"].image().size == (64, 48)
    assert results["a door"].image().size == (32, 32)
