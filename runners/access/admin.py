"""A Kafka cluster as its administrator sees it: what is there, and the changes that make it as wanted.

Topics, rights and logins go through librdkafka; quotas, which that cannot set, through the command that Kafka
brings for them.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from runners.access.plan import Difference, Grant, KafkaState, Topic, TopicChange, difference
from runners.cluster.kafka import fetched_libraries
from runners.cluster.settings import load_cluster_settings
from runners.flink_setup import java_or_wheel
from runners.kafka import check_kafka
from runners.kafka_login import client_settings, java_settings, login_text, read_login, write_secret

_PATIENCE_S = 30.0
_VISIBLE_S = 20.0
_ITERATIONS = 8192
_QUOTA = re.compile(r"user-principal '([^']*)' are .*?consumer_byte_rate=([0-9.E]+)")
_PRINCIPAL = "User:"


class KafkaAdminError(RuntimeError):
    """Kafka refused what its administrator asked for; the message says what and why."""


class KafkaAdmin:
    """The administrator's view of the Kafka at `bootstrap`.

    Parameters
    ----------
    bootstrap : "HOST:PORT[,HOST:PORT...]"
    login : properties file of the administrator, or None where Kafka asks for none

    Raises
    ------
    KafkaUnreachableError, KafkaLoginError
        Nobody answers, or the login is refused or cannot be read.
    """

    def __init__(self, bootstrap: str, login: Path | None) -> None:
        from confluent_kafka.admin import AdminClient

        check_kafka(bootstrap, login=None if login is None else str(login))
        self.bootstrap = bootstrap
        self.login = login
        self._client = AdminClient(client_settings(bootstrap, None if login is None else str(login)))

    @property
    def nodes(self) -> int:
        """How many nodes Kafka has."""
        return len(_answer("its nodes", lambda: self._client.list_topics(timeout=_PATIENCE_S)).brokers)

    def found(self) -> KafkaState:
        """What is there."""
        return KafkaState(self._topics(), self._users(), self._grants(), self._quotas())

    def apply(self, change: Difference, want: KafkaState, credentials: Credentials, rotate: Collection[str]) -> None:
        """Do what a difference says, in its order, and return when Kafka shows it.

        Raises
        ------
        KafkaAdminError
            Something was refused: what stands before it in the difference is done, and the same command goes on.
        """
        for topic in change.topics:
            self._change_topic(topic)
        for user in change.logins:
            self._log_in(user, credentials, anew=user in rotate)
        self._revoke(change.revoked)
        for user, rate in change.quotas.items():
            self._set_quota(user, rate)
        self._grant(change.granted)
        self._await(want, credentials)

    def _await(self, want: KafkaState, credentials: Credentials) -> None:
        """Kafka says yes before all of its nodes know."""
        deadline = time.monotonic() + _VISIBLE_S
        while rows := difference(want, self.found(), known=credentials.users).rows:
            if time.monotonic() > deadline:
                raise KafkaAdminError(f"not to be seen after {_VISIBLE_S:g} s: {'; '.join(map(' '.join, rows))}")
            time.sleep(0.2)

    def _topics(self) -> dict[str, Topic]:
        from confluent_kafka.admin import ConfigResource, ResourceType

        listed = _answer("its topics", lambda: self._client.list_topics(timeout=_PATIENCE_S)).topics
        names = [ConfigResource(ResourceType.TOPIC, name) for name in listed if not name.startswith("__")]
        if not names:
            return {}
        configs = {
            resource.name: _answer(f"settings of topic {resource.name}", future.result)
            for resource, future in self._client.describe_configs(names).items()
        }
        return {
            name: Topic(
                len(listed[name].partitions),
                min(len(one.replicas) for one in listed[name].partitions.values()),
                {entry.name: entry.value for entry in config.values()},
            )
            for name, config in configs.items()
        }

    def _users(self) -> frozenset[str]:
        return frozenset(_answer("its users", self._client.describe_user_scram_credentials().result))

    def _grants(self) -> frozenset[Grant]:
        from confluent_kafka.admin import (
            AclBindingFilter,
            AclOperation,
            AclPermissionType,
            ResourcePatternType,
            ResourceType,
        )

        everything = AclBindingFilter(
            ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ALLOW
        )
        bindings = _answer("its access rules", self._client.describe_acls(everything).result)
        return frozenset(
            Grant(
                one.principal.removeprefix(_PRINCIPAL),
                # librdkafka's name for the cluster is that of its one broker.
                "CLUSTER" if one.restype == ResourceType.BROKER else one.restype.name,
                one.resource_pattern_type.name,
                one.name,
                one.operation.name,
            )
            for one in bindings
            if one.principal.startswith(_PRINCIPAL)
        )

    def _quotas(self) -> dict[str, int]:
        said = self._quota_command("--describe")
        return {user: round(float(rate)) for user, rate in _QUOTA.findall(said)}

    def _change_topic(self, change: TopicChange) -> None:
        from confluent_kafka.admin import (
            AlterConfigOpType,
            ConfigEntry,
            ConfigResource,
            NewPartitions,
            NewTopic,
            ResourceType,
        )

        what = f"topic {change.name}"
        if change.is_new:
            new = NewTopic(change.name, change.partitions, change.replication, config=dict(change.config))
            _answer(what, self._client.create_topics([new])[change.name].result)
            return
        if change.config:
            entries = [
                ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET)
                for key, value in change.config.items()
            ]
            resource = ConfigResource(ResourceType.TOPIC, change.name, incremental_configs=entries)
            (done,) = self._client.incremental_alter_configs([resource]).values()
            _answer(what, done.result)
        if change.partitions:
            more = self._client.create_partitions([NewPartitions(change.name, change.partitions)])
            _answer(what, more[change.name].result)

    def _log_in(self, user: str, credentials: Credentials, anew: bool) -> None:
        """Give a user the password of its file, or a new one."""
        from confluent_kafka.admin import ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

        info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, _ITERATIONS)
        password = None if anew else credentials.password(user)
        if password is None:
            password = secrets.token_urlsafe(32)
            if not anew:
                credentials.write(user, password)
        change = UserScramCredentialUpsertion(user, info, password.encode("ascii"))
        _answer(f"user {user}", self._client.alter_user_scram_credentials([change])[user].result)
        if anew:  # the old file holds until Kafka has the new password
            credentials.write(user, password)

    def _revoke(self, grants: Collection[Grant]) -> None:
        from confluent_kafka.admin import AclBindingFilter

        if grants:
            filters = [_binding(AclBindingFilter, grant, host=None) for grant in grants]
            for done in self._client.delete_acls(filters).values():
                _answer("a right to be revoked", done.result)

    def _grant(self, grants: Collection[Grant]) -> None:
        from confluent_kafka.admin import AclBinding

        if grants:
            bindings = [_binding(AclBinding, grant, host="*") for grant in grants]
            for binding, done in self._client.create_acls(bindings).items():
                _answer(f"a right of {binding.principal}", done.result)

    def _set_quota(self, user: str, rate: int) -> None:
        self._quota_command("--alter", "--entity-name", user, "--add-config", f"consumer_byte_rate={rate}")

    def _quota_command(self, *arguments: str) -> str:
        with tempfile.TemporaryDirectory(prefix="nightstream-admin-") as folder:
            config = Path(folder) / "admin.properties"
            settings = java_settings(self.bootstrap, self.login)
            write_secret(config, "".join(f"{key}={value}\n" for key, value in settings.items()))
            command = [*self._java, "kafka.admin.ConfigCommand", f"--bootstrap-server={self.bootstrap}"]
            command += [f"--command-config={config}", "--entity-type=users", *arguments]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
            except subprocess.TimeoutExpired as error:
                raise KafkaAdminError(f"quotas: no answer within {error.timeout:g} s") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
            raise KafkaAdminError(f"quotas: {said[0]}")
        return done.stdout

    @cached_property
    def _java(self) -> list[str]:
        java = java_or_wheel()
        libraries = fetched_libraries(load_cluster_settings().kafka.version, java)
        return [str(java), "-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", f"{libraries}/*"]


class Credentials:
    """A folder with one properties file for each user, which only its owner can read.

    Parameters
    ----------
    folder : made where it is missing
    address, security : what a user needs besides a password
    """

    def __init__(self, folder: Path, address: str, security: Mapping[str, str]) -> None:
        self.folder = folder
        self._address = address
        self._security = dict(security)

    @property
    def users(self) -> frozenset[str]:
        """Those who have a file."""
        return frozenset(path.stem for path in self.folder.glob("*.properties") if not path.name.startswith("."))

    def file(self, user: str) -> Path:
        return self.folder / f"{user}.properties"

    def password(self, user: str) -> str | None:
        """What the user's file says; None if there is none. KafkaLoginError if it says nothing of use."""
        return read_login(self.file(user)).get("sasl.password") if self.file(user).is_file() else None

    def write(self, user: str, password: str) -> None:
        """Write the user's file."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_secret(self.file(user), login_text(self._address, self._security, user, password))


def _binding(kind: Any, grant: Grant, host: str | None) -> Any:
    from confluent_kafka.admin import AclOperation, AclPermissionType, ResourcePatternType, ResourceType

    resource = ResourceType.BROKER if grant.kind == "CLUSTER" else ResourceType[grant.kind]
    return kind(
        resource,
        grant.name,
        ResourcePatternType[grant.pattern],
        f"{_PRINCIPAL}{grant.user}",
        host,
        AclOperation[grant.operation],
        AclPermissionType.ALLOW,
    )


def _answer(what: str, ask: Any) -> Any:
    """What Kafka answers; KafkaAdminError where it refuses or is silent."""
    from confluent_kafka import KafkaException

    try:
        return ask()
    except KafkaException as error:
        raise KafkaAdminError(f"{what}: {error.args[0].str()}") from error
