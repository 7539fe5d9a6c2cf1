# Two commands do all set-up in .venv: `make demo` draws a picture, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint wheel clean

demo: .venv/ready
	$(BIN)/flux generate "a red circle on a blue background" -p tiny --seed 1 --force -o demo.png

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: .venv/ready
	rm -rf dist build
	$(BIN)/python -m build --outdir dist

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo.png
