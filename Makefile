# Two commands to know: `make demo` (set up, train, look at the result) and `make test`. The rest is in `make help`.
#
# Set-up (libtorch, demo model, Python packages) is done by .ci/setup and lands in the user's cache, once.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo test build lint fmt parity serving bench device-check datasets fixtures env clean

ENGRAFT := target/release/engraft
# Where cargo is told to build elsewhere, the binary is there.
ifdef CARGO_TARGET_DIR
ENGRAFT := $(CARGO_TARGET_DIR)/release/engraft
endif

QUICKSTART := recipes/quickstart.yaml
# Held-out rows shown before and after training.
DEMO_ROWS ?= 40
PEERS := transformers==5.17.0 peft==0.21.2 safetensors==0.8.0 gguf==0.19.0 numpy==2.4.6
OPTIMIZERS := bitsandbytes==0.50.2 schedulefree==1.4.1
# The last builds AutoAWQ's metadata; the two whose own files are run (AutoGPTQ, AutoAWQ) are fetched by the program that runs them.
QUANTISERS := bitsandbytes==0.50.2 accelerate==1.15.0 compressed-tensors==0.20.1 wheel==0.48.0
PYARROW := pyarrow==26.0.1
# llama.cpp is built from its source: some minutes, once, and a C++ compiler is needed.
SERVERS := llama-cpp-python[server]==0.3.36
MLX := mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2

help: ## What there is to make
	@echo "make demo        set up, build, train the quickstart's adapter, show what the model answered before and after"
	echo "make test        the whole test suite (no GPU and, after set-up, no network needed)"
	echo "make build       the release binary, $(ENGRAFT)"
	echo "make lint        formatting and clippy, as CI runs them"
	echo "make fmt         format the sources"
	echo "make parity      compare with PEFT, transformers and bitsandbytes, live, on the demo model (installs them into the cache)"
	echo "                 SEEDS=1,2: of the random tensors and models that are quantised"
	echo "                 FAMILY=qwen3 or qwen3,phi or all [SEED=1 HIDDEN=48 LAYERS=6 LENGTHS=230,7,90]: families on random models of that size"
	echo "                 FAMILY=qwen3 FIELDS=1: the same model with every field of its config.json otherwise, one at a time; the same sizes"
	echo "make bench       speed and memory beside PEFT and transformers; results go to bench/results"
	echo "                 FAMILY=qwen3 or all [HIDDEN=576 LAYERS=6 TOKENS=1024]: speed per FLOP of a family beside Llama's"
	echo "                 GRID=gpu or cpu [BENCH='--only 8b']: engraft beside PEFT, Unsloth and torchtune on models of 0.1 to 8B (bench/grid.py)"
	echo "make device-check  on a machine with a GPU: CUDA kernels beside their twins, and their GB/s beside a copy"
	echo "make datasets    write datasets/ anew from the committed programs, byte for byte"
	echo "make fixtures    write tests/fixtures anew with transformers, PEFT and gguf"
	echo "make env         print LIBTORCH for your shell: eval \"\$$(make -s env)\" && cargo build --release"
	echo "make clean       remove target/ and runs/ (the cache stays)"

demo: ## The main job, and a look at its result
	@source .ci/setup
	toolchain; libtorch; demo_model
	cargo build --release --locked
	rm -rf runs/quickstart
	say "Training an adapter that turns a customer's message into a JSON ticket ($(QUICKSTART))"
	$(ENGRAFT) train $(QUICKSTART)
	say "Held-out messages, before training: what the base model answers"
	$(ENGRAFT) eval $(QUICKSTART) --base --generate --limit 5 --max-tokens 60
	say "Held-out messages, after training: the same model with runs/quickstart/adapter"
	$(ENGRAFT) eval $(QUICKSTART) --adapter runs/quickstart/adapter --generate --limit $(DEMO_ROWS) --fail-under exact_match=0.8
	say "The adapter is runs/quickstart/adapter; the curves are runs/quickstart/report.html. Talk to it:"
	echo "  $(ENGRAFT) chat --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/quickstart/adapter --system 'Write the ticket as JSON.'"

build: ## The release binary
	@source .ci/setup
	toolchain; libtorch
	cargo build --release --locked

test: ## The whole test suite
	@source .ci/setup
	toolchain; libtorch
	log=$$(mktemp)
	trap 'rm -f "$$log"' EXIT
	cargo test --release --locked 2>&1 | tee "$$log"
	awk '/^test result: ok/ { passed += $$4; ignored += $$8; suites += 1 } END { printf "%d tests passed in %d suites, %d ignored\n", passed, suites, ignored }' "$$log"

lint: ## Formatting and clippy
	@source .ci/setup
	toolchain; libtorch
	cargo fmt --check
	cargo clippy --release --all-targets --locked -- -D warnings

fmt: ## Format the sources
	@cargo fmt

