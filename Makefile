# `make demo` renders a talking portrait, `make test` runs every lesson and test. Neither needs root, Docker or a model hub.
SHELL := /bin/sh
VENV  := .venv
BIN   := $(VENV)/bin
META  := settings.ini setup.py pyproject.toml infra/constraints.txt
NOTEBOOKS := nbs pipelines dashboards
UPGRADE := --upgrade

# The first interpreter that is Python 3.11 to 3.14 and can make virtual environments; override with PYTHON=... Where there is none, uv
# brings one: its environment has no pip, and needs none.
QUALIFIES := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
BROUGHT := 3.12
UV ?= $(shell for u in uv $$HOME/.local/bin/uv "python3 -m uv"; do if $$u --version >/dev/null 2>&1; then echo $$u; break; fi; done)
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$p -c '$(QUALIFIES)' 2>/dev/null; then echo $$p; break; fi; done)

.PHONY: demo test lint check readme third-party constraints faults bench lab clean install dev

demo: $(VENV)/.installed  ## a video from the sample portrait
	$(BIN)/myspinbot demo

test: $(VENV)/.dev  ## all lessons and tests, two at a time
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

lint: $(VENV)/.dev  ## style of the exported package and the tests, layers of the modules
	$(BIN)/ruff check myspinbot tests setup.py
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run

check: $(VENV)/.dev  ## notebooks clean, package in sync, README current: nothing may change
	for d in $(NOTEBOOKS); do $(BIN)/nbdev-clean --fname $$d || exit 1; done
	$(BIN)/nbdev-export
	$(BIN)/python -c 'from myspinbot.dev import build_readme; print(*build_readme() or ["README.md is current"])'
	@changed=$$(git status --porcelain); if [ -n "$$changed" ]; then \
		echo "Not clean after nbdev-clean, nbdev-export and the README build; commit or remove:"; echo "$$changed"; git diff --stat; exit 1; fi

readme: $(VENV)/.dev  ## README.md from nbs/index.ipynb
	$(BIN)/python -c 'from myspinbot.dev import build_readme; print(*build_readme() or ["README.md is current"])'

third-party: $(VENV)/.dev  ## infra/THIRD-PARTY.md: what the default install brings, with licences
	$(BIN)/python -c 'from myspinbot.dev import build_third_party; print(*build_third_party() or ["infra/THIRD-PARTY.md is current"])'

# Every install takes the versions in infra/constraints.txt, names and versions only. A pin that is too old for settings.ini or for another
# pin fails the install; one that is too new fails a test. This target takes the newest versions that settings.ini allows: run it before a
# release and when a fix is wanted, then `make test` and `make third-party`, and commit only what passes.
constraints: $(VENV)/.dev  ## the newest versions that settings.ini allows, for Linux and macOS (UPGRADE= keeps what holds still)
	$(BIN)/uv pip compile --quiet $(UPGRADE) --universal --fork-strategy fewest --no-annotate --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make constraints" --extra dev setup.py -o infra/constraints.txt
	sed -i.bak -E "/; .*(== 'win32'|== 'nt'|== 'emscripten')/d" infra/constraints.txt && rm infra/constraints.txt.bak

faults: $(VENV)/.dev  ## every fault with a list of seeds, then the simulation; a table each (FAULTS="--only Redis --seeds 7")
	$(BIN)/python tests/faults/run.py $(FAULTS)
	$(if $(FAULTS),,FULL=1 $(BIN)/python -m pytest -q --timeout 900 tests/faults/test_races.py tests/faults/test_load.py)
	$(BIN)/python tests/faults/simulate.py $(or $(SIMULATE),--schedules 100000 --processes 2)

bench: $(VENV)/.dev  ## speed and memory, the peers beside; one table (BENCH=flow: only that part)
	$(BIN)/python tests/bench/run.py $(BENCH)

lab: $(VENV)/.installed  ## JupyterLab on this checkout
	$(BIN)/myspinbot lab

clean:  ## remove what was made here, the environment included
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis spin-steps
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(VENV)/bin/python:
	@if [ "$$(uname -sm)" = "Darwin x86_64" ]; then \
		echo "MySpinBot needs a Mac with Apple silicon: there is no wheel of ai-edge-litert for Intel Macs. Use Linux, or a container."; exit 1; fi
	@if [ -n "$(PYTHON)" ]; then echo "$(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv $(VENV); \
	elif [ -n "$(UV)" ]; then \
		echo "No Python 3.11 to 3.14 with venv on the PATH; uv brings $(BROUGHT) into $(VENV)."; \
		$(UV) venv --quiet --python $(BROUGHT) $(VENV) || { \
			echo "uv could not get Python $(BROUGHT). Install one, or say where it is: make demo PYTHON=/path/to/python3"; exit 1; }; \
	else \
		echo "MySpinBot needs Python 3.11, 3.12, 3.13 or 3.14 with venv, and the PATH has none."; \
		if python3 -m pip --version >/dev/null 2>&1; then echo "Run this, then make demo again: python3 -m pip install --user -c infra/constraints.txt uv"; \
		else echo "Install one (Debian, Ubuntu: apt-get install python3 python3-venv), or say where it is: make demo PYTHON=/path/to/python3"; fi; \
		exit 1; fi

# uv installs in seconds what takes pip minutes; where it cannot be had, pip does the same. An environment made by uv has no pip.
define pip_install
	@$(BIN)/uv --version >/dev/null 2>&1 || ! $(BIN)/python -m pip --version >/dev/null 2>&1 \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt uv || true
	@echo "Installing $(1) into $(VENV) ..."
	@uv=$(BIN)/uv; $$uv --version >/dev/null 2>&1 || uv="$(UV)"; \
		$$uv pip install --quiet --python $(BIN)/python -c infra/constraints.txt -b infra/constraints.txt -e '$(1)' \
		|| { echo "uv could not install it; trying pip."; \
			$(BIN)/python -m pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '$(1)'; }
endef

$(VENV)/.installed: $(META) | $(VENV)/bin/python
	$(call pip_install,.)
	@$(BIN)/myspinbot models
	@touch $@

$(VENV)/.dev: $(META) | $(VENV)/bin/python
	$(call pip_install,.[dev])
	@$(BIN)/myspinbot models
	@$(BIN)/python -m bash_kernel.install --sys-prefix >/dev/null 2>&1  # a kernel of another language, for the engine's tests
	@touch $@ $(VENV)/.installed
