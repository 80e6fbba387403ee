"""Jobs that are refused before anything is allocated."""

from __future__ import annotations

from broker_config.errors.base import LatentqError


class InvalidJob(LatentqError, ValueError, code="invalid_job"):
    """The job was refused; nothing was stored."""


class UnknownVae(InvalidJob, code="unknown_vae"):
    """The catalogue has no such VAE; `latentq vaes` lists them."""


class UnknownLayout(InvalidJob, code="unknown_layout"):
    """The VAE does not take this latent layout."""


class UnknownPipeline(InvalidJob, code="unknown_pipeline"):
    """The pipeline's class is not in the table; give vae and layout instead."""


class InvalidOption(InvalidJob, code="invalid_option"):
    """An option has a value that is not allowed."""


class InvalidRow(InvalidJob, code="prompt_row_invalid"):
    """A row of the prompts is malformed, or asks for what the pipeline does not do; nothing was denoised."""

    def __init__(self, message: str | None = None, /, *, field: str | None = None, line: int | None = None) -> None:
        super().__init__(message, field=field)
        #: Where the row stands in its file, from 1; None: it is about the file.
        self.line = line


class InvalidRank(InvalidJob, code="latents_rank"):
    """The latents have the wrong number of dimensions for the layout."""


class InvalidChannels(InvalidJob, code="latents_channels"):
    """The latents have the wrong number of channels for the VAE."""


class InvalidDtype(InvalidJob, code="latents_dtype"):
    """The latents' dtype is not one of float16, bfloat16, float32."""


class InvalidSize(InvalidJob, code="latents_size"):
    """height, width or num_frames do not fit the latents."""


class LatentsNotFinite(InvalidJob, code="latents_not_finite"):
    """The latents contain NaN or Inf; the picture would be black. Check the denoiser's dtype."""


class PixelLimitExceeded(InvalidJob, code="pixel_limit_exceeded"):
    """The decoded picture would exceed the configured pixel limit."""


class LatentsTooLarge(InvalidJob, code="latents_too_large"):
    """The latents exceed the size one job may have."""


class WebhookUrlRefused(InvalidJob, code="webhook_url_refused"):
    """The webhook's URL is not one that may be called."""


class WebhookAddressRefused(WebhookUrlRefused, code="webhook_address_refused"):
    """The webhook's host is, or resolves to, an address that may not be called."""


class InvalidTensorFile(InvalidJob, code="tensor_file_invalid"):
    """The file does not hold usable latents."""


class NotSafetensors(InvalidTensorFile, code="tensor_file_not_safetensors"):
    """The file is not a safetensors file; save latents with `safetensors.torch.save_file`."""


class TensorFileTruncated(InvalidTensorFile, code="tensor_file_truncated"):
    """The file ends before its header says so; copy it again."""


class TensorFileOversized(InvalidTensorFile, code="tensor_file_oversized"):
    """The file is longer than its header says, or its header is larger than allowed."""


class SpoolFileDamaged(InvalidTensorFile, code="spool_file_damaged"):
    """The file in the spool is not what was written; it was set aside."""
