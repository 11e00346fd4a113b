# Needs Python 3.11 and make; everything else comes from the package registries.
PYTHON ?= python3.11
VENV   ?= .venv
BIN     = $(VENV)/bin
SOURCES = $(shell find proto services gateway migrations -name '*.proto' -o -name 'build_hook.py') pyproject.toml

.PHONY: up demo test native lint browser soak bench package clean

up: $(VENV)/run.stamp ## run everything in one process
	@exec $(BIN)/clawplane up $(ARGS)

demo: $(VENV)/run.stamp ## the whole loop, against the running stack or one of its own
	@$(BIN)/clawplane demo $(ARGS)

# Only who chooses tests may have chosen none of a kind (pytest's status 5).
PERHAPS_NONE = $(if $(ARGS),|| [ $$? -eq 5 ])

test: $(VENV)/test.stamp ## the suite, on SQLite and PostgreSQL
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not alone and not soak and not package and not browser" $(ARGS) $(PERHAPS_NONE)
	$(BIN)/python -m pytest -m alone -s $(ARGS) $(PERHAPS_NONE)

WIRE = tests/test_auth.py tests/test_sessions.py tests/test_bad_input.py tests/test_change_feed.py tests/test_changes.py tests/test_contract.py tests/test_crash.py \
	tests/test_event_streams.py tests/test_races.py tests/test_tenancy.py tests/test_watch.py tests/test_workers.py \
	$(addprefix tests/kit/test_kit_,idempotency.py intake.py limits.py rpc.py server.py streams.py transport.py)

native: $(VENV)/test.stamp ## contract, tenancy, streams, drain and the rest of the wire on the native transport
	CLAWPLANE_TRANSPORT=native $(BIN)/python -m pytest --engine postgres -n 2 --dist loadgroup $(WIRE) $(ARGS)

lint: $(VENV)/lint.stamp ## ruff, mypy, buf lint, buf breaking, architecture tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python proto/check.py
	$(BIN)/python -m pytest tests/test_architecture.py

browser: $(VENV)/browser.stamp ## the dashboard in a real Chromium; writes docs/screenshots
	$(BIN)/python -m pytest tests/browser -m browser $(ARGS)

soak: $(VENV)/test.stamp ## the long proofs
	$(BIN)/python -m pytest -m soak -s $(ARGS)

bench: $(VENV)/test.stamp ## what a call costs, on PostgreSQL, against the floors of the same run
	$(BIN)/python -m bench $(ARGS)

package: $(VENV)/test.stamp ## the wheel, in an empty environment, against a running stack
	$(BIN)/python -m pytest -m package -s $(ARGS)

clean: ## forget the environment and the embedded default's data
	rm -rf $(VENV) proto/gen .clawplane

$(BIN)/python:
	@echo "making $(VENV) (once; about half a minute)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/run.stamp: $(SOURCES) requirements.txt | $(BIN)/python
	@echo "installing what Clawplane needs, pinned by hash"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.txt
	@echo "making the stubs from the contracts"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/test.stamp: requirements-dev.txt $(VENV)/run.stamp
	@echo "installing what tests and checks need"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.txt
	@touch $@

$(VENV)/browser.stamp: $(VENV)/test.stamp
	@echo "installing what drives a browser"
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-browser.txt
	@touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	@touch $@