parity: ## Live comparison with PEFT, transformers and bitsandbytes
	@source .ci/setup
	toolchain; libtorch
	cargo build --release --locked
	python_with torch==$$TORCH $(PEERS) $(QUANTISERS) $(PYARROW)
	if [ -n "$(FAMILY)" ]; then
		exec "$$PYTHON" -B tests/python/$(if $(FIELDS),family_fields,family_live).py --engraft "$(ENGRAFT)" --family "$(FAMILY)" $(if $(SEED),--seed $(SEED)) $(if $(HIDDEN),--hidden $(HIDDEN)) $(if $(LAYERS),--layers $(LAYERS)) $(if $(LENGTHS),--lengths $(LENGTHS))
	fi
	"$$PYTHON" -B tests/python/bench_grid.py --engraft "$(ENGRAFT)"
	demo_model
	"$$PYTHON" -B tests/python/quantised_live.py --engraft "$(ENGRAFT)" $(if $(SEEDS),--seeds $(SEEDS))
	"$$PYTHON" -B tests/python/parity.py --engraft "$(ENGRAFT)" --model "$$(cache_folder)/models/$$MODEL"

serving: ## What is exported, in the programs that serve it
	@source .ci/setup
	toolchain; libtorch; demo_model
	cargo build --release --locked
	python_with torch==$$TORCH $(PEERS) $(SERVERS)
	apart mlx $(MLX)
	PYTHONPATH=$$APART "$$PYTHON" -B tests/python/serving_adapters.py --engraft "$(ENGRAFT)"
	"$$PYTHON" -B tests/python/serving_gguf.py --engraft "$(ENGRAFT)" --families
	[ -e runs/quickstart/manifest.json ] || "$(ENGRAFT)" train $(QUICKSTART) $(TRAIN)
	"$$PYTHON" -B tests/python/serving_server.py --engraft "$(ENGRAFT)" --run runs/quickstart

bench: ## Speed and memory beside PEFT, transformers and bitsandbytes; speed per FLOP of the families
	@source .ci/setup
	toolchain; libtorch
	cargo build --release --locked
	python_with torch==$$TORCH $(PEERS) $(QUANTISERS) $(PYARROW)
	if [ -n "$(FAMILY)" ]; then
		exec "$$PYTHON" -B bench/families.py --engraft "$(ENGRAFT)" --family "$(FAMILY)" $(if $(HIDDEN),--hidden $(HIDDEN)) $(if $(LAYERS),--layers $(LAYERS)) $(if $(TOKENS),--tokens $(TOKENS)) $(BENCH)
	fi
	if [ -n "$(GRID)" ]; then
		"$$PYTHON" -B bench/grid.py prepare "$$(cache_folder)/grid"
		exec "$$PYTHON" -B bench/grid.py run --folder "$$(cache_folder)/grid" --engraft "$(ENGRAFT)" --grid "$(GRID)" $(BENCH)
	fi
	demo_model
	if [ -n "$(EXPORTS)" ]; then
		exec "$$PYTHON" -B bench/exports.py --engraft "$(ENGRAFT)" $(BENCH)
	fi
	"$$PYTHON" -B bench/run.py --engraft "$(ENGRAFT)" --model "$$(cache_folder)/models/$$MODEL" $(BENCH)
	"$$PYTHON" -B bench/exports.py --engraft "$(ENGRAFT)"

device-check: ## CUDA kernels beside their twins, and their speed, on a real GPU
	@source .ci/setup
	toolchain; libtorch
	command -v nvidia-smi >/dev/null || die "nvidia-smi is not here, so there is no NVIDIA driver" "run it on a machine with a GPU; make test checks what can be checked without"
	nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
	cargo build --release --locked
	$(ENGRAFT) doctor
	cargo test --release --locked --lib -- ops:: quant:: model::families::kernels_tests --nocapture
	cargo test --release --locked --test memory_plan -- --nocapture
	cargo test --release --locked --lib -- ops::cuda::speed::beside_a_copy --ignored --exact --nocapture
	python_with torch==$$TORCH $(PEERS) $(QUANTISERS)
	"$$PYTHON" -B tests/python/quantised_live.py --engraft "$(ENGRAFT)" --device cuda

datasets: ## The datasets, from their programs
	@source .ci/setup
	python_with $(PYARROW)
	"$$PYTHON" -B datasets/generate.py

fixtures: ## Small models, adapters, templates and quantised blocks with their references
	@source .ci/setup
	python_with torch==$$TORCH $(PEERS) $(OPTIMIZERS) $(QUANTISERS)
	for program in tiny_llama families saved_configs peft_adapter chat_templates gguf_quants fp8_scales mxfp4_blocks family_templates optimizers bnb_quants qlora starts layouts tekken; do
		say "tests/python/$$program.py"
		"$$PYTHON" -B tests/python/$$program.py
	done

env: ## LIBTORCH for your shell
	@source .ci/setup
	libtorch
	echo "export LIBTORCH='$$LIBTORCH'"

clean: ## What was built and run
	@rm -rf target runs
