# nightstream: `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NIGHTS := nights
KAFKA := 127.0.0.1:9092
CADENCE := 10

.DEFAULT_GOAL := help
.PHONY: help setup night test test-real test-long test-oracles check format bench bench-differencing bench-packets \
  lock clean study-association study-detection study-orbits flink-setup flink-test \
  kafka-up flink-up cluster-down live cluster-test crash-test crash-test-long

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.warm ## make .venv from the lock file and compile the kernels

$(VENV)/.installed: requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# The first run compiles the numba kernels into the caches beside the sources.
$(VENV)/.warm: $(VENV)/.installed
	rm -rf $(NIGHTS)/.warm-up
	$(BIN)/nightstream simulate --preset tiny --out $(NIGHTS)/.warm-up/night --quiet
	$(BIN)/nightstream produce $(NIGHTS)/.warm-up/night --out $(NIGHTS)/.warm-up/out --quiet
	rm -rf $(NIGHTS)/.warm-up
	touch $@

night: setup ## the main job: simulate a small night, produce and deliver its alerts
	rm -rf $(NIGHTS)/demo $(NIGHTS)/demo-out
	$(BIN)/nightstream simulate --preset demo --out $(NIGHTS)/demo
	$(BIN)/nightstream produce $(NIGHTS)/demo --out $(NIGHTS)/demo-out --kafka embedded

test: setup ## run the tests
	$(BIN)/python -m pytest

test-real: setup ## run the long tests on whole sets of precursor data
	$(BIN)/python -m pytest -m real_data

test-long: setup ## run the properties over hundreds of seeds
	$(BIN)/python -m pytest -m long

test-oracles: setup ## run the tests that compare with other libraries, which this adds to .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-oracles.txt
	$(BIN)/python -m pytest $(wildcard tests/*/test_*_oracle.py)

check: setup ## lint, formatting, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## format the sources and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## seconds per stage and detector, alerts per second
	$(BIN)/python tests/benchmarks/bench_chain.py

bench-differencing: setup ## differencing on simulated pairs; HOTPANTS=path runs that beside it
	$(BIN)/python tests/benchmarks/bench_differencing.py --seeds 8 $(if $(HOTPANTS),--hotpants $(HOTPANTS))

bench-packets: setup ## encoding, cutouts, producing and reading of packets beside LSST's and astropy's
	$(BIN)/python tests/benchmarks/bench_packets.py

study-detection: setup ## completeness, biases, errors and pulls of detection on simulated pairs
	$(BIN)/python tests/benchmarks/study_detection.py --seeds 8

study-orbits: setup ## errors of orbits with days from their epoch, and matches in fields of known objects
	$(BIN)/python tests/benchmarks/study_orbits.py

study-association: setup ## association and object statistics against what surveys published
	$(BIN)/python tests/benchmarks/study_association.py

flink-setup: $(VENV)/.installed ## fetch and assemble what --runner flink needs (Maven, Java 17)
	$(BIN)/python -m runners.flink_setup

flink-test: setup flink-setup ## the same graph on an embedded Flink, byte for byte
	$(BIN)/python -m pytest tests/flows/test_flink.py

kafka-up: setup ## start a real Kafka broker on this machine, fetched at first (Maven, Java 17)
	$(BIN)/nightstream cluster up kafka

flink-up: setup ## start a Flink cluster on this machine, one slot per core, fetched at first (Maven, Java 17)
	$(BIN)/nightstream cluster up flink

cluster-down: $(VENV)/.installed ## end both, and what was left of them
	$(BIN)/nightstream cluster down

# Each run has a topic of announcements and an output folder of its own. However it ends, the job ends with it.
live: setup ## a night as it happens on Kafka and Flink, a visit every CADENCE=10 seconds; 4 minutes
	$(BIN)/nightstream cluster up
	$(BIN)/nightstream simulate --preset live --out $(NIGHTS)/live/night --quiet
	@run=$$(date -u +%Y%m%dT%H%M%S); out=$(NIGHTS)/live/$$run; night=$(NIGHTS)/live/night; telescope=; \
	trap 'exit 130' INT TERM; \
	trap '[ -z "$$telescope" ] || kill $$telescope 2>/dev/null; \
	  [ ! -e $$out/.flink.json ] || { $(BIN)/nightstream flink cancel $$out; $(BIN)/nightstream flink close $$out; }' EXIT; \
	$(BIN)/nightstream flink submit --bootstrap $(KAFKA) --kafka $(KAFKA) --topic visits-$$run \
	  --known-objects $$night --out $$out || exit 1; \
	$(BIN)/nightstream announce $$night --bootstrap $(KAFKA) --topic visits-$$run --cadence $(CADENCE) --quiet & \
	telescope=$$!; \
	$(BIN)/nightstream flink watch $$out --visits $$(wc -l < $$night/visits.jsonl) --patience 180

cluster-test: setup ## the tests on a Kafka broker and a Flink cluster of their own; about 4 minutes
	$(BIN)/python -m pytest -m cluster

crash-test: setup flink-setup ## 54 kills in a live night: nothing lost, nothing contradicted; half an hour
	rm -rf $(NIGHTS)/crash-test
	$(BIN)/python tests/campaigns/crash_campaign.py --kills 54 --folder $(NIGHTS)/crash-test

crash-test-long: setup flink-setup ## the same with 204 kills; 1.5 to 2 hours
	rm -rf $(NIGHTS)/crash-test
	$(BIN)/python tests/campaigns/crash_campaign.py --kills 204 --folder $(NIGHTS)/crash-test

lock: $(VENV)/.installed ## write requirements.txt and requirements-dev.txt anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --no-emit-index-url --no-annotate --no-header --python-version 3.11 \
	  pyproject.toml -o requirements.txt
	$(BIN)/uv pip compile --quiet --no-emit-index-url --no-annotate --no-header --python-version 3.11 \
	  -c requirements.txt pyproject.toml requirements-dev.in -o requirements-dev.txt

clean: ## remove the environment and everything produced
	rm -rf $(VENV) $(NIGHTS) build *.egg-info
