# Two commands do everything on a fresh machine with git, make, Python >= 3.11 and a Rust toolchain:
#   make demo   trains the embedded model, merges it and talks to it
#   make test   every check that CI runs
# Both make their own .venv, install the locked dependencies and build the native module; either may come first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
FASTFT := $(BIN)/python -m fastft
DEMO   := work_dirs/demo

INSTALLED := $(VENV)/.installed
BUILT     := $(VENV)/.built
RUST      := Cargo.toml Cargo.lock pyproject.toml $(shell find rust -name '*.rs' -o -name Cargo.toml)

# What `build_info` says was built.
export FASTFT_COMMIT := $(shell git rev-parse --short HEAD 2>/dev/null)

.PHONY: demo test test-all test-gpu fuzz fuzz-rust fuzz-python sanitize miri supply instructions setup check-rust check-python pytest lock demo-base wheel clean
.DELETE_ON_ERROR:

setup: $(BUILT)

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: fastft needs Python >= 3.11; $(PYTHON) is older. Use: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@# uv installs the 6 GB of torch in a fraction of pip's time; pip alone does it too.
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; then \
	  echo "installing the locked dependencies with uv"; \
	  $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock; \
	else \
	  echo "uv cannot be had here; installing with pip (slower)"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock; \
	fi
	@touch $@

$(BUILT): $(INSTALLED) $(RUST)
	@command -v cargo > /dev/null || { echo "error: no cargo found; install a Rust toolchain first"; exit 1; }
	@# pip only needs to point the environment at python/; maturin's own install would look for dependencies again.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(BUILT)
	@rm -rf $(DEMO) $(DEMO)-merged
	$(FASTFT) train demo --work-dir $(DEMO)
	@echo; echo "--- the adapter becomes part of the model:"
	$(FASTFT) convert merge demo $(DEMO)/adapter $(DEMO)-merged
	$(FASTFT) convert verify $(DEMO)-merged --base demo --adapter $(DEMO)/adapter
	@echo; echo "--- the base, asked before:"
	$(FASTFT) chat demo --temperature 0 --prompt "Who are you?"
	@echo; echo "--- the merged model, asked the same:"
	$(FASTFT) chat $(DEMO)-merged --temperature 0 --prompt "Who are you?"
	@echo; echo "the run:     $(DEMO)  (report.html, loss.png, metrics.jsonl, samples.jsonl, config.yaml, adapter/)"
	@echo "the model:   $(DEMO)-merged  (loads in transformers and every tool that reads its folders)"
	@echo "talk to it:  $(FASTFT) chat $(DEMO)-merged"
	@echo "your data:   $(FASTFT) copy-cfg demo my.yaml   then edit data.train and: $(FASTFT) train my.yaml"
	@echo "real models: $(FASTFT) list-cfg -p qlora"

# Makes the embedded model again, from nothing (about 20 minutes).
demo-base: $(BUILT)
	$(BIN)/python -m fastft.demo.make python/fastft/demo/base

test: $(BUILT) check-rust check-python pytest

check-rust:
	cargo fmt --check
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
	@if cargo nextest --version > /dev/null 2>&1; then cargo nextest run --locked --workspace; \
	else echo "cargo-nextest is not installed; running cargo test"; cargo test --quiet --locked --workspace; fi
	cargo test --quiet --locked --workspace --doc

check-python: $(BUILT)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy.stubtest fastft._native

pytest: $(BUILT)
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --dist loadfile

test-all: $(BUILT) check-rust check-python
	$(BIN)/python -m pytest -m "not gpu" -n auto --dist loadfile
	$(MAKE) fuzz

# Each fuzz target for FUZZ_SECONDS; those whose tools are missing are skipped, which is said.
FUZZ_SECONDS ?= 60
fuzz: fuzz-rust fuzz-python

fuzz-rust:
	@if ! cargo fuzz --version > /dev/null 2>&1 || ! cargo +nightly --version > /dev/null 2>&1; then \
	  echo "skipped: the Rust fuzz targets: cargo-fuzz or the nightly toolchain is not installed"; exit 0; fi; \
	for target in header layout plan plan_text nf4 tokens; do \
	  echo "--- fuzz $$target"; \
	  cargo +nightly fuzz run --fuzz-dir rust/fuzz $$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=1000 -verbosity=0 -print_final_stats=1 || exit 1; done

fuzz-python: $(BUILT)
	@for reader in adapter index pickle torch_file yaml config; do \
	  echo "--- fuzz $$reader"; \
	  $(BIN)/python tests/fuzz/reader.py $$reader \
	    -max_total_time=$(FUZZ_SECONDS) -max_len=1000 -verbosity=0 -print_final_stats=1 || exit 1; done

# The Rust tests under AddressSanitizer; needs the nightly toolchain.
sanitize:
	@cargo +nightly --version > /dev/null 2>&1 || { echo "error: sanitize needs the nightly toolchain"; exit 1; }
	RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/sanitize cargo +nightly test --locked \
	  --target $(shell rustc -vV | sed -n 's/^host: //p') --tests \
	  -p fastft-kernels -p fastft-checkpoint -p fastft-convert -p fastft-tokens

# The arithmetic under miri, which knows undefined behaviour; needs a nightly toolchain with the component miri.
miri:
	@cargo +nightly miri --version > /dev/null 2>&1 || { echo "error: this nightly toolchain has no miri"; exit 1; }
	FASTFT_SIMD=scalar MIRIFLAGS=-Zmiri-disable-isolation CARGO_TARGET_DIR=target/miri \
	  cargo +nightly miri test --locked -p fastft-kernels -p fastft-tokens --lib

# Licences, sources and, where their databases can be reached, known holes of the dependencies.
supply: $(BUILT)
	$(BIN)/python tests/licences.py
	@if cargo deny --version > /dev/null 2>&1; then cargo deny --locked check licenses bans sources; \
	else echo "skipped: cargo deny is not installed; tests/unit/test_supply.py checks licences and sources"; fi
	@if $(BIN)/python -m pip_audit --version > /dev/null 2>&1; then $(BIN)/python -m pip_audit --require-hashes -r requirements.lock; \
	else echo "skipped: pip-audit is not installed"; fi

# Instructions of the NF4 kernels, counted by callgrind, against their limits.
instructions:
	benches/kernels/instructions.sh

# The tests that need an accelerator.
test-gpu: $(BUILT)
	$(BIN)/python -m pytest -m gpu

# Makes requirements.lock again from the ranges in pyproject.toml, with the newest versions.
lock: $(INSTALLED)
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --upgrade \
	  --group dev pyproject.toml --output-file requirements.lock

wheel: $(INSTALLED)
	$(BIN)/maturin build --release --locked --out dist

clean:
	rm -rf $(VENV) target dist build
