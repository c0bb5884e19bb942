# Everything a developer or an operator types. Needs a POSIX shell, make and Python 3.11 or later.
#
# ARGS goes to the command at the end:  make run ARGS="--port 9000"    make test ARGS="-x -k budgets"
# TESTS narrows the tests:              make test TESTS=tests/store
# PROCESSES is how many run the tests:  make test PROCESSES=0 ARGS=--pdb   (6, with TESTS 0: the one itself)
# PYTHON names the interpreter:         make run PYTHON=/opt/python/bin/python3

CONFIG ?= config.yaml
TESTS ?=
ARGS ?=
PROCESSES ?= $(if $(TESTS),0,6)
PYTHON ?=

VENV := .venv
BIN := $(VENV)/bin/python
PIP := $(BIN) -m pip --disable-pip-version-check --no-input

export CONFIG
MAKEFLAGS += --no-print-directory --no-builtin-rules
.SUFFIXES:
.DEFAULT_GOAL := help
.PHONY: help run test browser check format bench bench-scale chaos lock clean environment environment-dev

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

run: environment ## start the server with config.yaml (CONFIG=..., ARGS=...)
	@exec $(BIN) bot.py run --config "$$CONFIG" $(ARGS)

test: environment-dev ## all tests (TESTS=..., ARGS=..., REQUIRE_SERVICES=1)
	@exec $(BIN) -m pytest -n $(PROCESSES) --dist worksteal $(TESTS) $(ARGS)

browser: ## install Chromium for the browser tests (Debian, Ubuntu; needs root)
	@command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium fonts-noto-cjk; }

check: environment-dev ## format, lint, types
	@failed=0; \
	$(BIN) -m ruff format --check . || failed=1; \
	$(BIN) -m ruff check . || failed=1; \
	$(BIN) -m mypy || failed=1; \
	exit $$failed

format: environment-dev ## format the code and correct what the linter can
	@$(BIN) -m ruff check --quiet --fix-only .
	@$(BIN) -m ruff format .

bench: environment-dev ## measure the figures (ARGS=...)
	@exec $(BIN) -m benchmarks $(ARGS)

bench-scale: environment-dev ## the same with 10 million messages, made once under data/bench (ARGS=...)
	@exec $(BIN) -m benchmarks.scale $(ARGS)

chaos: environment ## ten minutes of accidents, on each database (ARGS=...)
	@exec $(BIN) -m feishu_bot.chaos $(ARGS)

# Names, versions and hashes only: an address or a path of the machine that ran this has no place in them.
COMPILE = CUSTOM_COMPILE_COMMAND='make lock' $(BIN) -m piptools compile --quiet \
	--generate-hashes --allow-unsafe --strip-extras --no-annotate --no-emit-options \
	--no-emit-index-url --no-emit-trusted-host --no-emit-find-links $(ARGS)

lock: environment ## pin the dependencies of pyproject.toml anew (ARGS=--upgrade)
	@$(BIN) -c 'import piptools' 2>/dev/null || $(PIP) install --quiet 'pip-tools>=7.4'
	@$(COMPILE) --output-file requirements.lock pyproject.toml
	@$(COMPILE) --extra dev --extra agents --extra mcp --constraint requirements.lock --output-file requirements-dev.lock pyproject.toml
	@! grep -nE '://|^-|file:|^ *[^ #a-z]' requirements.lock requirements-dev.lock | grep -v -- '--hash=sha256:'

clean: ## remove .venv and caches; data/ stays
	@rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

environment:
	@$(call install,requirements.lock,requirements.lock)

environment-dev:
	@$(call install,requirements-dev.lock,requirements-dev.lock requirements.lock)

# Installs what a lock file pins, once: copies of the lock files in .venv say what it holds. The file for
# development holds all of the other.
define install
	if ! { [ -x $(BIN) ] && cmp -s $(1) $(VENV)/$(1); }; then \
		if ! $(BIN) -m pip --version >/dev/null 2>&1; then \
			$(find_python); \
			"$$python" -m venv --clear $(VENV) || exit 1; \
		fi; \
		echo 'installing $(1) into $(VENV), once' >&2; \
		rm -f $(VENV)/requirements*.lock; \
		$(PIP) install --quiet --require-hashes -r $(1) && cp $(2) $(VENV)/ || exit 1; \
	fi
endef

# Tries each by running it: a name on the PATH may be an empty shim, or lack the module that makes pip.
define find_python
	python=; found=; \
	for candidate in "$(PYTHON)" python3.13 python3.12 python3.11 python3 python; do \
		[ -n "$$candidate" ] || continue; \
		version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
		if ! "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
			found="$$found $$candidate is $$version;"; \
		elif ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then \
			found="$$found $$candidate ($$version) lacks the venv module (Debian: apt install python$$version-venv);"; \
		else \
			python=$$candidate; break; \
		fi; \
		[ "$$candidate" != "$(PYTHON)" ] || break; \
	done; \
	if [ -z "$$python" ]; then \
		echo "error: Python 3.11 or later with venv is needed;$${found:- none was found;} PYTHON=... names another" >&2; \
		exit 1; \
	fi
endef
