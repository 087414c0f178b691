# Everything from a fresh clone, with only git, make and Python >= 3.11 on the machine.
# `make demo` runs the main job, `make test` passes the tests; both install first.

PYTHON ?= python3
BIN := .venv/bin
# One thread per process: repeatable figures, and the workers share the cores.
export OMP_NUM_THREADS ?= 1
# Without bytecode each of the many processes of a run or a test would compile torch anew, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-full test-deployment check format docs bench defaults lock clean

install: .venv/installed

# uv rather than pip: it takes matching builds of torch and torchvision from the registry alone.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedbags needs Python >= 3.11: make PYTHON=python3.12 install")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.12.24
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[dp,dicom,dev]'
	touch $@

demo: install
	$(BIN)/fedbags simulate --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: install
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-full: install
	$(BIN)/python -m pytest -n 2

# Servers and sites as real processes. nginx is installed where that is allowed; else its tests skip and say why.
test-deployment: install
	@command -v nginx || test -x /usr/sbin/nginx || { apt-get update && apt-get install -y --no-install-recommends nginx-light; } \
		|| echo "nginx is missing and cannot be installed here (it takes root and apt-get): the tests that need it will skip"
	$(BIN)/python -m pytest -rs tests/deployment

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ as a site in site/; a broken link is an error.
docs: install
	$(BIN)/mkdocs build --quiet

bench: install
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# The defaults of the configuration, into the table of pyproject.toml where Flower looks for them.
defaults: install
	PYTHONPATH=. $(BIN)/python tests/common/app_table.py

# Exact versions with hashes, for every extra; no registry address is written.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --all-extras --no-header --no-annotate --output-file constraints.txt pyproject.toml

clean:
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache
