"""Who may do what on the survey's Kafka: the plan, its difference from what is there, logins. All without Kafka."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from runners.access.admin import Credentials
from runners.access.mirror import mirror_settings
from runners.access.plan import (
    AccessPlanError,
    Difference,
    Grant,
    KafkaState,
    Topic,
    difference,
    wanted,
)
from runners.access.settings import KafkaAccess, MirrorConfig
from runners.cli import main
from runners.configuration import ConfigurationError, load_brokers, load_kafka_access
from runners.kafka import KafkaAlertSink
from runners.kafka_login import KafkaLoginError, jaas, java_settings, login_text, read_login
from transforms.distribution import BrokerConfig, BrokerLimits

ACCESS = KafkaAccess()
FULL = BrokerConfig("antares", topic="lsst", limits=BrokerLimits(10_000_000, 2_000_000))
FILTERED = BrokerConfig("bright", stream="demo.bright-new", encoding="ocf")
FILES = BrokerConfig("disk", sink="files")
BROKERS = (FULL, FILTERED, FILES)


def state(brokers: tuple[BrokerConfig, ...] = BROKERS, access: KafkaAccess = ACCESS, nodes: int = 3) -> KafkaState:
    return wanted(brokers, access, nodes)


def done(found: KafkaState, change: Difference) -> KafkaState:
    """What is there after a difference was done, by a Kafka as simple as can be."""
    topics = dict(found.topics)
    for one in change.topics:
        before = topics.get(one.name, Topic(0, one.replication, {"segment.bytes": "7"}))
        topics[one.name] = Topic(
            one.partitions or before.partitions, before.replication, {**before.config, **one.config}
        )
    return KafkaState(
        topics,
        found.users | set(change.logins),
        (found.grants - set(change.revoked)) | set(change.granted),
        {**found.quotas, **change.quotas},
    )


# --- the plan ---------------------------------------------------------------------------------


def test_topics_are_those_that_brokers_read_and_those_of_the_job_itself() -> None:
    topics = state().topics
    assert {name: topic.partitions for name, topic in topics.items()} == {
        "visits": 1,
        "alert-ledger": 1,
        "alert-failures": 1,
        "lsst": 45,
        "filter-demo-bright-new": 4,
        "ztf-alerts": 45,
    }
    assert topics["ztf-alerts"] == topics["lsst"]
    assert "ztf-alerts" not in state((FILTERED, FILES)).topics
    assert topics["lsst"].config == {
        "retention.ms": str(7 * 24 * 3600 * 1000),
        "max.message.bytes": "2000000",
        "compression.type": "producer",
        "min.insync.replicas": "2",
    }


def test_a_broker_reads_its_topic_with_groups_of_its_name_and_can_do_nothing_else() -> None:
    of_broker = {grant[1:] for grant in state().grants if grant.user == "antares"}
    assert of_broker == {
        *(
            ("TOPIC", "LITERAL", topic, operation)
            for topic in ("lsst", "ztf-alerts")
            for operation in ("READ", "DESCRIBE", "DESCRIBE_CONFIGS")
        ),
        ("GROUP", "PREFIXED", "antares", "ALL"),
    }


def test_only_the_job_writes_alerts_and_only_the_telescope_visits() -> None:
    writers = {(grant.name, grant.user) for grant in state().grants if grant.operation == "WRITE"}
    alerts = {"alert-ledger", "alert-failures", "lsst", "filter-demo-bright-new", "ztf-alerts"}
    assert writers == {(name, "nightstream") for name in alerts} | {("visits", "telescope")}
    readers = {(grant.name, grant.user) for grant in state().grants if grant.operation == "READ"}
    assert readers == {
        *(("lsst", "antares"), ("ztf-alerts", "antares")),
        ("filter-demo-bright-new", "bright"),
        ("visits", "nightstream"),
    }


def test_brokers_with_files_are_no_users() -> None:
    assert state().users == {"antares", "bright", "nightstream", "telescope"}


def test_the_nodes_of_kafka_share_a_quota_as_far_as_there_are_partitions() -> None:
    assert state(nodes=3).quotas["antares"] == 3_333_334
    assert state(nodes=10).quotas == {"antares": 1_000_000, "bright": 6_250_000}


@pytest.mark.parametrize("name", ["nightstream", "telescope", "admin"])
def test_a_broker_cannot_have_the_name_of_another_user(name: str) -> None:
    with pytest.raises(AccessPlanError, match=name):
        state((replace(FULL, name=name),))


def test_a_broker_whose_groups_another_could_name_is_refused() -> None:
    with pytest.raises(AccessPlanError, match="antares-test begins with the name of broker antares"):
        state((FULL, replace(FULL, name="antares-test")))


def test_more_copies_than_nodes_are_refused() -> None:
    with pytest.raises(AccessPlanError, match="3 copies of each partition are wanted, Kafka has 1 node:"):
        state(nodes=1)


# --- the difference ---------------------------------------------------------------------------


def test_what_is_as_wanted_needs_nothing() -> None:
    want = state()
    assert difference(want, want, known=want.users) == Difference()


def test_an_empty_kafka_gets_all_of_it_and_then_needs_nothing() -> None:
    want, empty = state(), KafkaState()
    change = difference(want, empty)
    assert set(change.logins) == want.users
    assert set(change.granted) == want.grants
    assert change.quotas == want.quotas
    assert {topic.name for topic in change.topics if topic.is_new} == set(want.topics)
    assert difference(want, done(empty, change), known=want.users) == Difference()


def test_what_others_own_is_left_alone() -> None:
    theirs = Grant("operator", "TOPIC", "LITERAL", "lsst", "ALTER")
    want = state()
    found = KafkaState(
        {**want.topics, "theirs": Topic(3, 3, {})},
        want.users | {"operator"},
        want.grants | {theirs},
        {**want.quotas, "operator": 5, "nightstream": 6},
    )
    assert difference(want, found, known=want.users) == Difference()


def test_a_right_too_many_is_revoked_from_ours() -> None:
    want = state()
    much = Grant("antares", "TOPIC", "LITERAL", "filter-demo-bright-new", "READ")
    change = difference(want, replace(want, grants=want.grants | {much}), known=want.users)
    assert change.revoked == (much,)
    assert change.rows == (("revoke", "user antares", "READ on TOPIC filter-demo-bright-new"),)


def test_a_broker_that_left_loses_its_rights_and_its_topic_stays() -> None:
    before, want = state(), state((FILTERED,))
    change = difference(want, before, known=before.users)
    assert {grant.user for grant in change.revoked} == {"antares", "nightstream"}
    assert {grant for grant in before.grants if grant.user == "antares"} <= set(change.revoked)
    assert change.topics == ()
    # Without its file nobody knows that this user was ours.
    stranger = difference(want, before, known=want.users)
    assert {grant.user for grant in stranger.revoked} == {"nightstream"}


def test_settings_of_a_topic_are_mended_and_what_cannot_be_is_said() -> None:
    want = state()
    config = {**want.topics["lsst"].config, "max.message.bytes": "1048588"}
    found = replace(
        want,
        topics={**want.topics, "lsst": Topic(8, 1, config), "visits": replace(want.topics["visits"], partitions=2)},
    )
    change = difference(want, found, known=want.users)
    assert change.rows == (("alter", "topic lsst", "partitions 8 -> 45, max.message.bytes 1048588 -> 2000000"),)
    assert [remark.split(",")[0] for remark in change.remarks] == [
        "topic visits has 2 partitions",
        "topic lsst has 1 copies",
    ]


def test_a_password_stays_unless_its_user_is_named() -> None:
    want = state()
    assert difference(want, want, known=want.users).logins == ()
    change = difference(want, want, known=want.users, rotate=["antares"])
    assert change.logins == ("antares",)
    assert change.rows == (("rotate", "user antares", "a new password"),)
    with pytest.raises(AccessPlanError, match="--rotate fink: expected one of antares, bright"):
        difference(want, want, rotate=["fink"])


def test_a_login_without_its_file_is_told_and_left() -> None:
    want = state()
    change = difference(want, want, known=want.users - {"bright"})
    assert change.rows == ()
    assert "--rotate bright" in change.remarks[0]


@given(st.data())
def test_from_whatever_is_there_one_difference_is_enough(data: st.DataObject) -> None:
    want, other = state(), state((replace(FULL, name="fink", topic="old"), FILTERED), KafkaAccess(partitions=7))
    everything = want.grants | other.grants
    found = KafkaState(
        data.draw(
            st.dictionaries(
                st.sampled_from(sorted(want.topics)),
                st.sampled_from([Topic(1, 3, {}), Topic(3, 3, {"retention.ms": "1"})]),
            )
        ),
        data.draw(st.frozensets(st.sampled_from(sorted(want.users | other.users)))),
        data.draw(st.frozensets(st.sampled_from(sorted(everything)))),
        data.draw(st.dictionaries(st.sampled_from(sorted(want.quotas)), st.integers(1, 9))),
    )
    after = done(found, difference(want, found, known=other.users))
    left = difference(want, after, known=other.users | want.users)
    assert left.rows == ()
    assert {grant for grant in after.grants if grant.user in want.users | other.users} == want.grants


# --- settings and files -----------------------------------------------------------------------


def test_the_shipped_brokers_say_how_their_kafka_is_set_up(tmp_path: Path) -> None:
    assert load_kafka_access(None).replication == 1
    path = tmp_path / "brokers.yaml"
    path.write_text("brokers: [{name: a, topic: t}]\n")
    assert load_kafka_access(path) == KafkaAccess()
    path.write_text("kafka: {mirrors: {a: {bootstrap: 'far:9092'}}}\nbrokers: [{name: a, topic: t}]\n")
    assert load_kafka_access(path).mirrors == {"a": MirrorConfig("far:9092")}
    assert [broker.name for broker in load_brokers(path)] == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kafka: {partition: 3}", "unknown key 'partition'"),
        ("kafka: {replication: 0}", "replication"),
        ("kafka: {mirrors: {a: {bootstrap: nowhere}}}", "mirrors.a.bootstrap"),
        ("kafka: {mirrors: {a: {bootstrap: 'b:1', user: c}}}", "mirrors.a.user"),
    ],
)
def test_a_block_kafka_that_cannot_be_used_names_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "brokers.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said) as refused:
        load_kafka_access(path)
    assert "brokers.yaml: kafka" in str(refused.value)


def test_a_login_is_read_by_librdkafka_and_by_java_alike(tmp_path: Path) -> None:
    path = tmp_path / "antares.properties"
    path.write_text(
        login_text("far:9093", {"security.protocol": "SASL_SSL", "ssl.ca.location": "ca.pem"}, "antares", "se=cret")
    )
    assert read_login(path) == {
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": "ca.pem",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "antares",
        "sasl.password": "se=cret",
    }
    java = java_settings("near:9092", path)
    assert java == {
        "bootstrap.servers": "near:9092",
        "security.protocol": "SASL_SSL",
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": "ca.pem",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.jaas.config": jaas("antares", "se=cret"),
    }
    of_java = tmp_path / "java.properties"
    of_java.write_text("".join(f"{key} = {value}\n" for key, value in java.items() if not key.startswith("ssl")))
    assert read_login(of_java)["sasl.password"] == "se=cret"


def test_a_login_that_cannot_be_used_says_where_and_no_secret(tmp_path: Path) -> None:
    path = tmp_path / "antares.properties"
    path.write_text("sasl.username=antares\nsasl.pasword=secret\n")
    with pytest.raises(KafkaLoginError, match=r"line 2: 'sasl.pasword' cannot be used") as refused:
        read_login(path)
    assert "secret" not in str(refused.value)
    with pytest.raises(KafkaLoginError, match="cannot be read"):
        read_login(tmp_path / "missing")


def test_the_pickled_sink_holds_the_path_of_its_login_and_no_password(tmp_path: Path) -> None:
    path = tmp_path / "nightstream.properties"
    path.write_text("sasl.username=nightstream\nsasl.password=secret\n")
    sink = KafkaAlertSink("127.0.0.1:9", login=str(path))
    sink.open()
    travelled = pickle.dumps(sink)
    assert b"secret" not in travelled
    assert pickle.loads(travelled).login == str(path)
    sink.close(0)


def test_credentials_are_their_owners_alone(tmp_path: Path) -> None:
    logins = Credentials(tmp_path / "logins", "far:9093", {"security.protocol": "SASL_SSL"})
    assert logins.users == frozenset()
    logins.write("antares", "first")
    logins.write("antares", "second")
    assert logins.users == {"antares"}
    assert logins.password("antares") == "second"
    assert logins.password("fink") is None
    assert (tmp_path / "logins").stat().st_mode & 0o777 == 0o700
    assert logins.file("antares").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "logins").iterdir()] == ["antares.properties"]


def test_a_mirror_writes_nothing_to_the_survey_and_keeps_the_names_of_topics() -> None:
    values = mirror_settings("fink", ["lsst"], {"bootstrap.servers": "near:1"}, {"bootstrap.servers": "far:2"})
    assert values["survey.bootstrap.servers"] == "near:1"
    assert values["fink.bootstrap.servers"] == "far:2"
    assert (values["survey->fink.enabled"], values["survey->fink.topics"]) == ("true", "lsst")
    assert values["replication.policy.class"].endswith("IdentityReplicationPolicy")
    writes = ("emit.heartbeats.enabled", "emit.checkpoints.enabled", "emit.offset-syncs.enabled")
    assert [values[key] for key in writes] == ["false"] * 3
    assert not [key for key in values if key.startswith("fink->")]


# --- the commands -----------------------------------------------------------------------------


def test_commands_that_cannot_begin_say_why(tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["kafka", *arguments, "--credentials", str(tmp_path / "logins")])
        return result.exit_code, " ".join(result.stderr.split())

    code, said = run("provision", "--bootstrap", "127.0.0.1:9")
    assert code == 2 and "--admin-config" in said
    brokers = tmp_path / "brokers.yaml"
    brokers.write_text("kafka: {replicas: 3}")
    code, said = run("provision", "--bootstrap", "127.0.0.1:9", "--brokers", str(brokers))
    assert code == 2 and "unknown key 'replicas'" in said
    code, said = run("mirror", "antares", "--bootstrap", "127.0.0.1:9")
    assert code == 2 and "no mirror of antares: brokers.yaml has none" in said
    assert not (tmp_path / "logins").exists()
