"""The commands `nightstream kafka provision | mirror`."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from runners.run_commands import EXISTING, BadUsage, Failure

if TYPE_CHECKING:
    from runners.access.plan import Difference
    from runners.access.settings import KafkaAccess

_BOOTSTRAP = click.option("--bootstrap", required=True, metavar="HOST:PORT", help="The survey's Kafka.")
_BROKERS = click.option("--brokers", type=EXISTING, help="YAML list of brokers instead of the shipped one.")
_CREDENTIALS = click.option(
    "--credentials",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the users' logins, NAME.properties.",
)


@click.group()
def kafka() -> None:
    """The survey's Kafka: topics, who may read them and how fast, and copies for brokers with a Kafka of their own."""


@kafka.command()
@_BOOTSTRAP
@_BROKERS
@_CREDENTIALS
@click.option("--admin-config", type=EXISTING, help="Properties file with the administrator's login.")
@click.option("--rotate", multiple=True, metavar="NAME", help="Give this user a new password; repeatable.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
def provision(
    bootstrap: str,
    brokers: Path | None,
    credentials: Path,
    admin_config: Path | None,
    rotate: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Make topics, users, rights and quotas as brokers.yaml wants them.

    Shows what differs first. Doing it again changes nothing. Topics are never deleted, passwords never changed unasked
    and never shown: each lies in the user's file, which only you can read. Rights are taken from users that this folder
    knows, also from those that brokers.yaml no longer lists.
    """
    from runners.access.admin import Credentials, KafkaAdmin, KafkaAdminError
    from runners.access.plan import AccessPlanError, difference, wanted
    from runners.cluster.settings import ClusterError
    from runners.configuration import ConfigurationError, load_brokers, load_kafka_access
    from runners.flink_setup import FlinkSetupError
    from runners.kafka import KafkaUnreachableError
    from runners.kafka_login import KafkaLoginError

    try:
        access = load_kafka_access(brokers)
        if access.address is None and admin_config is None:
            raise BadUsage(
                f"who needs no login at {bootstrap} is not where users log in: give --admin-config, or say "
                "`address` in the block `kafka` of brokers.yaml"
            )
        logins = Credentials(credentials, access.address or bootstrap, _security(access))
        admin = KafkaAdmin(bootstrap, admin_config)
        want = wanted(load_brokers(brokers), access, admin.nodes)
        change = difference(want, admin.found(), known=logins.users, rotate=rotate)
        _show(change)
        if change.rows and not dry_run:
            admin.apply(change, want, logins, rotate)
            click.echo(f"done; logins in {credentials}")
    except (ConfigurationError, AccessPlanError, KafkaLoginError) as error:
        raise BadUsage(str(error)) from error
    except (KafkaAdminError, KafkaUnreachableError, ClusterError, FlinkSetupError, OSError) as error:
        raise Failure(str(error)) from error


@kafka.command()
@click.argument("broker")
@_BOOTSTRAP
@_BROKERS
@_CREDENTIALS
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where its configuration and log lie. Default: .cluster of the checkout.",
)
def mirror(broker: str, bootstrap: str, brokers: Path | None, credentials: Path, folder: Path | None) -> None:
    """Copy the topic of BROKER to its own Kafka, which brokers.yaml names under kafka: mirrors, until it is ended.

    Runs MirrorMaker with the broker's own login, so within its rights and its quota, in a process beside the flow: a
    remote that is slow or away slows nobody else. Says every few seconds how far it is.
    """
    from runners.access.mirror import Mirror
    from runners.cluster.settings import FOLDER, ClusterError, load_cluster_settings
    from runners.configuration import ConfigurationError, load_brokers, load_kafka_access
    from runners.flink_setup import FlinkSetupError
    from runners.kafka import KafkaUnreachableError, check_kafka
    from runners.kafka_login import KafkaLoginError

    try:
        configs = load_kafka_access(brokers).mirrors
        topics = {one.name: one.kafka_topic for one in load_brokers(brokers) if one.sink == "kafka"}
        if broker not in configs or broker not in topics:
            known = ", ".join(sorted(set(configs) & set(topics))) or "none"
            raise BadUsage(f"no mirror of {broker}: brokers.yaml has {known} under kafka: mirrors")
        login = credentials / f"{broker}.properties"
        check_kafka(bootstrap, login=str(login))
        one = Mirror(
            load_cluster_settings(folder or FOLDER), broker, (topics[broker],), bootstrap, login, configs[broker]
        )
        stopping = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopping.set())
        one.run(stopping, click.echo)
    except (ConfigurationError, KafkaLoginError) as error:
        raise BadUsage(str(error)) from error
    except (KafkaUnreachableError, ClusterError, FlinkSetupError, OSError) as error:
        raise Failure(str(error)) from error


def _security(access: KafkaAccess) -> dict[str, str]:
    """What a user's file says besides its login."""
    authority = {} if access.authority is None else {"ssl.ca.location": access.authority}
    return {"security.protocol": access.security, **authority}


def _show(change: Difference) -> None:
    widths = [max((len(row[column]) for row in change.rows), default=0) for column in (0, 1)]
    for action, what, how in change.rows:
        click.echo(f"{action:<{widths[0]}}  {what:<{widths[1]}}  {how}")
    if not change.rows:
        click.echo("all is as wanted")
    for remark in change.remarks:
        click.echo(f"left as it is: {remark}")
