# Every target sets up what it needs, and repeats nothing that is done already.
PYTHON ?= python3
VENV := .venv
UV := $(VENV)/uv/bin/uv
BIN := $(VENV)/bin
export UV_COMPILE_BYTECODE := 1
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint chaos bench peers up down env lock schema clean help browser queue

help:            ## this list
	@grep -E '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/installed $(VENV)/local-installed    ## upload a sample to a local S3; see it come out as a dataset and a report
	$(BIN)/python -m local.demo

test: $(VENV)/installed $(VENV)/local-installed $(VENV)/llm-batch-installed $(VENV)/lineage-installed browser queue    ## every test; starts what it needs itself
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed    ## ruff, and mypy --strict on the core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: $(VENV)/installed $(VENV)/local-installed   ## kill everything everywhere and let the provider's bill judge (some twenty minutes; CHAOS="--sample 4" a quarter of it)
	$(BIN)/python -m bench.chaos $(CHAOS)

bench: $(VENV)/installed    ## what every step costs, against the machine's limits and the usual ways (some twenty minutes; BENCH="--rows 100000 --rounds 1" some minutes)
	$(BIN)/python -m bench $(BENCH)

peers: $(VENV)/peers-installed    ## curator, which `make bench` then measures beside us, in an environment of its own (600 MB)

up: $(VENV)/installed $(VENV)/local-installed      ## the local stack with the Airflow UI, left running
	$(BIN)/python -m local.stack up

down:            ## stop the local stack
	$(BIN)/python -m local.stack down

env:             ## what to export so that the nightshift command talks to the local stack
	@$(BIN)/python -m local.stack env

lock: $(UV)      ## resolve pyproject.toml into requirements.txt again
	$(UV) pip compile -q --universal --extra airflow --extra rehearsal --extra dev --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" pyproject.toml -o requirements.txt
	$(UV) pip compile -q --universal --extra airflow --extra rehearsal --constraint requirements.txt --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" pyproject.toml -o docker/requirements.txt
	$(UV) pip compile -q --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" local/requirements.in -o local/requirements.txt
	$(UV) pip compile -q --universal --no-deps --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" local/llm-batch.in -o local/llm-batch.txt
	$(UV) pip compile -q --universal --no-deps --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" local/lineage.in -o local/lineage.txt
	$(UV) pip compile -q --universal --generate-hashes --no-emit-index-url --python-version 3.11 --custom-compile-command "make lock" bench/peers.in -o bench/peers.txt

schema: $(VENV)/installed    ## write the JSON Schema and the page of job files again
	$(BIN)/nightshift schema > docs/job.schema.json
	$(BIN)/nightshift schema --markdown > docs/jobs.md

clean: down      ## stop the stack and forget everything local
	rm -rf $(VENV) .nightshift

$(UV):
	$(PYTHON) -m venv $(VENV)/uv
	$(VENV)/uv/bin/pip install -q "uv>=0.9"

$(VENV)/installed: requirements.txt pyproject.toml | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip sync -q --python $(BIN)/python --require-hashes requirements.txt
	$(UV) pip install -q --python $(BIN)/python --no-deps --editable .
	touch $@

# The emulator pins its own botocore, so it gets an environment of its own.
$(VENV)/local-installed: local/requirements.txt | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) $(VENV)/local
	$(UV) pip sync -q --python $(VENV)/local/bin/python --require-hashes local/requirements.txt
	touch $@

# What the peers of the benchmark pin excludes ours.
$(VENV)/peers-installed: bench/peers.txt | $(UV)
	$(UV) venv -q --allow-existing --python $(PYTHON) $(VENV)/peers
	$(UV) pip sync -q --python $(VENV)/peers/bin/python --require-hashes bench/peers.txt
	touch $@

# Airflow's own @task.llm_batch, for the tests of our adapter: in a folder beside the environment, not in it.
$(VENV)/llm-batch-installed: local/llm-batch.txt $(VENV)/installed | $(UV)
	$(UV) pip install -q --python $(BIN)/python --target $(VENV)/llm-batch --no-deps --require-hashes -r local/llm-batch.txt
	touch $@

# OpenLineage's provider, for the test of our lineage: beside the environment, too.
$(VENV)/lineage-installed: local/lineage.txt $(VENV)/installed | $(UV)
	$(UV) pip install -q --python $(BIN)/python --target $(VENV)/lineage --no-deps --require-hashes -r local/lineage.txt
	touch $@

# The tests of queued workers want a Redis, on the same terms.
queue:
	@command -v redis-server >/dev/null || \
	  (command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq redis-server) || true

# The UI's tests want a Chromium. Where there is none and Debian's can be installed, it is; else those tests are skipped and say so.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  (command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium) || true
