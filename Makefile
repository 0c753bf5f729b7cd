# make test [ARGS="tests/llava -x"]   all tests
# make hosts [ARGS=...]               the contract suite on the oldest and on the newest transformers of our range
# make canary                         the contract suite on the newest transformers there is
# make style | format                 check | repair lint and formatting
# make bench [ARGS=...]               speed table
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.PHONY: test hosts canary style format bench
ARGS ?=
SETUP := . scripts/_env.sh; apet_env test

test:
	bash scripts/test.sh $(ARGS)

hosts:
	bash scripts/hosts.sh $(ARGS)

canary:
	bash scripts/canary.sh

style:
	$(SETUP); "$$PYTHON" -m ruff check .; "$$PYTHON" -m ruff format --check .

format:
	$(SETUP); "$$PYTHON" -m ruff check --fix .; "$$PYTHON" -m ruff format .

bench:
	$(SETUP); "$$PYTHON" -m apet.bench $(ARGS)
