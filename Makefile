# make serve   set up if needed, then serve the demo model (MODEL=… PORT=… ARGS="…" for more)
# make test    set up if needed, then run every test
# make check   what CI checks: style, types, import law, generated code
# make test-compose   build the images, start the stack of compose.yaml and disturb it; needs Docker and Compose
# make bench-peers   Relevo and its peers, alternately, on these cores (PEERS=… ROUNDS=… DTYPE=… SHAPE=…)
# make setup   the virtual environment with everything; the others call it

MODEL ?=
PORT  ?= 8000
ARGS  ?=
# Workers of the test run. Two cores are enough; a test that times something runs alone in any case.
JOBS  ?= 2

# What bench-peers compares, how often, and with which weights. RELEVO="…": more options for our own side.
PEERS  ?= vllm,openvino
ROUNDS ?= 3
DTYPE  ?= float32
SHAPE  ?= bench/shapes/qwen2.5-0.5b
RELEVO ?=

PYTHON := .venv/bin/python

.PHONY: setup serve test test-compose check bench-peers protos format clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt scripts/setup.sh
	./scripts/setup.sh

serve: setup
	@.venv/bin/relevo serve $(MODEL) --port $(PORT) $(ARGS)

test: setup
	$(PYTHON) -m pytest -n $(JOBS) --dist loadscope

test-compose: setup
	$(PYTHON) -m pytest tests/compose -m compose -x -s

check: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	./scripts/check_protos.sh
	$(PYTHON) -m pytest tests/test_import_law.py

bench-peers: setup
	$(PYTHON) -m bench.peers.compare --peers="$(PEERS)" --rounds $(ROUNDS) --dtype $(DTYPE) --shape $(SHAPE) --relevo="$(RELEVO)"

protos: setup
	./scripts/protos.sh

format: setup
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
