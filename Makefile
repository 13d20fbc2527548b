# `make demo` runs the main job, `make test` passes the tests; each sets up .venv first, and does again only what has changed.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
READY := $(VENV)/ready
SANITIZED := build/sanitize

# A machine without an NVIDIA driver gets the release of torch that pip can take there without any CUDA package.
CUDA := $(shell (nvidia-smi -L || /sbin/ldconfig -p | grep libcuda.so.1) >/dev/null 2>&1 && echo yes)
CPU_TORCH := 2.13.0

.PHONY: demo test timm lint sanitize build clean

demo: build
	$(PY) -m linattn demo

test: build
	$(PY) -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

# timm needs a torchvision whose wheel, beside a CPU torch, breaks transformers: both in an environment of their own, that reads the rest from .venv.
timm: build $(VENV)/timm/ready
	$(VENV)/timm/bin/python -m pytest tests/swap/test_swap_torch.py tests/models/test_models_vision.py -k timm $(ARGS)

$(VENV)/timm/ready: $(READY)
	$(PY) -m venv --without-pip --clear $(VENV)/timm
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(echo $(VENV)/timm/lib/python3*/site-packages)/parent.pth
	$(PY) -m pip --disable-pip-version-check --python $(VENV)/timm/bin/python install --quiet -c $(VENV)/constraints.txt "timm>=1.0.31"
	@touch $@

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The same sources with the sanitizers, in a copy of the package; their runtimes have to be in the process before Python's first allocation.
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r linattn $(SANITIZED)/ && rm -f $(SANITIZED)/linattn/*.so
	$(PY) -I linattn/build.py --sanitize --output $(SANITIZED)/linattn/libcpu.so
	LD_PRELOAD="$$(for lib in asan ubsan stdc++; do g++ -print-file-name=lib$$lib.so; done | tr '\n' ' ')" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	$(VENV)/bin/pytest tests/ops -k "every_instruction_set or one_sum or too_large or (long_row and cpu)" $(ARGS)

# Without a compiler the package works, by torch alone; a compiler that fails is an error.
build: $(READY)
	@if command -v g++ clang++ >/dev/null; then $(PY) -I linattn/build.py; \
	else echo "no C++ compiler, so no kernels: linattn will run several times slower (on Debian: apt-get install g++)"; fi

$(READY): pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "linattn needs Python 3.10 or newer, called $(PYTHON) (on Debian: apt-get install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make a virtual environment (on Debian: apt-get install python3-venv)"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PY) -c 'import torch' 2>/dev/null || $(MAKE) --no-print-directory torch
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/constraints.txt
	$(PIP) --quiet -c $(VENV)/constraints.txt -e ".[bench,deepspeed,dev,hf,probe,train,triton,vision]"
	@touch $@

.PHONY: torch
torch: # first and alone: whatever asks for "torch" afterwards finds it there, and the constraint keeps it
ifeq ($(CUDA),yes)
	$(PIP) "torch>=2.10"
else
	$(PIP) "torch==$(CPU_TORCH)"
endif

clean:
	rm -rf build dist *.egg-info linattn/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
