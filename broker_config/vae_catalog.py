"""The catalogue: which VAEs there are, where their weights come from, and what latents they take.

Ours is `vae_catalog.toml`; a user's own file adds entries or replaces ours. Weights are named here and nowhere
else: a job names an entry, so whoever can write to the broker cannot make a worker load another repository.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from broker_config.errors import CatalogInvalid, InvalidOption, UnknownLayout, UnknownVae
from broker_config.latent_geometry import LAYOUTS, FrameRule, LatentLayout, LatentState

#: Names an error lists.
_NEAR_NAMES: Final = 5
#: Layouts whose VAE takes pictures, (batch, channels, h, w); the others' takes clips.
_OF_IMAGE_VAES: Final = frozenset(
    {
        LatentLayout.UNPACKED,
        LatentLayout.PACKED,
        LatentLayout.VIDEO_2D,
        LatentLayout.FRAMES_2D,
        LatentLayout.CHANNELS_LAST_IMAGE,
        LatentLayout.PATCHED,
        LatentLayout.PACKED_PATCHED,
        LatentLayout.PACKED_PATCHED_LAST,
    }
)
#: States of latents that have no normalisation on them.
_RAW: Final = frozenset({str(LatentState.DENORMALISED), str(LatentState.POSTERIOR)})
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


def _folder_or_repo(weights: str) -> str:
    if weights.startswith("~"):
        weights = str(Path(weights).expanduser())
    if not Path(weights).is_absolute() and not re.fullmatch(r"\w[\w.:-]*(/\w[\w.-]*)?", weights):
        raise ValueError("must be a Hugging Face repo (`owner/name`) or an absolute folder")
    return weights


class VaeEntry(BaseModel):
    """One VAE. Field meanings: the head of vae_catalog.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    weights: Annotated[str, AfterValidator(_folder_or_repo)]
    subfolder: str | None = None
    revision: str | None = None
    vae_class: str = Field(pattern=r"^[A-Za-z0-9]+$")
    dtype: str = Field(default="auto", pattern="^(auto|float32|float16|bfloat16)$")
    channels: int = Field(gt=0)
    spatial: int = Field(gt=0)
    temporal: int = Field(default=1, gt=0)
    layouts: tuple[LatentLayout, ...] = Field(min_length=1)
    state: LatentState | None = None
    frames: FrameRule = FrameRule.FIRST_ALONE
    patch_size: int = Field(default=2, gt=0, le=16)
    pixel_channels: int = Field(default=3, ge=3, le=4)
    pixels: str = Field(default="signed", pattern="^(signed|imagenet|cut|logc3)$")
    shifts: bool = True
    resizes: bool = False
    tiled: bool = False
    preview: str | None = None
    config_digest: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")
    fps: float = Field(default=16.0, gt=0, le=240)
    source: str = "the user's catalogue"

    @property
    def draws_noise(self) -> bool:
        """Whether it decodes from noise, whatever the job says (models/autoencoders/consistency_decoder_vae.py)."""
        return self.vae_class == "ConsistencyDecoderVAE"

    @property
    def is_hdr(self) -> bool:
        """Whether it decodes to linear light, which goes beyond white: only `tensor` holds that."""
        return self.pixels == "logc3"

    @property
    def raw_layout(self) -> LatentLayout:
        """How the VAE itself takes latents, whatever its pipelines do."""
        return LatentLayout.UNPACKED if set(self.layouts) <= _OF_IMAGE_VAES else LatentLayout.VIDEO

    def layout(self, wanted: str | None, *, rank: int | None = None, state: str | None = None) -> LatentLayout:
        """The layout named `wanted`; without a name, the one that fits latents of `rank` dimensions.

        `state`: latents that carry no normalisation may also be as the VAE itself takes them.

        Raises:
            UnknownLayout: not a layout of this VAE.
        """
        if state in _RAW and wanted == str(self.raw_layout):
            return self.raw_layout
        if wanted is None:
            fitting = [item for item in self.layouts if rank is None or LAYOUTS[item].rank == rank]
            return fitting[0] if fitting else self.layouts[0]
        if str(wanted) not in {str(item) for item in self.layouts}:
            raise UnknownLayout(
                f"layout {wanted!r} is not one of {self.name}'s: {', '.join(self.layouts)}", field="layout"
            )
        return LatentLayout(wanted)

    def state_of(self, layout: LatentLayout, wanted: str | None = None) -> LatentState:
        """The normalisation that latents of `layout` carry: the one named, else the entry's, else the layout's.

        Raises:
            InvalidOption: no such state.
        """
        if wanted is None:
            # An image VAE's frames are scaled as AnimateDiff does, whatever its pictures are.
            folded = layout in (LatentLayout.VIDEO_2D, LatentLayout.FRAMES_2D)
            return LAYOUTS[layout].state if folded or self.state is None else self.state
        if wanted not in set(LatentState):
            raise InvalidOption(f"state is {wanted!r}, expected one of {', '.join(LatentState)}", field="state")
        return LatentState(wanted)


class VaeCatalog(Mapping[str, VaeEntry]):
    """VAE entries by name."""

    def __init__(self, entries: Mapping[str, VaeEntry]) -> None:
        self._entries = dict(entries)

    @classmethod
    def load(cls, own_file: Path | None = None) -> Self:
        """Our catalogue, with the user's file on top.

        Raises:
            CatalogInvalid: the file cannot be read, or an entry is not usable; the message names entry and field.
        """
        text = (resources.files("broker_config") / "vae_catalog.toml").read_text(encoding="utf-8")
        entries = _parse(text, where="vae_catalog.toml")
        if own_file is not None:
            try:
                own = own_file.expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CatalogInvalid(f"the catalogue {own_file} cannot be read: {error}", field="catalog") from error
            entries |= _parse(own, where=str(own_file))
        return cls(entries)

    def __getitem__(self, name: str) -> VaeEntry:
        try:
            return self._entries[name]
        except (KeyError, TypeError):  # TypeError: a name that is no string, and cannot be hashed
            near = difflib.get_close_matches(str(name).lower(), self._entries, n=_NEAR_NAMES, cutoff=0.4)
            known = f"near it are {', '.join(near)}" if near else "no name is near it"
            raise UnknownVae(
                f"no VAE {name!r} in the catalogue; {known}. `latentq vaes` lists all {len(self)}; add your own with "
                "LATENTQ_CATALOG",
                field="vae",
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _parse(text: str, *, where: str) -> dict[str, VaeEntry]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CatalogInvalid(f"the catalogue {where} is not TOML: {error}", field="catalog") from error
    entries = {}
    for name, table in tables.items():
        if not _NAME.fullmatch(name) or not isinstance(table, dict):
            raise CatalogInvalid(
                f"{where}: [{name}] is not an entry; names are lower-case letters, digits, - and _",
                field=name,
            )
        try:
            entries[name] = VaeEntry(name=name, **table)
        except (ValidationError, TypeError) as error:
            raise CatalogInvalid(f"{where}: entry [{name}]: {_first_problem(error)}", field=name) from error
    return entries


def _first_problem(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return "`name` is the heading of the table; do not give it again"
    item = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
