"""What a filter author writes, and reading a folder of it.

A definition says nothing yet about whether its SQL is sound: that is `transforms.filters.checking`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import ConfigDict, Field

MAX_PER_VISIT = 20  # DMS-REQ-0343: 20 full alerts per user and visit
MAX_SQL_CHARACTERS = 10_000
MAX_FILE_BYTES = 100_000
DEFAULT_RANK = "diaSource.snr DESC"

_Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
_Sql = Annotated[str, Field(max_length=MAX_SQL_CHARACTERS)]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class FilterDefinition:
    """One filter as its author wrote it.

    Parameters
    ----------
    name, owner : str
        Lower-case letters, digits and hyphens, 1 to 40 characters; together unique.
    where : str
        A boolean SQL expression on one alert; the alert passes where it is true (not null).
    select : str
        Comma-separated SQL expressions that go out with a passed alert; may be empty.
    rank_by : str
        Comma-separated ranking keys, each with an optional ASC (default) or DESC.
    max_per_visit : int
        How many alerts at most pass per visit, 1 to 20.
    description : str
        For people.

    Raises
    ------
    pydantic.ValidationError
        A value of a wrong type, pattern or length, or an unknown key.
    """

    name: _Name
    owner: _Name
    where: Annotated[_Sql, Field(min_length=1)]
    select: _Sql = ""
    rank_by: Annotated[_Sql, Field(min_length=1)] = DEFAULT_RANK
    max_per_visit: Annotated[int, Field(ge=1, le=MAX_PER_VISIT)] = MAX_PER_VISIT
    description: Annotated[str, Field(max_length=2_000)] = ""

    @property
    def full_name(self) -> str:
        """`<owner>.<name>`: the name of its outputs."""
        return f"{self.owner}.{self.name}"


class FilterError(ValueError):
    """A filter that may not or cannot run. `filter` is its full name, `key` the part at fault, `reason` why."""

    def __init__(self, filter: str, key: str, reason: str) -> None:
        super().__init__(filter, key, reason)
        self.filter = filter
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"filter {self.filter}, {self.key}: {self.reason}"


@dataclass(frozen=True)
class FilterProblem:
    """Why a file holds no usable filter: the file's name, the key at fault (or None) and the reason."""

    file: str
    key: str | None
    reason: str


def load_filters(folder: Path) -> tuple[list[FilterDefinition], list[FilterProblem]]:
    """Read every `*.yaml` of a folder, one filter a file, in order of file names.

    Parameters
    ----------
    folder : Path
        A missing folder is one problem; an empty one is none.

    Returns
    -------
    definitions : list of FilterDefinition
        At most one per `owner.name`; the first file in name order stands.
    problems : list of FilterProblem
        One for every fault found; a file with a fault gives no definition.
    """
    if not folder.is_dir():
        return [], [FilterProblem(str(folder), None, "no such folder")]
    problems: list[FilterProblem] = []
    origin: dict[str, str] = {}
    definitions: list[FilterDefinition] = []
    for path in sorted(folder.glob("*.yaml"), key=lambda path: path.name):
        definition, found = _read_definition(path)
        problems.extend(found)
        if definition is None:
            continue
        first = origin.setdefault(definition.full_name, path.name)
        if first == path.name:
            definitions.append(definition)
        else:
            reason = f"filter {definition.full_name} is already defined in {first}"
            problems.append(FilterProblem(path.name, "name", reason))
    return definitions, problems


def _read_definition(path: Path) -> tuple[FilterDefinition | None, list[FilterProblem]]:
    def one(reason: str) -> tuple[None, list[FilterProblem]]:
        return None, [FilterProblem(path.name, None, reason)]

    try:
        raw = path.read_bytes()
        if len(raw) > MAX_FILE_BYTES:
            return one(f"{len(raw)} bytes, more than the {MAX_FILE_BYTES} allowed")
        content = yaml.load(raw.decode("utf-8"), Loader=_UniqueKeyLoader)  # a SafeLoader
    except OSError as error:
        return one(f"cannot be read: {error}")
    except UnicodeDecodeError as error:
        return one(f"not UTF-8 text: {error}")
    except (yaml.YAMLError, RecursionError) as error:
        return one(f"not YAML: {error}")
    if not isinstance(content, dict):
        return one(f"expected keys and values, got {type(content).__name__}")
    return _check_keys(path.name, content)


def _check_keys(file: str, content: dict[Any, Any]) -> tuple[FilterDefinition | None, list[FilterProblem]]:
    allowed = [field.name for field in fields(FilterDefinition)]
    unknown = [key for key in content if key not in allowed]
    problems = [
        FilterProblem(file, str(key), f"unknown key; allowed are {', '.join(allowed)}")
        for key in sorted(unknown, key=str)
    ]
    known = {key: value for key, value in content.items() if key in allowed}
    try:
        definition = FilterDefinition(**known)
    except pydantic.ValidationError as error:
        problems.extend(FilterProblem(file, str(item["loc"][0]), _reason(item)) for item in error.errors())
        return None, problems
    return (None, problems) if problems else (definition, problems)


def _reason(item: Any) -> str:
    if item["type"].startswith("missing"):
        return "this key is missing"
    if item["type"] == "string_pattern_mismatch":
        return f"use 1 to 40 lower-case letters, digits and hyphens, starting with no hyphen; got {item['input']!r}"
    value = repr(item["input"])
    return f"{item['msg']}; got {value if len(value) <= 60 else value[:57] + '...'}"


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; an author would test the one and run the other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)
