"""Configuration from YAML files, checked once; every error names file, key and what is allowed."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from pipelines.alert_production import AlertProductionConfig
from runners.access.settings import KafkaAccess
from transforms.distribution import FULL_STREAM, BrokerConfig, full_streams
from transforms.filters.checking import CheckedFilter, FilterError, check_filter
from transforms.filters.definition import FilterProblem, load_filters


class ConfigurationError(ValueError):
    """A configuration that cannot be used; the message names file, key and allowed values."""


def load_production_config(path: Path | None, asked: Mapping[str, Mapping[str, Any]] = {}) -> AlertProductionConfig:
    """The shipped `alert_production.yaml`, what the input asks for laid over it, and `path` over both."""
    shipped, name = _shipped("alert_production.yaml")
    values = _mapping(yaml.safe_load(shipped), name)
    for block, keys in asked.items():
        values[block] = {**values[block], **keys}
    if path is not None:
        name = str(path)
        for block, keys in _mapping(_read_yaml(path), name).items():
            _refuse_unknown_keys({block: keys}, tuple(values), name)
            values[block] = {**values[block], **_mapping(keys, f"{name}: {block}")}
    blocks = {}
    for field in dataclasses.fields(AlertProductionConfig):
        kind = _field_type(field)
        blocks[field.name] = _validated(kind, values.get(field.name, {}), f"{name}: {field.name}")
    return AlertProductionConfig(**blocks)


def load_brokers(path: Path | None) -> tuple[BrokerConfig, ...]:
    """The brokers of `path`, or the shipped ones."""
    listed, name = _brokers_file(path)
    entries = listed.get("brokers") or []
    if not isinstance(entries, list):
        raise ConfigurationError(f"{name}: brokers must be a list, got {type(entries).__name__}")
    brokers = tuple(_validated(BrokerConfig, entry, f"{name}: brokers[{index}]") for index, entry in enumerate(entries))
    names = [broker.name for broker in brokers]
    repeated = sorted({one for one in names if names.count(one) > 1})
    if repeated:
        raise ConfigurationError(f"{name}: broker {repeated[0]} is listed twice")
    try:
        full_streams(brokers)
    except ValueError as error:
        raise ConfigurationError(f"{name}: {error}") from error
    return brokers


def load_kafka_access(path: Path | None) -> KafkaAccess:
    """The block `kafka` of the same file."""
    listed, name = _brokers_file(path)
    return _validated(KafkaAccess, listed.get("kafka"), f"{name}: kafka")


def _brokers_file(path: Path | None) -> tuple[dict[str, Any], str]:
    if path is None:
        text, name = _shipped("brokers.yaml")
        content = yaml.safe_load(text)
    else:
        content, name = _read_yaml(path), str(path)
    listed = _mapping(content, name)
    _refuse_unknown_keys(listed, ("brokers", "kafka"), name)
    return listed, name


def load_checked_filters(folder: Path | None) -> tuple[tuple[CheckedFilter, ...], tuple[FilterProblem, ...]]:
    """The filters of `folder` (or the shipped examples) that may run, and what is wrong with the rest."""
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(f"--filters {folder}: no such folder")
    if folder is None:
        with resources.as_file(resources.files("runners.config") / "filters") as shipped:
            definitions, problems = load_filters(shipped)
    else:
        definitions, problems = load_filters(folder)
    checked = []
    for definition in definitions:
        try:
            checked.append(check_filter(definition))
        except FilterError as error:
            problems.append(FilterProblem(definition.full_name, error.key, error.reason))
    return tuple(checked), tuple(problems)


def brokers_with_streams(
    brokers: tuple[BrokerConfig, ...], filters: tuple[CheckedFilter, ...]
) -> tuple[BrokerConfig, ...]:
    """The brokers whose stream there is."""
    known = _streams(filters)
    return tuple(broker for broker in brokers if broker.stream in known)


def _streams(filters: tuple[CheckedFilter, ...]) -> set[str]:
    return {FULL_STREAM, *(one.definition.full_name for one in filters)}


def check_broker_streams(brokers: tuple[BrokerConfig, ...], filters: tuple[CheckedFilter, ...], name: str) -> None:
    """ConfigurationError where a broker asks for a filtered stream that no installed filter makes."""
    known = _streams(filters)
    for broker in brokers:
        if broker.stream not in known:
            raise ConfigurationError(
                f"{name}: broker {broker.name} wants stream {broker.stream!r}, "
                f"expected one of {', '.join(sorted(known))}"
            )


def _validated(kind: type, values: Any, where: str) -> Any:
    mapping = _mapping(values, where)
    _refuse_unknown_fields(kind, mapping, where)
    try:
        return TypeAdapter(kind).validate_python(mapping)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "value"
        raise ConfigurationError(f"{where}: {key}: {first['msg']} (got {first['input']!r})") from error


def _refuse_unknown_fields(kind: type, mapping: dict[str, Any], where: str) -> None:
    """Unknown keys here and in the blocks within: pydantic passes over them, or does not say which are known."""
    types = typing.get_type_hints(kind)
    _refuse_unknown_keys(mapping, tuple(field.name for field in dataclasses.fields(kind)), where)
    for name, value in mapping.items():
        if dataclasses.is_dataclass(types[name]):
            _refuse_unknown_fields(types[name], _mapping(value, f"{where}: {name}"), f"{where}: {name}")


def _refuse_unknown_keys(mapping: dict[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in mapping:
        if key not in allowed:
            raise ConfigurationError(f"{where}: unknown key {key!r}, expected one of {', '.join(sorted(allowed))}")


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigurationError(f"{where}: expected keys and values, got {type(content).__name__}")
    return content


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path}: cannot be read: {error}") from error


def _shipped(name: str) -> tuple[str, str]:
    return (resources.files("runners.config") / name).read_text(encoding="utf-8"), f"shipped {name}"


def _field_type(field: dataclasses.Field[Any]) -> type:
    factory = field.default_factory
    if not isinstance(factory, type):
        raise TypeError(f"{field.name} has no class as default factory")
    return factory
