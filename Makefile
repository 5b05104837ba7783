# Needs Python 3.11 with venv, and nothing else installed.
#
#   make env ENGINE=NAME        build that environment if need be (ENGINES below); the last line is its interpreter
#   make test [SESSIONS=...]    lint, types, core, wheel, kernels, ray, transformers, vllm, vllm_v2, sglang, or those
#                               named; stops at the first failure
#   make bench [ARGS=...]       benchmark the vLLM integration into bench-results/latest.json
#   make never-slower           what the policy decides in vLLM, SGLang and, over a rate-limited link (needs root, iproute2),
#                               in Transformers, and what that does; figures into bench-results/
#   make clean                  delete environments, caches and build output

PYTHON ?= python3
ENGINES := core kernels ray transformers vllm sglang
NOX_VERSION := 2026.10.20

# No "Leaving directory" after the line that `make env` ends with.
MAKEFLAGS += --no-print-directory
ENVS := $(CURDIR)/.nox
NOX := $(ENVS)/bootstrap/bin/python -m nox
BOOTSTRAP := $(ENVS)/bootstrap/nox-$(NOX_VERSION)

.PHONY: help env test bench never-slower clean

help:
	@sed -n 's/^#  //p' Makefile

env:
	@case " $(ENGINES) " in *" $(or $(strip $(ENGINE)),?) "*) ;; \
	*) echo "error: ENGINE='$(ENGINE)' is not known; valid: $(ENGINES)" >&2; exit 2 ;; esac
	@$(MAKE) $(BOOTSTRAP) >&2
	@$(NOX) --session $(ENGINE) --install-only >&2
	@echo "$(ENVS)/$(ENGINE)/bin/python"

test: $(BOOTSTRAP)
	$(NOX) $(if $(strip $(SESSIONS)),--session $(SESSIONS))

bench:
	@$(MAKE) env ENGINE=vllm
	@mkdir -p bench-results
	PATH="$(ENVS)/vllm/bin:$$PATH" dynaflow bench vllm --json bench-results/latest.json $(ARGS)

never-slower:
	@for system in vllm sglang transformers; do $(MAKE) env ENGINE=$$system; done
	@for system in vllm sglang transformers; do PATH="$(ENVS)/$$system/bin:$$PATH" \
	$(ENVS)/$$system/bin/python benchmarks/never_slower.py $$system --folder bench-results || failed=1; done; exit $${failed:-0}

clean:
	rm -rf .nox .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	rm -rf requirements/vllm_metadata/build requirements/vllm_metadata/*.egg-info tests/sglang/cpu_support/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BOOTSTRAP):
	rm -rf $(ENVS)/bootstrap
	$(PYTHON) -m venv $(ENVS)/bootstrap
	$(ENVS)/bootstrap/bin/python -m pip install --quiet --disable-pip-version-check nox==$(NOX_VERSION)
	@touch $@
