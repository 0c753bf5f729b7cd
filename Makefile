# make test [ARGS="tests/llava -x"]   all tests
# make test-oldest                    the same on the oldest supported transformers, in an environment of its own
# make style | format                 check | repair lint and formatting
# make bench [ARGS=...]               speed table
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: test test-oldest style format bench
ARGS ?=
SETUP := . scripts/_env.sh; apet_env test

test:
	bash scripts/test.sh $(ARGS)

test-oldest:
	APET_VENV=.venv/oldest APET_PINS="transformers==5.17.*" bash scripts/test.sh $(ARGS)

style:
	$(SETUP); "$$PYTHON" -m ruff check .; "$$PYTHON" -m ruff format --check .

format:
	$(SETUP); "$$PYTHON" -m ruff check --fix .; "$$PYTHON" -m ruff format .

bench:
	$(SETUP); "$$PYTHON" -m apet.bench $(ARGS)
