"""Settings from YAML: what is shipped is the default, what is wrong is named with file, key and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.alert_production import AlertProductionConfig
from runners.configuration import (
    ConfigurationError,
    brokers_with_streams,
    check_broker_streams,
    load_brokers,
    load_checked_filters,
    load_production_config,
)


def _file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


# --- alert_production.yaml --------------------------------------------------------------------------


def test_the_shipped_file_says_what_the_code_says() -> None:
    assert load_production_config(None) == AlertProductionConfig()


def test_an_empty_file_or_block_changes_nothing(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "detection:\n", "detection: {}\n"):
        assert load_production_config(_file(tmp_path, text)) == AlertProductionConfig()


def test_a_key_replaces_that_key_only(tmp_path: Path) -> None:
    config = load_production_config(_file(tmp_path, "detection: {threshold_snr: 6}\n"))
    assert config.detection.threshold_snr == 6.0
    assert config.detection.max_sources == AlertProductionConfig().detection.max_sources
    assert config.subtraction == AlertProductionConfig().subtraction


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("detektion: {threshold_snr: 5}", "unknown key 'detektion', expected one of association, cutouts, detection"),
        ("1: 2", "unknown key 1, expected one of association"),
        ("detection: {treshold_snr: 5}", "detection: unknown key 'treshold_snr', expected one of max_motion_deg"),
        ("detection: {1: 5, a: 3}", "detection: unknown key 1, expected one of max_motion_deg_per_day"),
        ("detection: 7", "detection: expected keys and values, got int"),
        ("[detection]", "expected keys and values, got list"),
        ("a: b: c", "cannot be read"),
        ("\x00", "cannot be read"),
        ("detection: {threshold_snr: six}", "detection: threshold_snr: Input should be a valid number"),
        ("detection: {threshold_snr: .nan}", "detection: threshold_snr: Input should be"),
        ("detection: {max_sources: 1.5}", "detection: max_sources: Input should be a valid integer"),
        ("association: {radius_arcsec: 50}", "association: radius_arcsec: Input should be less than or equal to 5"),
        ("cutouts: {content: thin}", "cutouts: content: Input should be 'complete' or 'strict' (got 'thin')"),
        ("packaging: {schema_version: '12'}", "packaging: schema_version: String should match pattern"),
        ("packaging: {schema_version: 11.0}", "packaging: schema_version: Input should be a valid string (got 11.0)"),
        ("packaging: {delivery_deadline_s: .inf}", "delivery_deadline_s: Input should be less than or equal to 3600"),
        ("subtraction: {min_star_snr: 3000}", "min_star_snr 3000.0 must lie below max_star_snr 2000.0"),
    ],
)
def test_a_wrong_setting_is_named_with_file_key_and_what_is_allowed(tmp_path: Path, text: str, reason: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_production_config(path)
    assert str(caught.value).startswith(str(path)) and reason in str(caught.value)


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\xfd")
    for path in (tmp_path / "mine.yaml", tmp_path, tmp_path / "nowhere.yaml"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            load_production_config(path)


# --- brokers.yaml -----------------------------------------------------------------------------------


def test_the_shipped_brokers_share_topics_and_have_their_streams() -> None:
    brokers = load_brokers(None)
    filters, problems = load_checked_filters(None)
    assert problems == () and len(brokers) > 3
    check_broker_streams(brokers, filters, "shipped")
    assert brokers_with_streams(brokers, filters) == brokers
    assert (
        len({broker.topic for broker in brokers if broker.encoding == "rubin" and broker.stream == "full"} - {None})
        == 1
    )


def test_no_brokers_are_allowed(tmp_path: Path) -> None:
    for text in ("", "brokers:\n", "brokers: []\n"):
        assert load_brokers(_file(tmp_path, text)) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("broker: []", "unknown key 'broker', expected one of brokers"),
        ("brokers: 3", "brokers must be a list, got int"),
        ("brokers: {name: a}", "brokers must be a list, got dict"),
        ("brokers: [3]", "brokers[0]: expected keys and values, got int"),
        ("brokers: [{}]", "brokers[0]: name: Field required"),
        ("brokers: [{name: A, topic: t}]", "brokers[0]: name: String should match pattern"),
        ("brokers: [{name: ../x, topic: t}]", "brokers[0]: name: String should match pattern"),
        ("brokers: [{name: a, topic: t, encodng: ocf}]", "brokers[0]: unknown key 'encodng', expected one of encoding"),
        (
            "brokers: [{name: a, topic: t, encoding: xml}]",
            "brokers[0]: encoding: Input should be 'rubin', 'ocf', 'fink'",
        ),
        ("brokers: [{name: a, topic: t, sink: mail}]", "brokers[0]: sink: Input should be 'kafka' or 'files'"),
        ("brokers: [{name: a, topic: 'a b'}]", "brokers[0]: topic: String should match pattern"),
        ("brokers: [{name: a, stream: Full}]", "brokers[0]: stream: String should match pattern"),
        ("brokers: [{name: a}]", "broker a: a full stream to Kafka needs a topic"),
        (
            "brokers: [{name: a, topic: t, limits: {bytes: 3}}]",
            "limits: unknown key 'bytes', expected one of bytes_per",
        ),
        ("brokers: [{name: a, topic: t, limits: 3}]", "brokers[0]: limits: expected keys and values, got int"),
        (
            "brokers: [{name: a, topic: t, limits: {bytes_per_second: 0}}]",
            "limits.bytes_per_second: Input should be gr",
        ),
        ("brokers: [{name: a, topic: t}, {name: a, topic: u}]", "broker a is listed twice"),
        ("brokers: [{name: a, topic: t}, {name: b, topic: t, encoding: ocf}]", "a topic holds one stream in one encod"),
        ("brokers: [{name: a, topic: t}, {name: b, topic: t, stream: o.f}]", "a topic holds one stream in one encod"),
    ],
)
def test_a_wrong_broker_is_named_with_file_place_and_what_is_allowed(tmp_path: Path, text: str, reason: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_brokers(path)
    assert str(caught.value).startswith(str(path)) and reason in str(caught.value)


def test_a_broker_may_only_want_a_stream_there_is(tmp_path: Path) -> None:
    brokers = load_brokers(_file(tmp_path, "brokers: [{name: a, topic: t}, {name: b, stream: nobody.nothing}]"))
    filters, _ = load_checked_filters(None)
    with pytest.raises(ConfigurationError) as caught:
        check_broker_streams(brokers, filters, "mine.yaml")
    assert "mine.yaml: broker b wants stream 'nobody.nothing', expected one of demo.bright-new" in str(caught.value)
    assert [broker.name for broker in brokers_with_streams(brokers, filters)] == ["a"]


# --- filters ----------------------------------------------------------------------------------------


def test_filters_that_cannot_run_are_told_apart_from_those_that_can(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("{name: a, owner: o, where: diaSource.snr > 5}")
    (tmp_path / "b.yaml").write_text("{name: b, owner: o, where: diaSource.nonsense > 5}")
    (tmp_path / "c.yaml").write_text("[broken")
    (tmp_path / "d.yaml").write_text("{name: d, owner: o, where: diaSource.snr > 5, max_per_visit: 21}")
    filters, problems = load_checked_filters(tmp_path)
    assert [one.definition.full_name for one in filters] == ["o.a"]
    assert len(problems) == 3
    assert {problem.file for problem in problems} >= {"c.yaml", "d.yaml"}
    assert any("nonsense" in problem.reason for problem in problems)
    assert any(problem.key == "max_per_visit" for problem in problems)


def test_a_filter_folder_must_be_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", _file(tmp_path, "")):
        with pytest.raises(ConfigurationError, match=f"--filters {path}: no such folder"):
            load_checked_filters(path)


def test_an_empty_filter_folder_installs_none(tmp_path: Path) -> None:
    assert load_checked_filters(tmp_path) == ((), ())
