"""The option `preview`: which small VAE shows a job's latents first, and its picture."""

from __future__ import annotations

from typing import Final

from broker_config.errors import InvalidOption
from broker_config.latent_geometry import LatentLayout, LatentState
from broker_config.vae_catalog import VaeCatalog, VaeEntry

#: Latents as the pipeline has them, which is what the small VAEs take.
_STATES: Final = frozenset({LatentState.SCALED, LatentState.RECIPROCAL})


def preview_of(
    wanted: object, entry: VaeEntry, *, layout: LatentLayout, state: LatentState, catalog: VaeCatalog
) -> str | None:
    """Name of the VAE that makes the preview; None: none was asked for.

    Raises:
        InvalidOption: there is none for these latents.
    """
    if not isinstance(wanted, bool):
        raise InvalidOption(f"preview is {wanted!r}, expected True or False", field="preview")
    if not wanted:
        return None
    if entry.preview is None or entry.preview not in catalog:
        able = sorted(name for name, other in catalog.items() if other.preview is not None)
        raise InvalidOption(
            f"preview is asked for, but {entry.name} has no small VAE; {', '.join(able)} have: leave it out",
            field="preview",
        )
    if state not in _STATES or layout not in catalog[entry.preview].layouts:
        raise InvalidOption(
            f"preview is asked for, but {entry.preview} takes no latents that are {state} and {layout}: leave it out",
            field="preview",
        )
    return entry.preview
