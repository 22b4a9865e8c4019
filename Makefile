# Two commands do everything on a fresh machine: `make demo` and `make test`. Both make .venv themselves.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip
STAMP := $(VENV)/.installed

.PHONY: demo test lint docs bench clean

demo: $(STAMP)
	$(VENV)/bin/medmap demo

# A process a core; what the tests of a file share is made once.
test: $(STAMP)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Warnings are errors, and nothing is loaded from elsewhere. Pages can be opened as files; a search needs the server.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo 'site/index.html; with search: $(VENV)/bin/python -m http.server -d site 8000'

# ONLY=metrics: what has that word in its name.
bench: $(STAMP)
	$(VENV)/bin/python -m pytest -c benchmarks/pytest.ini --rootdir benchmarks benchmarks -k '$(ONLY)' --benchmark-json benchmarks/latest.json
	$(if $(ONLY),,$(VENV)/bin/python benchmarks/memory.py)

# The constraints file is what keeps a second torch out.
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch==2.13.0
	$(PIP) install --quiet -c constraints.txt -e '.[all,dev]'
	$(PIP) check
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
