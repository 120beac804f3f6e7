"""What the survey's Kafka should hold, who may do what there, and how that differs from what there is.

Pure: `wanted` makes a `KafkaState` of brokers.yaml, `difference` compares it with the one that was found.

A broker's user reads its own topics, as a member of consumer groups whose names begin with its own. The
job's user writes alerts and reads the visits that the telescope's user announces. Nobody may do anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import NamedTuple

from runners.access.settings import KafkaAccess
from schemas.manifests import VISITS_TOPIC
from transforms.accounting import LEDGER_TOPIC
from transforms.distribution import FULL_STREAM, ZTF_TOPIC, BrokerConfig, BrokerLimits, topic_sizes
from transforms.failures import FAILURES_TOPIC

JOB_USER = "nightstream"
TELESCOPE_USER = "telescope"
# Users that others hold: a broker of that name would get their login.
_OTHERS = ("admin", JOB_USER, TELESCOPE_USER)
_DAY_MS = 86_400_000


class AccessPlanError(ValueError):
    """A plan that would give one user what is another's, or that this Kafka cannot hold."""


@dataclass(frozen=True)
class Topic:
    """A topic: partitions, copies of each, and the settings that are ours."""

    partitions: int
    replication: int
    config: Mapping[str, str]


class Grant(NamedTuple):
    """A right of a user.

    Attributes
    ----------
    user, operation : who, and what: READ, WRITE, DESCRIBE ...
    kind, name : of what it is done to: TOPIC, GROUP or CLUSTER
    pattern : LITERAL, or PREFIXED where `name` is how names begin
    """

    user: str
    kind: str
    pattern: str
    name: str
    operation: str

    def __str__(self) -> str:
        return f"{self.operation} on {self.kind} {self.name}{'*' if self.pattern == 'PREFIXED' else ''}"


@dataclass(frozen=True)
class KafkaState:
    """What is on a Kafka cluster, or should be.

    Attributes
    ----------
    topics : by name
    users : those who have a login
    grants : rights
    quotas : by user, what it may draw from each Kafka node, bytes a second
    """

    topics: Mapping[str, Topic] = field(default_factory=dict)
    users: frozenset[str] = frozenset()
    grants: frozenset[Grant] = frozenset()
    quotas: Mapping[str, int] = field(default_factory=dict)


class TopicChange(NamedTuple):
    """A topic as it shall be: made if it `is_new`, else `config` is set and partitions are added up to `partitions`."""

    name: str
    is_new: bool
    partitions: int | None
    replication: int
    config: Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """What has to be done so that all is as wanted, and what cannot be done.

    Attributes
    ----------
    topics, logins, revoked, granted, quotas : in the order in which they are done: nobody reads before a quota holds
    rows : the same for people: (what is done, to what, how)
    remarks : what differs and is left as it is
    """

    topics: tuple[TopicChange, ...] = ()
    logins: tuple[str, ...] = ()
    revoked: tuple[Grant, ...] = ()
    quotas: Mapping[str, int] = field(default_factory=dict)
    granted: tuple[Grant, ...] = ()
    rows: tuple[tuple[str, str, str], ...] = ()
    remarks: tuple[str, ...] = ()


