# Two commands do all set-up in .venv: `make demo` draws a picture, `make test` runs the tests;
# `make check` takes a minute, the tests some more.
# TORCH=cpu, or cu130 and the like, takes that build of torch instead of the plain index's.
PYTHON ?= python3
BIN := .venv/bin
PIP = $(BIN)/pip install --disable-pip-version-check -c constraints.txt -c constraints-torch.txt

.PHONY: demo check test test-all test-triton lint types wheel clean faults pytest

demo: .venv/ready
	$(BIN)/flux generate "a red circle on a blue background" -p tiny --seed 1 --force -o demo.png

# First what must have the machine to itself, then the rest on as many cores as WORKERS says.
WORKERS ?= 2
# The longest files come first (tests/conftest.py): no core waits for one that began last.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SERIAL := $(shell grep -rl "pytest\.mark\.serial" tests --include="test_*.py" | sort)

# A minute: lint, types, and the tests of what most changes touch. It is no replacement of `test`.
QUICK := $(addprefix tests/test_,$(addsuffix .py,cli console errors events header \
	help layers output presets show)) tests/batch/test_rows.py

check: lint types
	$(BIN)/python -m pytest $(PARALLEL) -m "not serial and not exhaustive" $(QUICK)

test: faults pytest

# These tests keep one core busy and measure nothing: they run, niced, beside the serial ones, which
# mostly wait.
BESIDE := tests/card tests/test_steps.py

pytest: .venv/ready
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	nice $(BIN)/python -m pytest -m "not serial and not exhaustive" $(BESIDE) >"$$log" 2>&1 & \
	beside=$$!; \
	$(BIN)/python -m pytest -m "serial and not exhaustive" $(SERIAL) || \
		{ kill $$beside 2>/dev/null; exit 1; }; \
	wait $$beside || { cat "$$log"; exit 1; }; \
	echo "$(BESIDE): $$(tail -n 1 "$$log")"
	$(BIN)/python -m pytest $(PARALLEL) -m "not serial and not exhaustive" \
		$(addprefix --ignore ,$(BESIDE))

# Every fourth row of each kind; test-all runs all.
faults: .venv/ready
	$(BIN)/python -m tests.faults --workers $(WORKERS) --every 4

test-all: .venv/ready
	$(BIN)/python -m tests.faults --workers $(WORKERS) --exhaustive
	$(BIN)/python -m pytest -m serial
	$(BIN)/python -m pytest $(PARALLEL) -m "not serial"
	@$(MAKE) --no-print-directory test-triton

# comfy-kitchen's Triton kernels, interpreted. Triton beside torch changes what torch does: it lies
# in a folder of its own, which no other test sees. A skipped test is a failure.
TRITON := .venv/triton

test-triton: $(TRITON)/ready
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/interpreted.py >"$$log" 2>&1 && \
	! grep -q skipped "$$log" || { cat "$$log"; exit 1; }; \
	echo "tests/interpreted.py: $$(grep passed "$$log"), 0 skipped"

$(TRITON)/ready: .venv/ready
	$(PIP) --no-deps --target $(TRITON) triton==3.7.1
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/python -m mypy

wheel: .venv/ready
	rm -rf dist build
	$(BIN)/python -m build --outdir dist

.venv/ready: pyproject.toml constraints.txt constraints-torch.txt
	$(PYTHON) -m venv .venv
	@echo "Installing: 1.4 GB with a torch for the CPU, about 5 GB with one for CUDA; some minutes."
ifdef TORCH
	$(PIP) torch --index-url https://download.pytorch.org/whl/$(TORCH)
endif
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo.png
