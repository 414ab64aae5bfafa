# Needs Python 3.10 or later (with venv and pip) and make; the rest goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REGISTRY := $(CURDIR)/.madsci/registry.json
# Where `make run-lab` serves the lab.
LAB ?= 127.0.0.1:8010
LAB_DIR ?= .madsci/lab
SOURCES := client daemon lab tests bench
# Where `make install` puts the program: its own virtual environment, never a folder that holds anything else.
PREFIX ?= /opt/madsci-registryd
# Where it is linked, as PREFIX/bin is on no PATH.
BINDIR ?= /usr/local/bin
PROGRAMS := registryctl madsci-registryd

.PHONY: help run run-lab test check format bench chaos clean check-prefix install uninstall
.DEFAULT_GOAL := help

help:
	@echo "make run     start the daemon here, on ./.madsci/registry.json"
	@echo "make run-lab start a lab's registry and two daemons of it here, in $(LAB_DIR)"
	@echo "make test    run all tests"
	@echo "make check   ruff, formatting, mypy, import-linter (what CI does)"
	@echo "make format  let ruff format and fix"
	@echo "make bench   measure against a bare echo and bare SQLite"
	@echo "make chaos   many kills, and how long a hand-over takes"
	@echo "make clean   remove what these made, but for the registry in ./.madsci"
	@echo "sudo make install    run the daemon as a service of this host (systemd), its program in $(PREFIX)"
	@echo "sudo make uninstall  take both away again; the registry stays"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

run: $(STAMP)
	@mkdir -p -m 700 .madsci
	@echo "In another terminal:"
	@echo "  $(BIN)/registryctl status"
	@echo "  $(BIN)/registryctl resolve liquidhandler_1 --type node"
	@echo "  $(BIN)/registryctl run liquidhandler_1 --type node -- sleep 60"
	@exec $(BIN)/madsci-registryd --registry '$(REGISTRY)'

# Two hosts on one machine, and their lab. Ctrl-C ends all three.
run-lab: $(STAMP)
	@mkdir -p -m 700 '$(LAB_DIR)' && mkdir -p -m 700 '$(LAB_DIR)/host1' '$(LAB_DIR)/host2'
	@echo "In another terminal (host2 likewise):"
	@echo "  $(BIN)/registryctl --registry $(LAB_DIR)/host1/registry.json lab status"
	@echo "  $(BIN)/registryctl --registry $(LAB_DIR)/host1/registry.json run liquidhandler_1 --type node -- sleep 60"
	@echo "  $(BIN)/registryctl --registry $(LAB_DIR)/host2/registry.json run liquidhandler_1 --type node -- true"
	@echo "  $(BIN)/registryctl list --lab http://$(LAB)"
	@trap 'trap - EXIT INT TERM; kill $$pids 2>/dev/null; wait' EXIT INT TERM; \
	$(BIN)/madsci-registry-lab --listen $(LAB) --store 'sqlite:$(LAB_DIR)/lab.db' & pids=$$!; \
	for host in host1 host2; do MADSCI_REGISTRYD_LAB_URL=http://$(LAB) $(BIN)/madsci-registryd \
	--registry '$(LAB_DIR)'/$$host/registry.json & pids="$$pids $$!"; done; wait

# Four at once on two cores: they mostly wait, for processes and for the disk.
test: $(STAMP)
	-@$(BIN)/python tests/etcd.py
	$(BIN)/python -m pytest -n 4 --dist loadfile -m 'not chaos'

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP)
	PYTHONPATH=tests $(BIN)/python bench/bench.py

chaos: $(STAMP)
	-@$(BIN)/python tests/etcd.py
	$(BIN)/python -m pytest -m chaos -s tests/chaos

check-prefix:
	@test "$$(id -u)" = 0 || { echo "make $(MAKECMDGOALS) needs root: sudo make $(MAKECMDGOALS)" >&2; exit 1; }
	@printf '%s' '$(PREFIX)' | grep -Eqx '/[A-Za-z0-9_/.+@:,=-]+' || \
	{ echo "PREFIX=$(PREFIX) cannot stand in a unit file: say an absolute path without spaces or quotes" >&2; exit 1; }

install: check-prefix
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, say make PYTHON=... install")'
	@PYTHONPATH=client PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -c 'import os, sys; from pathlib import Path; \
	from madsci_registryctl.service.reach import obstacles; found = obstacles([Path(os.path.realpath(sys.executable))]); \
	sys.exit(found and "\n".join(found) + "\nso no service could run this Python: say make PYTHON=/usr/bin/python3 install" or 0)'
	@test ! -e '$(PREFIX)' -o -e '$(PREFIX)/.made-by-make-install' || { echo "$(PREFIX) exists and is not ours, say make PREFIX=... install" >&2; exit 1; }
	umask 022 && mkdir -p '$(PREFIX)' && touch '$(PREFIX)/.made-by-make-install' && $(PYTHON) -m venv '$(PREFIX)'
	umask 022 && '$(PREFIX)/bin/python' -m pip install --quiet --disable-pip-version-check --no-cache-dir --upgrade .
	@umask 022 && mkdir -p '$(BINDIR)' && for name in $(PROGRAMS); do at='$(BINDIR)'/$$name; \
	if [ ! -e "$$at" ] && [ ! -L "$$at" ]; then ln -s '$(PREFIX)'/bin/$$name "$$at" && echo "linked     $$at"; \
	elif [ "$$(readlink "$$at")" != '$(PREFIX)'/bin/$$name ]; then echo "kept       $$at, which is something else"; fi; done
	'$(PREFIX)/bin/registryctl' service install --system

uninstall: check-prefix
	@test -e '$(PREFIX)/.made-by-make-install' || { echo "make install has put nothing into $(PREFIX)" >&2; exit 1; }
	test ! -x '$(PREFIX)/bin/registryctl' || '$(PREFIX)/bin/registryctl' service uninstall --system
	@for name in $(PROGRAMS); do at='$(BINDIR)'/$$name; \
	if [ "$$(readlink "$$at")" = '$(PREFIX)'/bin/$$name ]; then rm "$$at" && echo "removed    $$at"; fi; done
	rm -rf '$(PREFIX)'

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