def wanted(brokers: Iterable[BrokerConfig], access: KafkaAccess, nodes: int) -> KafkaState:
    """What Kafka should hold for these brokers.

    Parameters
    ----------
    brokers : those of brokers.yaml; only the ones with a Kafka sink count
    access : the block `kafka` of brokers.yaml
    nodes : how many nodes Kafka has: each node measures quotas by itself

    Raises
    ------
    AccessPlanError
        Two users would share a name or consumer groups, or there are fewer nodes than copies.
    """
    served = [broker for broker in brokers if broker.sink == "kafka"]
    _check_names([broker.name for broker in served])
    if access.replication > nodes:
        raise AccessPlanError(
            f"{access.replication} copies of each partition are wanted, Kafka has {nodes} "
            f"node{'s' if nodes > 1 else ''}: set `replication` in the block `kafka` of brokers.yaml"
        )
    topics = {name: _topic(1, access, BrokerLimits().message_bytes) for name in _OWN_TOPICS}
    sizes = topic_sizes(tuple(served))
    for broker in served:
        count = access.partitions if broker.stream == FULL_STREAM else access.filter_partitions
        topics[broker.kafka_topic] = _topic(count, access, sizes[broker.kafka_topic])
    # Where precursor data are replayed, to whoever has a full stream.
    full = [broker for broker in served if broker.stream == FULL_STREAM]
    if full:
        topics[ZTF_TOPIC] = _topic(access.partitions, access, max(sizes[broker.kafka_topic] for broker in full))
    alerts = [name for name in topics if name != VISITS_TOPIC]
    grants = {
        *(_on_topic(JOB_USER, name, operation) for name in alerts for operation in _WRITING),
        *(_on_topic(JOB_USER, VISITS_TOPIC, operation) for operation in ("READ", "DESCRIBE")),
        *(_on_topic(TELESCOPE_USER, VISITS_TOPIC, operation) for operation in ("WRITE", "DESCRIBE")),
        *(
            Grant(user, "CLUSTER", "LITERAL", "kafka-cluster", "IDEMPOTENT_WRITE")
            for user in (JOB_USER, TELESCOPE_USER)
        ),
    }
    for broker in served:
        grants |= {_on_topic(broker.name, broker.kafka_topic, operation) for operation in _READING}
        grants.add(Grant(broker.name, "GROUP", "PREFIXED", broker.name, "ALL"))
    grants |= {_on_topic(broker.name, ZTF_TOPIC, operation) for broker in full for operation in _READING}
    quotas = {
        broker.name: -(-broker.limits.bytes_per_second // min(nodes, topics[broker.kafka_topic].partitions))
        for broker in served
    }
    return KafkaState(topics, frozenset({*quotas, JOB_USER, TELESCOPE_USER}), frozenset(grants), quotas)


_OWN_TOPICS = (VISITS_TOPIC, LEDGER_TOPIC, FAILURES_TOPIC)
_READING = ("READ", "DESCRIBE", "DESCRIBE_CONFIGS")
# The last one lets the job compare the largest message of a topic with its own.
_WRITING = ("WRITE", "DESCRIBE", "DESCRIBE_CONFIGS")


def _topic(partitions: int, access: KafkaAccess, message_bytes: int) -> Topic:
    return Topic(
        partitions,
        access.replication,
        {
            "retention.ms": str(round(access.retention_days * _DAY_MS)),
            # Key and headers are within `message_bytes`; so are batches, see `KafkaSinkSettings.batch_bytes`.
            "max.message.bytes": str(message_bytes),
            "compression.type": "producer",
            "min.insync.replicas": str(max(1, access.replication - 1)),
        },
    )


def _on_topic(user: str, topic: str, operation: str) -> Grant:
    return Grant(user, "TOPIC", "LITERAL", topic, operation)


def _check_names(names: list[str]) -> None:
    for name in names:
        if name in _OTHERS:
            raise AccessPlanError(f"broker {name}: that is the name of another user of this Kafka")
    for one, other in permutations(names, 2):
        if other.startswith(one):
            raise AccessPlanError(
                f"broker {other} begins with the name of broker {one}, whose consumer groups may have any name "
                "that begins so: rename one of them"
            )


def difference(
    want: KafkaState, found: KafkaState, *, known: Collection[str] = (), rotate: Collection[str] = ()
) -> Difference:
    """What to do so that `found` becomes `want`; empty of everything but remarks where nothing is to be done.

    Parameters
    ----------
    want, found : KafkaState
    known : users whose passwords we hold. Rights are taken only from these and from those of `want`, topics
        from nobody.
    rotate : users who get a new password

    Raises
    ------
    AccessPlanError
        `rotate` names somebody who is no user.
    """
    for user in rotate:
        if user not in want.users:
            raise AccessPlanError(f"--rotate {user}: expected one of {', '.join(sorted(want.users))}")
    ours = want.users | set(known)
    topics, remarks = _topic_changes(want.topics, found.topics)
    logins = sorted((want.users - found.users) | set(rotate))
    remarks += [
        f"{user} has a login whose password is not in this folder; --rotate {user} gives it a new one"
        for user in sorted((want.users & found.users) - set(known) - set(rotate))
    ]
    revoked = sorted(grant for grant in found.grants - want.grants if grant.user in ours)
    granted = sorted(want.grants - found.grants)
    # A user who lost all rights draws nothing: that quota may stay.
    quotas = {user: rate for user, rate in want.quotas.items() if rate != found.quotas.get(user)}
    rows = [
        *(_topic_row(change, found.topics.get(change.name)) for change in topics),
        *(_login_row(user, user in found.users, user in known and user not in rotate) for user in logins),
        *(("revoke", f"user {grant.user}", str(grant)) for grant in revoked),
        *(("quota", f"user {user}", _rates(found.quotas.get(user), rate)) for user, rate in quotas.items()),
        *_grant_rows(granted),
    ]
    return Difference(tuple(topics), tuple(logins), tuple(revoked), quotas, tuple(granted), tuple(rows), tuple(remarks))


def _topic_changes(want: Mapping[str, Topic], found: Mapping[str, Topic]) -> tuple[list[TopicChange], list[str]]:
    changes, remarks = [], []
    for name, topic in want.items():
        there = found.get(name)
        if there is None:
            changes.append(TopicChange(name, True, topic.partitions, topic.replication, topic.config))
            continue
        config = {key: value for key, value in topic.config.items() if there.config.get(key) != value}
        more = None
        if there.partitions < topic.partitions:
            more = topic.partitions
        elif there.partitions > topic.partitions:
            remarks.append(
                f"topic {name} has {there.partitions} partitions, wanted {topic.partitions}: "
                "it would have to be deleted and made anew"
            )
        if there.replication != topic.replication:
            remarks.append(
                f"topic {name} has {there.replication} copies, wanted {topic.replication}: "
                "kafka-reassign-partitions moves them"
            )
        if config or more:
            changes.append(TopicChange(name, False, more, topic.replication, config))
    return changes, remarks


def _topic_row(change: TopicChange, there: Topic | None) -> tuple[str, str, str]:
    what = f"topic {change.name}"
    if there is None:
        copies = f"{change.partitions} partitions, {change.replication} copies"
        return "create", what, ", ".join([copies, *(f"{key}={value}" for key, value in change.config.items())])
    parts = [f"partitions {there.partitions} -> {change.partitions}"] if change.partitions else []
    parts += [f"{key} {there.config.get(key)} -> {value}" for key, value in change.config.items()]
    return "alter", what, ", ".join(parts)


def _login_row(user: str, exists: bool, has_file: bool) -> tuple[str, str, str]:
    what = f"user {user}"
    if exists:
        return "rotate", what, "a new password"
    return "create", what, "with the password in its file" if has_file else "with a new password"


def _rates(before: int | None, after: int) -> str:
    return f"{'none' if before is None else f'{before:,}'} -> {after:,} bytes/s from each node"


def _grant_rows(grants: Iterable[Grant]) -> list[tuple[str, str, str]]:
    """One row for the rights of one user on one thing."""
    operations: dict[Grant, list[str]] = {}
    for grant in grants:
        operations.setdefault(grant._replace(operation=""), []).append(grant.operation)
    return [
        ("grant", f"user {grant.user}", str(grant._replace(operation=", ".join(names))))
        for grant, names in operations.items()
    ]
