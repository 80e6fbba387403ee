"""Jobs that are refused before anything is allocated."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class InvalidJob(LatentqError, ValueError):
    """The job was refused; nothing was stored."""

    code = "invalid_job"


class UnknownVae(InvalidJob):
    """The catalogue has no such VAE; `latentq vaes` lists them."""

    code = "unknown_vae"


class UnknownLayout(InvalidJob):
    """The VAE does not take this latent layout."""

    code = "unknown_layout"


class UnknownPipeline(InvalidJob):
    """The pipeline's class is not in the table; give vae and layout instead."""

    code = "unknown_pipeline"


class InvalidOption(InvalidJob):
    """An option has a value that is not allowed."""

    code = "invalid_option"


class InvalidRow(InvalidJob):
    """A row of the prompts is malformed, or asks for what the pipeline does not do; nothing was denoised."""

    code = "prompt_row_invalid"

    def __init__(self, message: str | None = None, /, *, field: str | None = None, line: int | None = None) -> None:
        super().__init__(message, field=field)
        #: Where the row stands in its file, from 1; None: it is about the file.
        self.line = line


class InvalidRank(InvalidJob):
    """The latents have the wrong number of dimensions for the layout."""

    code = "latents_rank"


class InvalidChannels(InvalidJob):
    """The latents have the wrong number of channels for the VAE."""

    code = "latents_channels"


class InvalidDtype(InvalidJob):
    """The latents' dtype is not one of float16, bfloat16, float32."""

    code = "latents_dtype"


class InvalidSize(InvalidJob):
    """height, width or num_frames do not fit the latents."""

    code = "latents_size"


class LatentsNotFinite(InvalidJob):
    """The latents contain NaN or Inf; the picture would be black. Check the denoiser's dtype."""

    code = "latents_not_finite"


class PixelLimitExceeded(InvalidJob):
    """The decoded picture would exceed the configured pixel limit."""

    code = "pixel_limit_exceeded"


class LatentsTooLarge(InvalidJob):
    """The latents exceed the size one job may have."""

    code = "latents_too_large"


class WebhookUrlRefused(InvalidJob):
    """The webhook's URL is not one that may be called."""

    code = "webhook_url_refused"


class WebhookAddressRefused(WebhookUrlRefused):
    """The webhook's host is, or resolves to, an address that may not be called."""

    code = "webhook_address_refused"


class InvalidTensorFile(InvalidJob):
    """The file does not hold usable latents."""

    code = "tensor_file_invalid"


class NotSafetensors(InvalidTensorFile):
    """The file is not a safetensors file; save latents with `safetensors.torch.save_file`."""

    code = "tensor_file_not_safetensors"


class TensorFileTruncated(InvalidTensorFile):
    """The file ends before its header says so; copy it again."""

    code = "tensor_file_truncated"


class TensorFileOversized(InvalidTensorFile):
    """The file is longer than its header says, or its header is larger than allowed."""

    code = "tensor_file_oversized"


class SpoolFileDamaged(InvalidTensorFile):
    """The file in the spool is not what was written; it was set aside."""

    code = "spool_file_damaged"
