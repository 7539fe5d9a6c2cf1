# Two commands do all set-up in .venv: `make demo` draws a picture, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint types wheel clean

demo: .venv/ready
	$(BIN)/flux generate "a red circle on a blue background" -p tiny --seed 1 --force -o demo.png

# First what must have the machine to itself, then the rest on as many cores as WORKERS says.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile

test: .venv/ready
	$(BIN)/python -m tests.faults --workers $(WORKERS)
	$(BIN)/python -m pytest -m "serial and not exhaustive"
	$(BIN)/python -m pytest $(PARALLEL) -m "not serial and not exhaustive"

test-all: .venv/ready
	$(BIN)/python -m tests.faults --workers $(WORKERS) --exhaustive
	$(BIN)/python -m pytest -m serial
	$(BIN)/python -m pytest $(PARALLEL) -m "not serial"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/python -m mypy

wheel: .venv/ready
	rm -rf dist build
	$(BIN)/python -m build --outdir dist

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo.png
