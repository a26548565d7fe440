# make demo: install, optimize a sample model, bench it before against after
# make test: install with the development tools, run every check and the whole test suite

VENV ?= .venv
PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null)))
BIN = $(VENV)/bin
MODEL ?= digits_cnn
RECIPE ?= cnn-int8
JOBS ?= 2

.PHONY: demo test check format docs clean

demo: $(VENV)/.installed
	@mkdir -p demo
	$(BIN)/effdl optimize sample_models/$(MODEL).onnx -c $(RECIPE) \
		--data sample_models/$(MODEL).calib.npz -o demo/$(MODEL).onnx
	$(BIN)/effdl bench sample_models/$(MODEL).onnx demo/$(MODEL).onnx

# One thread of BLAS for each of the parallel tests: more wait for each other, three times as long.
test: check
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadgroup

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict effdl
	$(BIN)/python scripts/make_docs.py --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	$(BIN)/python scripts/make_docs.py

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "effdl needs Python 3.11 or later (make PYTHON=/path/to/python3)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed
