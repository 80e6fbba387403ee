"""Settings that only a gateway needs: where it listens, who may come in, and how much it takes."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker_config import settings_loading
from broker_config.settings_loading import Names

__all__ = ["GatewaySettings", "load_gateway_settings"]

MIB = 1024 * 1024


class GatewaySettings(BaseSettings):
    """Settings of one gateway process."""

    model_config = SettingsConfigDict(
        env_prefix="LATENTQ_GATEWAY_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on. Any other than loopback needs keys.")
    port: int = Field(8765, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    auth: str = Field(
        "auto",
        pattern="^(auto|required)$",
        description="`auto`: on loopback, without other names, everyone may do everything; `required`: with a key.",
    )
    allowed_hosts: Names = Field(
        (), description="Names under which it may be asked, besides its address and localhost; separated by commas."
    )
    default_vae: str | None = Field(None, description="VAE of `POST /`, where the path names none.")

    wait_s: float = Field(25.0, gt=0, le=300, description="Longest time that one request waits for a job.")
    remote_retention_s: float = Field(
        3600.0, gt=0, description="How long latents and result of a `POST /decode/…` or `/encode/…` stay after the end."
    )
    session_s: float = Field(43_200.0, gt=0, description="How long a browser stays logged in.")

    max_header_bytes: int = Field(8190, ge=512, description="Longest header field.")
    max_query_bytes: int = Field(6144, ge=256, description="Longest query string.")
    max_form_bytes: int = Field(64 * 1024, gt=0, description="Longest JSON of a request: options, metadata, a token.")
    max_batch_jobs: int = Field(64, gt=0, description="Jobs of one batch submit.")
    max_uploads: int = Field(256, gt=0, description="Bodies that are read at a time.")
    max_uploads_bytes: int = Field(1024 * MIB, gt=0, description="Bytes of all bodies that are read at a time.")
    max_downloads_bytes: int = Field(
        1024 * MIB, gt=0, description="Bytes of all outputs that are held at a time for those who read them."
    )
    max_key_share: float = Field(
        0.5, gt=0, le=1, description="Share of the uploads and downloads at a time that one key may have."
    )
    min_upload_bytes_per_s: float = Field(
        20_000.0, gt=0, description="Slowest upload, on average after the first `patience_s`."
    )
    patience_s: float = Field(
        20.0, gt=0, description="How long a client may keep a connection without a request, a header, or reading on."
    )
    max_connections: int = Field(4096, gt=0, description="Connections at a time.")
    max_streams: int = Field(256, gt=0, description="Event streams at a time.")
    max_streams_per_key: int = Field(32, gt=0, description="The same for one key.")
    rate_per_min: float = Field(1200.0, gt=0, description="Submits a minute of a key that has no rate of its own.")
    jobs_per_day: int | None = Field(
        None, gt=0, description="Jobs a day (UTC) of a key that has no quota of its own. Unset: any."
    )
    open_metrics: bool = Field(False, description="Whether `/metrics` is answered without a key.")

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.max_streams_per_key > self.max_streams:
            raise ValueError("max_streams_per_key must be at most max_streams")
        return self


def load_gateway_settings(**overrides: object) -> GatewaySettings:
    """Settings from the environment, with `overrides` on top.

    Raises:
        ConfigurationError: a value is not allowed; the message names each variable.
    """
    return settings_loading.load(GatewaySettings, "gateway settings", overrides)
