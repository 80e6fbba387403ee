"""What a run must know of its pipeline before the first prompt: what it takes, what it hands out, who decodes that.

Read off the pipeline object and its class's call; nothing of torch or diffusers is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from broker_config.errors import InvalidOption, InvalidRow
from broker_config.latent_geometry import LAYOUTS, FrameRule, Geometry, LatentLayout
from broker_config.messages import Output
from broker_config.settings import Settings
from broker_config.vae_catalog import VaeCatalog, VaeEntry
from producer.option_checks import check_pixels, checked_metadata
from producer.pipeline_table import EXCEPTED, PIPELINES
from producer.pipelines import config_of, options_of
from producer.prompt_farm.plan import Task

#: Field of a row → argument of a diffusers pipeline.
ARGUMENTS: Final[Mapping[str, str]] = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "height": "height",
    "width": "width",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "num_frames": "num_frames",
}
#: Parts of a pipeline that denoise.
DENOISERS: Final = ("transformer", "unet")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFacts:
    """A pipeline, as far as a run must know it. Small enough to travel between processes."""

    #: Class in diffusers.
    name: str
    #: Catalogue entry that decodes its latents.
    vae: str
    layout: str
    #: Fields of a row that its call takes.
    takes: tuple[str, ...]
    #: What it makes where a row does not say; None: not known.
    height: int | None
    width: int | None
    num_frames: int | None
    #: Sizes that its latents do not tell.
    tells: tuple[str, ...] = ()
    #: Whether it makes light beyond white, which only a tensor holds.
    is_hdr: bool = False

    @property
    def is_video(self) -> bool:
        """Whether it makes clips."""
        return LAYOUTS[LatentLayout(self.layout)].is_video

    def to_wire(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PipelineFacts:
        """What `to_wire` made."""
        return cls(**{**wire, "takes": tuple(wire["takes"]), "tells": tuple(wire["tells"])})


def facts_of(pipeline: Any, *, vae: str | None, catalog: VaeCatalog, described: Any = None) -> PipelineFacts:
    """Facts of a pipeline.

    Args:
        pipeline: a diffusers pipeline, with or without its VAE.
        vae: catalogue entry to decode with; None: what the table of pipelines says.
        catalog: where it is looked up.
        described: stands in for the pipeline where its parts are looked at; None: itself.

    Raises:
        InvalidOption: it hands no latents out, takes no prompt, or its latents are not for this VAE.
        UnknownPipeline, UnknownVae: nothing says how its latents are decoded.
    """
    name = type(pipeline).__name__
    arguments = inspect.signature(type(pipeline).__call__).parameters
    if "output_type" not in arguments:
        raise InvalidOption(f"{name} cannot hand out latents: its call has no output_type", field="pipeline")
    if "prompt" not in arguments:
        raise InvalidOption(f"{name} takes no prompt: it does not make pictures of text", field="pipeline")
    needed = [
        item.name
        for item in arguments.values()
        if item.default is item.empty
        and item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)
        and item.name not in ("self", "prompt")
    ]
    if needed:
        raise InvalidOption(f"{name} needs {', '.join(needed)} beside a prompt: rows have none", field="pipeline")
    given: dict[str, Any] = {} if vae is None else {"vae": vae}
    if "num_frames" in arguments:  # some readers ask for it; what it is changes neither VAE nor layout
        given["num_frames"] = arguments["num_frames"].default or 1
    if vae is None or name in PIPELINES or name in EXCEPTED:
        given = options_of(pipeline if described is None else described, given, catalog=catalog)
    entry = catalog[given["vae"]]
    layout = entry.layout(given.get("layout"))
    _check_channels(pipeline, entry, layout, name=name)

    def default(argument: str) -> int | None:
        value = arguments[argument].default if argument in arguments else None
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    side = _own_side(pipeline)
    return PipelineFacts(
        name=name,
        vae=entry.name,
        layout=str(layout),
        takes=tuple(field for field, argument in ARGUMENTS.items() if argument in arguments),
        height=default("height") or side,
        width=default("width") or side,
        num_frames=default("num_frames"),
        tells=_untold(entry, layout),
        is_hdr=entry.is_hdr,
    )


def check_noise(entry: VaeEntry, own: Any, *, name: str) -> None:
    """Whether latents alone decide what they are decoded to.

    Args:
        entry: what decodes them.
        own: the pipeline's VAE, or what has its class's name and its config; None: not known.
        name: the pipeline's class.

    Raises:
        InvalidOption: the VAE draws noise as it decodes.
    """
    is_own = type(own).__name__ == entry.vae_class
    if entry.draws_noise or (is_own and own.config.get("timestep_conditioning")):
        raise InvalidOption(
            f"VAE {entry.name} of this {name} draws noise as it decodes, from where the pipeline's generator stands by "
            "then, which the farm does not hand on: submit such latents with `generator`",
            field="vae",
        )


def check_output(output: str | None, facts: PipelineFacts) -> str:
    """The output of a run: the one asked for, else png or mp4, or tensor where these cannot hold it.

    Raises:
        InvalidOption: there is no such output, or not of such latents.
    """
    if output is None:
        return str(Output.TENSOR if facts.is_hdr else Output.MP4 if facts.is_video else Output.PNG)
    if output not in set(Output):
        raise InvalidOption(f"format is {output!r}, expected one of {', '.join(Output)}", field="format")
    if facts.is_hdr and output != Output.TENSOR:
        raise InvalidOption(
            f"format {output} ends at white, and {facts.name} makes light beyond it: choose tensor", field="format"
        )
    if output == Output.MP4 and not facts.is_video:
        raise InvalidOption(f"format mp4 needs clips, and {facts.name} makes pictures: choose png", field="format")
    return output


def check_tasks(tasks: Sequence[Task], facts: PipelineFacts, *, catalog: VaeCatalog, settings: Settings) -> None:
    """Whether the pipeline can do what the rows ask for.

    Raises:
        InvalidRow: a row asks for what the pipeline does not take, or for a size its VAE does not make.
        PixelLimitExceeded: a row asks for more than a job may have.
        InvalidOption: a prompt is longer than what a file's metadata may hold.
    """
    spatial = catalog[facts.vae].spatial
    for task in tasks:
        row = task.row
        for field in row.asked():
            if field not in ("seed", *facts.takes):
                raise InvalidRow(
                    f"line {row.line}: {facts.name} takes no {field} ({ARGUMENTS[field]}): leave it out",
                    field=field,
                    line=row.line,
                )
        for field in ("height", "width"):
            value = getattr(row, field)
            if value is not None and value % spatial:
                raise InvalidRow(
                    f"line {row.line}: {field} is {value}, expected a multiple of {spatial}: "
                    f"{value // spatial * spatial or spatial} or {(value // spatial + 1) * spatial}",
                    field=field,
                    line=row.line,
                )
        for field in facts.tells:
            if size_options(task, facts).get(field) is None:
                raise InvalidRow(
                    f"line {row.line}: {field} is missing, which latents of {facts.name} do not tell: give it in the "
                    "row or for all of them",
                    field=field,
                    line=row.line,
                )
        try:
            check_pixels(geometry_of(task, facts), settings)
            checked_metadata(metadata_of(task, facts), max_bytes=settings.max_metadata_bytes)
        except ValueError as error:
            at_fault = "prompt" if getattr(error, "field", None) == "metadata" else "height"
            raise InvalidRow(f"line {row.line}: {error}", field=at_fault, line=row.line) from None


def geometry_of(task: Task, facts: PipelineFacts) -> Geometry:
    """What a task's result will measure, as far as that is known."""
    return Geometry(
        batch=1,
        num_frames=(task.row.num_frames or facts.num_frames or 1) if facts.is_video else 1,
        height=task.row.height or facts.height or 1,
        width=task.row.width or facts.width or 1,
        is_video=facts.is_video,
    )


