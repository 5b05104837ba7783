# Needs Python 3.11 with venv, and nothing else installed.
#
#   make env ENGINE=NAME        build that environment if need be (ENGINES below); the last line is its interpreter
#   make test [SESSIONS=...]    lint, docs, types, core, operators, kernels, wheel, transformers, megatron, xdit,
#                               fastvideo, vllm, vllm_v2, sglang, or those named; stops at the first failure. LONG=1
#                               adds the tests that take minutes
#   make docs                   the documentation as a site, in site/index.html
#   make bench [ARGS=...]       benchmark the vLLM integration into bench-results/latest.json and .html: on two emulated
#                               nodes and on one; where network namespaces are not allowed, on one
#   make never-slower           what the policy decides in vLLM, SGLang and, over an emulated link, in Transformers, and
#                               what that does; figures into bench-results/
#   make clean                  delete environments, caches and build output

PYTHON ?= python3
ENGINES := core transformers megatron xdit vllm sglang
NOX_VERSION := 2026.10.20

# No "Leaving directory" after the line that `make env` ends with.
MAKEFLAGS += --no-print-directory
# Environments are installed without compiled modules: Python compiles what it imports, and is to keep it.
export PYTHONDONTWRITEBYTECODE :=
ENVS := $(CURDIR)/.nox
SHORT := --no-sequential --requests 16 --output-len 4
TRAFFIC := --requests 256 --input-len 128 --output-len 32
NOX := $(ENVS)/bootstrap/bin/python -m nox
BOOTSTRAP := $(ENVS)/bootstrap/nox-$(NOX_VERSION)

.PHONY: help env test docs bench never-slower clean

help:
	@sed -n 's/^#  //p' Makefile

env:
	@case " $(ENGINES) " in *" $(or $(strip $(ENGINE)),?) "*) ;; \
	*) echo "error: ENGINE='$(ENGINE)' is not known; valid: $(ENGINES)" >&2; exit 2 ;; esac
	@$(MAKE) $(BOOTSTRAP) >&2
	@$(NOX) --session $(ENGINE) --install-only >&2
	@echo "$(ENVS)/$(ENGINE)/bin/python"

# pip takes one core: two environments are installed side by side.
test: $(BOOTSTRAP)
	$(if $(strip $(SESSIONS)),,@$(MAKE) -j 2 $(ENGINES:%=install-%))
	$(NOX) $(if $(strip $(SESSIONS)),--session $(SESSIONS))

install-%: $(BOOTSTRAP)
	@$(NOX) --session $* --install-only

docs: $(BOOTSTRAP)
	$(NOX) --session docs

bench:
	@$(MAKE) env ENGINE=vllm
	@NODES=; unshare -rn true 2>/dev/null && command -v tc nstat >/dev/null && NODES="--link 300 --one-node" || \
	echo "Two emulated nodes need network namespaces and iproute2, which are not here: this machine alone is measured."; \
	set -x; $(ENVS)/vllm/bin/dynaflow bench vllm $$NODES $(SHORT) --strategy auto --option budget_seconds=45 \
	--strategy comm_overlap --json bench-results/latest.json --html bench-results/latest.html $(ARGS)

never-slower:
	@for system in vllm sglang transformers; do $(MAKE) env ENGINE=$$system; done
	@for system in "vllm $(TRAFFIC)" "sglang $(TRAFFIC)" "transformers --link 200 --link 0 --strategy comm_overlap --requests 12 --input-len 64 \
	--pairs 12 --starts 1"; do set -- $$system; echo "dynaflow bench $$system --strategy auto"; \
	$(ENVS)/$$1/bin/dynaflow bench --starts 3 --pairs 5 --json bench-results/never_slower_$$1.json --strategy auto "$$@" \
	|| failed=1; done; exit $${failed:-0}

clean:
	rm -rf .nox .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site *.egg-info
	rm -rf requirements/vllm_metadata/build requirements/vllm_metadata/*.egg-info tests/sglang/cpu_support/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BOOTSTRAP):
	rm -rf $(ENVS)/bootstrap
	$(PYTHON) -m venv $(ENVS)/bootstrap
	$(ENVS)/bootstrap/bin/python -m pip install --quiet --disable-pip-version-check nox==$(NOX_VERSION)
	@touch $@
