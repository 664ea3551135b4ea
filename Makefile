# The two commands: `make train` and `make test`. Both begin with `make setup`, which does nothing when .venv is current.
PYTHON ?= python3
EXTRAS ?=
export UV_PYTHON_DOWNLOADS = never

# Bytecode of what a run imports: where Python may not write it later, each start would spend seconds compiling again.
COMPILE = cd .venv/lib/python3*/site-packages && ../../../bin/python -m compileall -q -j 0 jax jaxlib flax optax orbax \
    tensorstore hydra omegaconf numpy rich wandb yaml etils pydantic google opt_einsum ml_dtypes tokenizers pygments

.PHONY: setup train test lint format clean
setup: .venv/.stamp $(EXTRAS:%=.venv/.extra-%)

# Pinned versions come from requirements.lock; EXTRAS=cuda or EXTRAS=tpu adds an accelerator's plugin.
.venv/.stamp: requirements.lock pyproject.toml
	@echo "setting up .venv ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv --clear .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.venv/bin/uv pip install --quiet --python .venv/bin/python --requirements requirements.lock
	@$(COMPILE) || true
	@touch $@

.venv/.extra-%: .venv/.stamp
	@.venv/bin/uv pip install --quiet --python .venv/bin/python --requirements pyproject.toml --extra "$*" \
	    --constraints requirements.lock
	@touch $@

train: setup
	@.venv/bin/python train.py

test: setup lint
	@.venv/bin/python -m pytest

lint: setup
	@.venv/bin/ruff check --quiet . && .venv/bin/ruff format --quiet --check .

format: setup
	@.venv/bin/ruff check --quiet --fix . ; .venv/bin/ruff format --quiet .

clean:
	rm -rf .venv .pytest_cache .ruff_cache
