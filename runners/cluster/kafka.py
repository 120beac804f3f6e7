"""A real Kafka broker on this machine: broker and controller in one process (KRaft), its jars fetched by Maven.

It has two listeners for clients. The plain one is the job's: no password, no encryption, so it listens on
the loopback interface only, and whoever comes that way (to Kafka the user ANONYMOUS) may do everything, as
whoever has a shell on this machine may anyway. The other one is the broker teams': they log in by
SCRAM-SHA-512 and may do what their access rules say, at first nothing. So access control can be tried
on the same broker that an unchanged job writes to; a deployment leaves the plain listener out.
"""

from __future__ import annotations

import base64
import secrets
import shutil
import subprocess
import uuid
from importlib import resources
from pathlib import Path

from runners.cluster.processes import Service, running_pid, start, wait_until
from runners.cluster.settings import HOST, ClusterError, ClusterSettings, KafkaSettings
from runners.flink_setup import CHECKOUT, java_or_wheel, run_maven
from runners.kafka import KafkaUnreachableError, check_kafka
from runners.kafka_login import MECHANISM, jaas, write_secret

ADMIN = "admin"
_MAIN_JAR = "kafka_2.13-{version}.jar"
_JVM = ("-Xms128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError")


def kafka_service(settings: KafkaSettings) -> Service:
    return Service("kafka", (settings.port, settings.controller_port, settings.secured_port))


def kafka_libraries(version: str) -> Path:
    """Where the jars of that version lie."""
    return CHECKOUT / ".cluster" / f"kafka-{version}"


def kafka_up(cluster: ClusterSettings) -> bool:
    """Start the Kafka broker unless it runs; returns when it answers. False if it did already.

    What it was sent before is still there.

    Raises
    ------
    ClusterError, FlinkSetupError
        Java, Maven or the jars cannot be had, a port is taken, or it did not start.
    """
    settings, service = cluster.kafka, kafka_service(cluster.kafka)
    runs = running_pid(cluster, service) is not None
    if not runs:
        _start(cluster, service)
    wait_until(cluster, service, lambda: _answers(settings))
    _make_admin(settings, admin_properties(cluster))
    return not runs


def _start(cluster: ClusterSettings, service: Service) -> None:
    settings = cluster.kafka
    java = java_or_wheel()
    class_path = f"{fetched_libraries(settings.version, java)}/*"
    folder = cluster.folder / "kafka"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "server.properties"
    config.write_text(server_properties(settings, folder / "data"), encoding="utf-8")
    logging = folder / "log4j2.properties"
    logging.write_text((resources.files("runners.config") / "kafka" / logging.name).read_text("utf-8"), "utf-8")
    if not (folder / "data" / "meta.properties").is_file():
        admin_properties(cluster).unlink(missing_ok=True)  # of users in a folder that is gone
        _format(java, class_path, config)
    command = [str(java), *_JVM, f"-Xmx{settings.heap_mb}m", f"-Dlog4j2.configurationFile={logging}"]
    start(cluster, service, [*command, "-cp", class_path, "kafka.Kafka", str(config)])


def server_properties(settings: KafkaSettings, data: Path) -> str:
    """The broker's configuration."""
    values = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{HOST}:{settings.controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"JOB://{HOST}:{settings.port},CONTROLLER://{HOST}:{settings.controller_port},"
        f"TEAMS://{HOST}:{settings.secured_port}",
        "listener.security.protocol.map": "JOB:PLAINTEXT,CONTROLLER:PLAINTEXT,TEAMS:SASL_PLAINTEXT",
        "inter.broker.listener.name": "JOB",
        "listener.name.teams.sasl.enabled.mechanisms": MECHANISM,
        "listener.name.teams.scram-sha-512.sasl.jaas.config": "org.apache.kafka.common.security.scram."
        "ScramLoginModule required;",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        # The broker itself speaks to its controller as ANONYMOUS, too.
        "super.users": f"User:ANONYMOUS;User:{ADMIN}",
        "log.dirs": data,
        "num.partitions": settings.partitions,
        "message.max.bytes": settings.max_message_bytes,
        "replica.fetch.max.bytes": settings.max_message_bytes,
        "compression.type": "producer",
        "offsets.topic.replication.factor": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
        # Kafka holds a user to a quota over so many seconds, and up to that lets it run and stand still: 11 by default.
        "quota.window.num": 3,
        # A broker that was killed is taken back when its old session has expired: by default after nine seconds.
        "broker.session.timeout.ms": 2000,
        "broker.heartbeat.interval.ms": 500,
    }
    return "".join(f"{key}={value}\n" for key, value in values.items())


def admin_properties(cluster: ClusterSettings) -> Path:
    """The file with which Kafka's own commands log in as the administrator."""
    return cluster.folder / "kafka" / "admin.properties"


def kafka_version_of(libraries: Path) -> str | None:
    """The version whose jars lie in a folder."""
    prefix, suffix = _MAIN_JAR.split("{version}")
    found = next(iter(libraries.glob(f"{prefix}[0-9]*{suffix}")), None)
    return found.name.removeprefix(prefix).removesuffix(suffix) if found else None


def fetched_libraries(version: str, java: Path) -> Path:
    """The folder of Kafka's jars, fetched where they are missing; it appears whole or not at all."""
    libraries = kafka_libraries(version)
    if kafka_version_of(libraries) == version and (libraries / f"connect-mirror-{version}.jar").is_file():
        return libraries
    half = libraries.with_name(f"{libraries.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    with resources.as_file(resources.files("runners.config") / "kafka" / "pom.xml") as pom:
        run_maven(
            pom,
            libraries.with_name(f"{libraries.name}.log"),
            java,
            f"-Dkafka.version={version}",
            "dependency:copy-dependencies",
            "-DincludeScope=runtime",
            f"-DoutputDirectory={half}",
        )
    shutil.rmtree(libraries, ignore_errors=True)
    half.replace(libraries)
    return libraries


def _format(java: Path, class_path: str, config: Path) -> None:
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode("ascii").rstrip("=")
    command = [str(java), "-cp", class_path, "kafka.tools.StorageTool", "format", "--ignore-formatted"]
    arguments = [f"--cluster-id={cluster_id}", "-c", str(config)]  # it may begin with a hyphen
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ClusterError(f"Kafka's folder could not be made: {(done.stdout + done.stderr).strip()}")


def _answers(settings: KafkaSettings) -> bool:
    try:
        check_kafka(settings.bootstrap, timeout_s=2.0)
    except KafkaUnreachableError:
        return False
    return True


def _make_admin(settings: KafkaSettings, path: Path) -> None:
    """Make the administrator, with a password that is in this file and nowhere else."""
    if path.is_file():
        return
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

    password = secrets.token_urlsafe(24)
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion(ADMIN, info, password.encode("ascii"))
    client = AdminClient({"bootstrap.servers": settings.bootstrap})
    try:
        for done in client.alter_user_scram_credentials([change]).values():
            done.result(30)
    except KafkaException as error:
        raise ClusterError(f"Kafka's administrator could not be made: {error}") from error
    values = {
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": MECHANISM,
        "sasl.jaas.config": jaas(ADMIN, password),
    }
    write_secret(path, "".join(f"{key}={value}\n" for key, value in values.items()))
