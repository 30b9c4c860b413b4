# Every target sets up .venv by itself, once: it is set up again only when what it was made from changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: compiling all that is installed took over a minute.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
TORCH := $(shell sed -n 's/^\(torch==[^;]*\).*/\1/p' constraints.txt)
# Without an NVIDIA driver, torch's CPU build is enough and gigabytes smaller. Where that index is out of reach, pip goes on
# with the ones it knows.
TORCH_INDEX := $(if $(shell command -v nvidia-smi 2>/dev/null),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20)
INSTALLED_FROM := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)
OUTPUT ?= out/demo
COVERAGE_FLOOR := 90
ARGS ?=

# OpenMP threads that spin while they wait slow each other down as soon as anything else runs: on two busy cores 3,000
# small products took 19 s with spinning and 2.6 s without; the demo beside one other job 5 min 38 s and 1 min 12 s.
run serve test demo-models: export OMP_WAIT_POLICY ?= PASSIVE
# As many test processes as cores: threads in what they start would only be in each other's way (645 s became 437 s, together
# with each module's tests staying on one process, which then makes what they share once).
test: export OMP_NUM_THREADS ?= 1

.PHONY: help run serve test install install-dev lint format typecheck demo-models bench bench-kernels bench-gemm bench-decode bench-safety clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

run: $(VENV)/.installed ## realign the shipped demo model into out/demo and print the proof (ARGS adds flags)
	$(BIN)/python -m qrealign.run --output $(OUTPUT) $(ARGS)

serve: $(VENV)/.installed-serve ## serve the demo's out/demo/model, made first if it is missing (ARGS adds flags)
	@test -f $(OUTPUT)/model/config.json || $(BIN)/python -m qrealign.run --output $(OUTPUT)
	$(BIN)/python -m qrealign.serve $(OUTPUT)/model $(ARGS)

test: $(VENV)/.installed-dev ## run all tests, fail below 90 % coverage (ARGS adds pytest flags)
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term --cov-fail-under=$(COVERAGE_FLOOR) $(ARGS)

install: $(VENV)/.installed ## set up .venv with what qrealign needs
install-dev: $(VENV)/.installed-dev ## ... and what its tests and checks need

lint: $(VENV)/.installed-dev ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## apply style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed-dev ## check types
	$(BIN)/mypy

demo-models: $(VENV)/.installed ## rebuild the shipped demo models from nothing
	$(BIN)/python -m qrealign.demo.build $(ARGS)

bench: $(VENV)/.installed ## whole calibration runs on random 7B weights, into docs/calibration.md (ARGS as in benchmarks/README.md)
	$(BIN)/python -m benchmarks.calibration $(ARGS)

bench-kernels: $(VENV)/.installed-dev ## every calibration kernel on this GPU, into docs/kernels.md
	$(BIN)/python -m benchmarks.kernels --docs docs/kernels.md $(ARGS)

bench-gemm: $(VENV)/.installed-dev ## packed products beside those of other packages on this GPU, into docs/products.md
	$(BIN)/python -m benchmarks.gemm --docs docs/products.md $(ARGS)

bench-decode: $(VENV)/.installed ## whole 7B models, packed against bfloat16, into docs/deploy.md
	$(BIN)/python -m benchmarks.decode --geometry llama-2-7b --docs docs/deploy.md $(ARGS)

bench-safety: $(VENV)/.installed ## every method, scheme and seed, into tables and plots (ARGS as in benchmarks/README.md)
	$(BIN)/python -m benchmarks.safety $(ARGS)

clean: ## remove what was built, but no results
	rm -rf $(VENV) build dist *.egg-info kernels/*.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* htmlcov
	rm -f kernels/qrealign_kernels/_C.*.so kernels/qrealign_kernels/_C_cuda.*.so kernels/qrealign_kernels/_build_note.txt
	find qrealign kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: install Python 3.10 or newer, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is older than 3.10: set PYTHON=..." >&2; exit 1; }
	@echo "Setting up $(VENV): once, a few minutes."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) has no venv: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

$(VENV)/.installed: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) --no-deps $(TORCH_INDEX) $(TORCH)
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-serve: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) --no-deps $(TORCH_INDEX) $(TORCH)
	$(INSTALL) -c constraints.txt -e '.[serve]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed-dev: $(INSTALLED_FROM) | $(BIN)/python
	$(INSTALL) --no-deps $(TORCH_INDEX) $(TORCH)
	$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $(VENV)/.installed-serve $@
