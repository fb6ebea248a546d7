# make demo, make test, make lint, make bench, make docs: each makes .venv and installs what it needs, and nothing else.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test lint bench docs clean

.venv/.made:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

.venv/.demo-installed: .venv/.made setup.py
	$(BIN)/pip install --quiet -e ".[export,cpu]"
	touch $@

.venv/.dev-installed: .venv/.made setup.py
	$(BIN)/pip install --quiet -e ".[dev]"
	touch .venv/.demo-installed $@

# Until a trained model ships, the demo exports one with random weights: everything runs, and no ranking means anything.
$(DEMO)/bundle/bundle.json: | .venv/.demo-installed
	$(BIN)/longclip-rt export --fp16 --weights random:ViT-B-16 --out $(DEMO)/bundle

demo: .venv/.demo-installed $(DEMO)/bundle/bundle.json
	$(BIN)/longclip-rt embed examples/files.txt -o $(DEMO)/files.parquet --bundle $(DEMO)/bundle
	$(BIN)/longclip-rt search $(DEMO)/files.parquet "A black and white photograph of a man with a camera on a tripod" \
	    -k 5 --kind image --bundle $(DEMO)/bundle --html $(DEMO)/gallery.html
	@echo "Look at $(DEMO)/gallery.html. The weights are random (untrained): the ranking means nothing yet."

test: lint
	$(BIN)/python -m pytest

lint: .venv/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev-installed
	$(BIN)/python docs/make_commands.py

bench: .venv/.dev-installed $(DEMO)/bundle/bundle.json
	$(BIN)/python benchmarks/tokenizer.py
	$(BIN)/python benchmarks/encoders.py --bundle $(DEMO)/bundle
	$(BIN)/python benchmarks/end_to_end.py --bundle $(DEMO)/bundle
	$(BIN)/python benchmarks/memory.py --bundle $(DEMO)/bundle

clean:
	rm -rf $(DEMO) build dist *.egg-info