def metadata_of(task: Task, facts: PipelineFacts) -> dict[str, str]:
    """What is written into a task's file."""
    row = task.row
    said = {
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "seed": task.seed,
        "steps": row.steps,
        "guidance": row.guidance,
        "pipeline": facts.name,
    }
    return {name: str(value) for name, value in said.items() if value is not None}


def size_options(task: Task, facts: PipelineFacts) -> dict[str, int]:
    """Height, width and frames that the pipeline is called with; the job is told those that the latents do not tell."""
    sizes = {name: getattr(task.row, name) or getattr(facts, name) for name in ("height", "width", "num_frames")}
    return {name: value for name, value in sizes.items() if value is not None and name in facts.takes}


def _untold(entry: VaeEntry, layout: LatentLayout) -> tuple[str, ...]:
    """Sizes that cannot be read off the latents; others are not told, since pipelines round what they are asked for."""
    needs = set(LAYOUTS[layout].needs)
    if layout is LatentLayout.FRAMES_FIRST or entry.frames is FrameRule.EVEN:  # padded, or cut off
        needs.add("num_frames")
    if entry.resizes:
        needs |= {"height", "width"}
    return tuple(sorted(needs & {"height", "width", "num_frames"}))


def _own_side(pipeline: Any) -> int | None:
    """Side of the pictures a pipeline makes by itself, where it says so the way most do."""
    sample, scale = getattr(pipeline, "default_sample_size", None), getattr(pipeline, "vae_scale_factor", None)
    if sample is None:
        sample = config_of(pipeline, "unet").get("sample_size")
    return sample * scale if isinstance(sample, int) and isinstance(scale, int) else None


def _check_channels(pipeline: Any, entry: VaeEntry, layout: LatentLayout, *, name: str) -> None:
    """Whether what denoises has latents of as many channels as the VAE.

    A transformer may count patches of 2 × 2 latents as one with four times the channels, packed or not.
    """
    if layout not in (LatentLayout.UNPACKED, LatentLayout.PACKED, LatentLayout.VIDEO, LatentLayout.VIDEO_2D):
        return
    for part in DENOISERS:
        config = config_of(pipeline, part)
        found = {count for key in ("in_channels", "out_channels") if isinstance(count := config.get(key), int)}
        patches = (1,) if part == "unet" else (1, 4)
        if found and not found & {entry.channels * patch for patch in patches}:
            said = " or ".join(str(count) for count in sorted(found))
            raise InvalidOption(
                f"latents of this {name} have {said} channels, and VAE {entry.name} decodes {entry.channels}: name "
                "the matching entry with --vae, `latentq vaes` lists them",
                field="vae",
            )
