"""Logins to Kafka: properties files with a user's name and password, as Kafka's own programs take them.

What travels to workers is the file's path; each reads it where it connects, so no password is in a
pickled graph, on a command line or in a log.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

MECHANISM = "SCRAM-SHA-512"
_JAAS = "sasl.jaas.config"
_SCRAM_MODULE = "org.apache.kafka.common.security.scram.ScramLoginModule"
_KEYS = ("security.protocol", "sasl.mechanism", "sasl.username", "sasl.password", "ssl.ca.location")
# Of a file that serves other programs too: where to connect is said beside it.
_PASSED_OVER = ("bootstrap.servers", "group.id")


class KafkaLoginError(ValueError):
    """A file with a login that cannot be used; the message says which line, and no password."""


def client_settings(bootstrap: str, login: str | None) -> dict[str, Any]:
    """What every client of librdkafka starts from: where, as whom, and nothing on stderr.

    Parameters
    ----------
    bootstrap : "HOST:PORT[,HOST:PORT...]"
    login : path of a properties file, or None where Kafka asks for no login

    Raises
    ------
    KafkaLoginError
        The file cannot be read or used.
    """
    return {"bootstrap.servers": bootstrap, "log_level": 0, **({} if login is None else read_login(Path(login)))}


def read_login(path: Path) -> dict[str, str]:
    """The settings of a properties file in librdkafka's names.

    Keys are `security.protocol`, `sasl.mechanism`, `sasl.username` and `sasl.password`, or instead of these two
    Java's `sasl.jaas.config`, and `ssl.ca.location`.

    Raises
    ------
    KafkaLoginError
        The file cannot be read, or has other keys.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KafkaLoginError(f"login {path} cannot be read: {error}") from error
    values: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text[0] in "#!":
            continue
        key, equals, value = (part.strip() for part in text.partition("="))
        if key == _JAAS and (user := re.search(r'username="([^"]*)"\s+password="([^"]*)"', value)):
            values |= {"sasl.username": user[1], "sasl.password": user[2]}
        elif equals and key in _KEYS:
            values[key] = value
        elif not equals or key not in _PASSED_OVER:
            raise KafkaLoginError(
                f"login {path}, line {number}: {key if equals else 'no key'!r} cannot be used, "
                f"expected {', '.join((*_KEYS, _JAAS))}"
            )
    return values


def java_settings(bootstrap: str, login: Path | None) -> dict[str, str]:
    """The same for Kafka's programs in Java."""
    values = {} if login is None else read_login(login)
    user, password = values.pop("sasl.username", None), values.pop("sasl.password", None)
    authority = values.pop("ssl.ca.location", None)
    if user is not None:
        values[_JAAS] = jaas(user, password or "")
    if authority is not None:
        values |= {"ssl.truststore.type": "PEM", "ssl.truststore.location": authority}
    return {"bootstrap.servers": bootstrap, **values}


def login_text(bootstrap: str, security: dict[str, str], user: str, password: str) -> str:
    """The properties file of a user: usable as it is by librdkafka, with a word on Java."""
    values = {
        "bootstrap.servers": bootstrap,
        **security,
        "sasl.mechanism": MECHANISM,
        "sasl.username": user,
        "sasl.password": password,
    }
    # librdkafka refuses Java's line where it is not a comment.
    lines = [*(f"{key}={value}" for key, value in values.items()), "# Java wants this instead of the two lines above:"]
    return "\n".join([*lines, f"#{_JAAS}={jaas(user, password)}", ""])


def write_secret(path: Path, text: str) -> None:
    """Write a file that nobody but its owner can read; it appears whole or not at all."""
    half = path.with_name(f".{path.name}")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    half.replace(path)


def jaas(user: str, password: str) -> str:
    """The value of `sasl.jaas.config`: how Java is told a user and a password."""
    return f'{_SCRAM_MODULE} required username="{user}" password="{password}";'
