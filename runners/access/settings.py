"""The block `kafka` of brokers.yaml: how the survey's Kafka is set up, and what each broker's mirror needs."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Address = Annotated[str, Field(pattern=r"^[^\s:,]+:\d{1,5}(,[^\s:,]+:\d{1,5})*$")]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class MirrorConfig:
    """The Kafka of a broker that wants its stream there.

    Attributes
    ----------
    bootstrap : where it is
    login : properties file of a user who may make and write topics there; None where nobody is asked
    """

    bootstrap: Address
    login: str | None = None


@dataclass(frozen=True)
class KafkaAccess:
    """How topics are made and how users log in.

    Attributes
    ----------
    partitions : of a full stream; at most so many consumers of a group share it
    filter_partitions : of a filtered stream
    replication : copies of each partition; one of them may be away before writing stops
    retention_days : how long messages are kept, and can be replayed
    security : how users connect
    authority : certificate file of the authority that Kafka's own is checked with, as users have it; for SASL_SSL
    address : where users connect, if that is not where `provision` does
    mirrors : by broker
    """

    partitions: int = Field(default=45, ge=1, le=10_000)
    filter_partitions: int = Field(default=4, ge=1, le=10_000)
    replication: int = Field(default=3, ge=1, le=10)
    retention_days: float = Field(default=7.0, gt=0.0, le=10_000.0)
    security: Literal["SASL_SSL", "SASL_PLAINTEXT"] = "SASL_SSL"
    authority: str | None = None
    address: Address | None = None
    mirrors: dict[str, MirrorConfig] = field(default_factory=dict)
