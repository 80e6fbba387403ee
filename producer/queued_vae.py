"""`QueuedVAE("flux")`: stands in for a pipeline's VAE, whose work the queue does.

>>> pipe = FluxPipeline.from_pretrained(repo, vae=QueuedVAE("flux"))
>>> pipe("a lighthouse").images[0]          # denoised here, decoded by a worker

DESIGN. The stand-in is an instance of the VAE's own class in diffusers, built from its config on torch's meta device:
so `config`, ratios, signatures and `isinstance` are the real ones, whatever a pipeline or node asks for, and there are
no weights. `decode` and `encode` are replaced by jobs; what a caller sees of them is what the class itself returns. A
decode is a job in state `denormalised`, since the pipeline has undone scaling and layout; an encode one in state
`posterior`: mean and log variance come back, and the caller's own generator draws. Statistics that a class keeps among
its weights (FLUX.2, LTX-Video) are read from the weights' file, and nothing else of it.

Each call waits for its job, so it is for code that cannot be changed; `submit` goes on at once. Not thread-safe in
what `.to()` changes. Imports torch and diffusers, but only once a stand-in is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from broker_config.errors import InvalidOption, WeightsMissing
from broker_config.latent_geometry import FrameRule, LatentLayout, LatentState
from broker_config.messages import Output
from broker_config.vae_catalog import VaeEntry
from producer.client import DecodeClient
from producer.job_handle import JobHandle

if TYPE_CHECKING:
    import torch

_OWN_WEIGHTS: Final = "latentq:demo"
_WEIGHTS_FILE: Final = "diffusion_pytorch_model.safetensors"
#: Arguments of a `decode` that change nothing about its result, unless the VAE draws noise.
_IDLE: Final = frozenset({"generator"})


def QueuedVAE(
    name: str,
    *,
    client: DecodeClient | None = None,
    config: Mapping[str, Any] | None = None,
    wait_s: float | None = None,
    **options: Any,
) -> Any:
    """A stand-in for the VAE `name` of the catalogue: decodes and encodes through the queue, on tensors.

    Args:
        name: catalogue entry.
        client: None: one configured by the environment. Of an `AsyncDecodeClient`, its `blocking`.
        config: of the VAE; None: the `config.json` beside the entry's weights, fetched from the hub if need be.
        wait_s: longest wait for one decode or encode, seconds; None: any.
        options: of every job: priority, mode, timeout_s, start_within_s, metadata …

    Returns:
        An instance of the entry's class in diffusers, without weights. Its `decode` and `encode` raise what `submit`,
        `JobHandle.wait` and `JobHandle.tensor` raise; a decode that failed left its latents in the queue, to be
        decoded again under the `job_id` of the error.

    Raises:
        UnknownVae: not in the catalogue.
        WeightsMissing: no config, or no statistics, where the catalogue says.
        InvalidOption: jobs of this entry end with what the pipeline does after the VAE.
    """
    import diffusers
    import torch

    client = client or DecodeClient.from_env()
    entry = client.catalog[name]
    if entry.is_hdr:
        raise InvalidOption(
            f"jobs of VAE {name} end in linear light, which the pipeline makes itself of what its VAE returns: "
            "name an entry of the same VAE whose jobs end with what it returns, as ltx2",
            field="vae",
        )
    if entry.pixels == "imagenet":
        raise InvalidOption(
            f"jobs of VAE {name} end in pictures, which the pipeline makes itself of what its VAE returns: submit its "
            "latents instead",
            field="vae",
        )
    base = getattr(diffusers, entry.vae_class)
    # Of the class's own name, which is in its config, and which some pipelines ask for.
    stand_in: Any = type(
        base.__name__, (QueuedCalls, base), {"__module__": base.__module__, "__doc__": QueuedVAE.__doc__}
    )
    with torch.device("meta"):
        made = stand_in.from_config(dict(config) if config is not None else _config_of(entry))
    _read_statistics(made, entry)
    made.queue = Queue(client, entry, options=options, wait_s=wait_s)
    return made.eval()


class Queue:
    """The jobs of one stand-in."""

    def __init__(self, client: DecodeClient, entry: VaeEntry, *, options: Mapping[str, Any], wait_s: float | None):
        self.client = client
        self.entry = entry
        self._options = dict(options)
        self._wait_s = wait_s

    def decode(
        self, latents: torch.Tensor, *, timestep: float | None, num_frames: int | None, generator: Any = None
    ) -> torch.Tensor:
        """What `vae.decode` makes of `latents`, on the CPU, in the worker's dtype."""
        facts: dict[str, Any] = {} if timestep is None else {"decode_timestep": timestep, "decode_noise_scale": 0.0}
        said = {"seed", "noise_state", "generator"} & set(self._options)  # of every job, by whoever made the stand-in
        if generator is not None and self.entry.draws_noise and not said:
            facts["generator"] = generator
        layout = self.entry.raw_layout
        if num_frames is not None:  # a clip's frames in the batch: Stable Video Diffusion
            count = latents.shape[0] // num_frames
            latents = latents.reshape(count, num_frames, *latents.shape[1:])
            layout, facts["frames_per_call"] = LatentLayout.FRAMES_2D, num_frames
        job = self.client.submit(
            latents,
            vae=self.entry.name,
            layout=str(layout),
            state=str(LatentState.DENORMALISED),
            output=str(Output.TENSOR),
            **facts,
            **self._options,
        )
        made = self._result(job)
        if layout is LatentLayout.FRAMES_2D:
            return made.transpose(1, 2).flatten(0, 1)  # B, 3, F, H, W → B·F, 3, H, W
        # Allegro's VAE has its frames first, its pipeline turns them, and so does a worker
        return made.transpose(1, 2) if self.entry.frames is FrameRule.EVEN else made

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and log variance of what `vae.encode` makes of `pixels`; of a VAE without a posterior its latents."""
        import torch

        innermost = has_channels_innermost(pixels)
        job = self.client.encode(
            pixels.movedim(1, -1) if innermost else pixels,
            vae=self.entry.name,
            layout=str(self.entry.raw_layout),
            state=str(LatentState.POSTERIOR),
            **self._options,
        )
        made = self._result(job)
        return made.to(memory_format=torch.channels_last) if innermost and made.ndim == 4 else made

    def _result(self, job: JobHandle) -> torch.Tensor:
        job.wait(self._wait_s)
        made = job.tensor()
        job.ack()  # nobody else asks for it, and twelve bytes a pixel would fill the broker
        return made


class QueuedCalls:
    """What a stand-in does otherwise than the class it is of."""

    queue: Queue

    def decode(self: Any, z: torch.Tensor, *arguments: Any, return_dict: bool = True, **named: Any) -> Any:
        """As the class's own `decode`, whichever of its arguments it takes."""
        import torch
        from diffusers.models.autoencoders.vae import DecoderOutput

        timestep, num_frames = named.pop("temb", None), named.pop("num_frames", None)
        for value in arguments:  # no two classes agree on their order, but their types tell them apart
            if isinstance(value, bool):
                return_dict = value
            elif isinstance(value, torch.Tensor):
                timestep = value
            elif isinstance(value, int):
                num_frames = value
        unknown = sorted(key for key, value in named.items() if value is not None and key not in _IDLE)
        if unknown:
            raise InvalidOption(f"{unknown[0]} of decode has no meaning to a queued VAE", field=unknown[0])
        made = self.queue.decode(z, timestep=_one(timestep), num_frames=num_frames, generator=named.get("generator"))
        sample = made.to(device=z.device, dtype=self.dtype)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self: Any, x: torch.Tensor, return_dict: bool = True) -> Any:
        """As the class's own `encode`; the posterior is drawn from where it is asked."""
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput, IdentityDistribution
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        made = self.queue.encode(x).to(device=x.device, dtype=self.dtype)
        if self.queue.entry.vae_class == "AutoencoderTiny":
            return AutoencoderTinyOutput(latents=made) if return_dict else (made,)
        if self.queue.entry.vae_class == "AutoencoderDC":
            return EncoderOutput(latent=made) if return_dict else (made,)
        drawn_from = (
            IdentityDistribution if made.shape[1] == self.queue.entry.channels else DiagonalGaussianDistribution
        )
        posterior = drawn_from(made)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode(self: Any, x: torch.Tensor) -> Any:
        """Mean and log variance, as the class's own `_encode`, which AnyFlow's pipelines call."""
        return self.queue.encode(x).to(device=x.device, dtype=self.dtype)

    @property
    def device(self) -> Any:
        """Where results go; parameters are nowhere."""
        import torch

        return vars(self).get("_results_device", torch.device("cpu"))

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """What `.to`, `.half` and `.cuda` come down to: parameters have a dtype, but stay on the meta device."""
        import torch

        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self._results_device = moved.device

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta:
                made: torch.Tensor = fn(tensor)
                return made
            return tensor.to(moved.dtype) if tensor.is_floating_point() else tensor

        return super()._apply(apply, recurse)  # type: ignore[misc]

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """There is nothing to save."""
        raise InvalidOption("a queued VAE has no weights to save; save the pipeline with vae=None", field="vae")


