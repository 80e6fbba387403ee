"""Settings that only a courier needs."""

from __future__ import annotations

import os
import secrets
import socket
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from broker_config import settings_loading

__all__ = ["CourierSettings", "load_courier_settings"]


def _own_name() -> str:
    return f"{socket.gethostname()[:32]}-{os.getpid()}-{secrets.token_hex(3)}"


class CourierSettings(BaseSettings):
    """Settings of one courier process."""

    model_config = SettingsConfigDict(
        env_prefix="LATENTQ_COURIER_", env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    name: str = Field(default_factory=_own_name, description="Unique name of the courier.")
    concurrency: int = Field(64, ge=1, le=512, description="Deliveries under way at a time.")
    per_receiver: int = Field(
        8, ge=1, description="The same to one receiver (scheme, host, port), of all couriers together."
    )
    timeout_s: float = Field(15.0, gt=0, description="Longest time of one attempt, from its first packet on.")
    lease_s: float = Field(
        60.0, gt=0, description="After which the deliveries of a courier that fell silent go to another."
    )
    max_answer_bytes: int = Field(65_536, ge=0, description="How much of an answer is read; its status is what counts.")

    @model_validator(mode="after")
    def _lease_outlasts_attempt(self) -> Self:
        if self.lease_s < 2 * self.timeout_s:
            raise ValueError("lease_s must be at least twice timeout_s, so that no delivery is tried twice at a time")
        return self


def load_courier_settings(**overrides: object) -> CourierSettings:
    """Settings from the environment, with `overrides` on top.

    Raises:
        ConfigurationError: a value is not allowed; the message names each variable.
    """
    return settings_loading.load(CourierSettings, "courier settings", overrides)
