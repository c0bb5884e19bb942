"""The typed settings tree; the only reader of the environment."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """The base of every part of the tree: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkSettings(Settings):
    """How to reach the outside."""

    proxy: str | None = None
    ca_file: str | None = None


class PlatformSettings(Settings):
    """What every platform account has."""

    type: str
    enabled: bool = False
    tenant: str = "default"
    insecure: bool = False
    network: NetworkSettings | None = None