def _one(timestep: Any) -> float | None:
    """The one timestep that all pictures of a decode have."""
    if timestep is None:
        return None
    values = {float(value) for value in timestep.flatten().tolist()}
    if len(values) != 1:
        raise InvalidOption("the pictures of one decode have several timesteps: decode each by itself", field="temb")
    return values.pop()


def has_channels_innermost(tensor: torch.Tensor) -> bool:
    """Whether its strides are those of channels last, as pictures have them after `preprocess`, and what came of them.

    Convolutions have other kernels for these, with other last bits: a worker must see the strides that a pipeline's own
    VAE would have seen.
    """
    import torch

    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=formats[tensor.ndim])


def _config_of(entry: VaeEntry) -> dict[str, Any]:
    text = _file_of(entry, "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def _read_statistics(module: Any, entry: VaeEntry) -> None:
    """Fills the buffers that pipelines read off a VAE: those of itself and of its batch norm, not of its halves."""
    import torch
    from safetensors import safe_open

    inside = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    names = [name for name, _ in module.named_buffers() if not name.startswith(inside)]
    if not names:
        return
    with safe_open(_file_of(entry, _WEIGHTS_FILE), framework="pt") as file:
        for name in set(names) & set(file.keys()):
            owner, _, own = name.rpartition(".")
            module.get_submodule(owner)._buffers[own] = file.get_tensor(name).to(torch.float32)


def _file_of(entry: VaeEntry, name: str) -> Path:
    """A file beside the entry's weights.

    Raises:
        WeightsMissing: it is neither there nor to be had.
    """
    if entry.weights == _OWN_WEIGHTS:
        return Path(str(resources.files("worker") / "demo_vae" / name))
    path = Path(entry.weights) / (entry.subfolder or "") / name
    if path.is_absolute():
        if path.is_file():
            return path
        raise WeightsMissing(f"there is no {path}: give `config`, or correct [{entry.name}] in the catalogue")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(entry.weights, name, subfolder=entry.subfolder, revision=entry.revision))
    except Exception as error:  # the hub client has no common base class for "cannot be had"
        raise WeightsMissing(
            f"{name} of VAE {entry.name} ({entry.weights}) is neither in the Hugging Face cache nor to be had from the "
            f"hub ({type(error).__name__}): fetch it once with network, or give `config`",
            field="config",
        ) from error
