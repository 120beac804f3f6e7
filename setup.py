"""Packaging of nightstream; the explicit package list keeps the four top-level names literal."""

from setuptools import setup

setup(
    packages=[
        "pipelines",
        "transforms",
        "transforms.numerics",
        "transforms.filters",
        "schemas",
        "schemas.avro",
        "runners",
        "runners.access",
        "runners.cluster",
        "runners.config",
        "runners.ingest",
    ],
    package_data={
        "transforms": ["models/*.json"],
        "schemas.avro": ["definitions/*.csv", "definitions/archived/*.csv"],
        "runners": ["templates/*.html", "templates/*.css"],
        "runners.config": ["*.yaml", "filters/*.yaml", "flink/*", "flink/**/*.java", "ingest/*.yaml", "kafka/*"],
    },
)
