# make demo, test, test-latest, test-gpu, fuzz, lint, bench, tiny, study, docs, lock: each makes .venv, installs what it
# needs, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo
TINY := tiny
BUILT_IN := longclip_rt/assets/tiny
# Bundles for the benchmarks: untrained, since only their shape matters there.
B16 := $(DEMO)/vit-b-16
L14 := $(DEMO)/vit-l-14

.PHONY: demo test test-latest test-gpu lock fuzz lint bench tiny study docs clean

.venv/.made:
	$(PYTHON) -m venv .venv
	touch $@

# The versions that the tests ran with, so that what is released elsewhere breaks nothing here. make lock renews them.
CONSTRAINTS ?= -c constraints.txt

.venv/.demo-installed: .venv/.made setup.py constraints.txt
	$(BIN)/pip install --quiet $(CONSTRAINTS) -e .
	touch $@

.venv/.dev-installed: .venv/.made setup.py constraints.txt
	$(BIN)/pip install --quiet $(CONSTRAINTS) -e ".[dev]"
	touch .venv/.demo-installed $@

# Writes constraints.txt anew with today's versions, for every system and Python that setup.py admits.
lock: .venv/.made
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --upgrade --no-header --no-annotate \
	    setup.py --extra dev -o constraints.txt

# The suite with the newest versions that there are, in an environment of its own.
test-latest:
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/pip install --quiet --upgrade pip
	.venv-latest/bin/pip install --quiet --upgrade -e ".[dev]"
	touch .venv-latest/.made && touch .venv-latest/.demo-installed  # for the test of the quick start, which runs make
	.venv-latest/bin/python -m pytest -n 2 --dist loadfile

# The built-in model on drawn scenes that it never saw, beside real photographs, of which it knows nothing; and pictures that differ in one detail.
demo: .venv/.demo-installed
	mkdir -p $(DEMO)
	$(BIN)/longclip-rt embed examples/scenes/files.txt examples/files.txt -o $(DEMO)/files.parquet --overwrite \
	    --bundle $(BUILT_IN)
	$(BIN)/longclip-rt search $(DEMO)/files.parquet "$$(cat examples/scenes/scene-3.txt)" -k 5 --kind image \
	    --bundle $(BUILT_IN) --html $(DEMO)/gallery.html
	$(BIN)/python examples/near_twins.py $(BUILT_IN) --html $(DEMO)/twins.html
	@echo "Look at $(DEMO)/gallery.html too. The built-in model knows drawn scenes only, and nothing of real photographs."

# Two processes, each with whole files, so that what a file sets up once is made once.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The tests that need an NVIDIA GPU: kernels, training and backends; and the times of the PCA head there. They build
# engines of the built-in model, or of the bundle that LONGCLIP_RT_TEST_BUNDLE names, where TensorRT is installed. In an
# environment of their own, for ONNX Runtime's packages for CPUs and for GPUs cannot share one.
test-gpu: .venv-gpu/.installed
	LONGCLIP_RT_TEST_GPU=1 .venv-gpu/bin/python -m pytest -m gpu tests/kernels tests/train tests/engines/test_on_gpu.py
	.venv-gpu/bin/python benchmarks/pca_head.py

.venv-gpu/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet $(CONSTRAINTS) -e ".[gpu,test]"
	touch $@

# Spoiled files of every kind, drawn at random for FUZZ_SECONDS; the counts go into docs/robustness.md. What is found
# lies in fuzz-findings/, and its seed in tests/fuzz/seeds.txt, which the next run and make test try again.
FUZZ_SECONDS ?= 600
fuzz: .venv/.dev-installed
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

lint: .venv/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev-installed
	$(BIN)/python docs/make_commands.py
	$(BIN)/python docs/make_roofline.py

# Trains the built-in model anew, in three phases, and puts it into longclip_rt/assets/tiny. Goes on where it was
# stopped, and says how long it took.
tiny: .venv/.dev-installed
	$(BIN)/python benchmarks/train_tiny.py --out $(TINY)
	$(BIN)/python benchmarks/tiny_model.py --from-run $(TINY)

# Is the paper's claim true on those scenes? Begins with the CLIP of `make tiny`.
study: tiny
	$(BIN)/python benchmarks/longclip_study.py

$(B16)/bundle.json: | .venv/.dev-installed
	$(BIN)/longclip-rt export --fp16 --weights random:ViT-B-16 --out $(B16)

$(L14)/bundle.json: | .venv/.dev-installed
	$(BIN)/longclip-rt export --fp16 --weights random:ViT-L-14 --out $(L14)

bench: .venv/.dev-installed $(B16)/bundle.json $(L14)/bundle.json
	$(BIN)/longclip-rt bench --bundle $(B16) --precision auto,fp32 --against reference \
	    --csv benchmarks/results/bench_ViT-B-16.csv --plot benchmarks/results/bench_ViT-B-16.png
	$(BIN)/python benchmarks/tokenizer.py
	$(BIN)/python benchmarks/encoders.py --bundle $(B16)
	$(BIN)/python benchmarks/end_to_end.py --bundle $(B16)
	$(BIN)/python benchmarks/memory.py --bundle $(B16)
	$(BIN)/python benchmarks/engines.py --bundle $(B16) --bundle $(L14)

clean:
	rm -rf $(DEMO) kernels-compiled build dist *.egg-info
