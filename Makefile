# The two commands: `make train` and `make test`. Both begin with `make setup`, which does nothing when .venv is current.
PYTHON ?= python3
EXTRAS ?=
export UV_PYTHON_DOWNLOADS = never

# Bytecode of what a run imports: where Python may not write it later, each start would spend seconds compiling again.
COMPILE = cd .venv/lib/python3*/site-packages && ../../../bin/python -m compileall -q -j 0 jax jaxlib flax optax orbax \
    tensorstore hydra omegaconf numpy rich wandb yaml etils pydantic google opt_einsum ml_dtypes tokenizers pygments

.PHONY: setup train test test-long test-aot test-aot-tpu test-aot-gpu lint format clean
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

# What takes long or needs more than Python: a browser (apt-get install -y chromium).
test-long: setup
	@.venv/bin/python -m pytest -n 0 tests/long

# Compiles training steps for TPU pods and GPU hosts that are not here, each compiler in an environment of its own.
# 1.5 and 5 GB to install; on two cores a product takes 2 to 8 minutes for TPU, half a minute for GPU.
# make test-aot-tpu ONLY="context pipe" compiles these products of tests/aot/machines.py.
ONLY ?=
test-aot: test-aot-tpu test-aot-gpu

test-aot-tpu: .venv-aot-tpu/.stamp
	@TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu .venv-aot-tpu/bin/python -m tests.aot.check tpu $(ONLY)

# No GPU is there to tune on, and CUDA is not to look for one.
test-aot-gpu: .venv-aot-gpu/.stamp
	@CUDA_VISIBLE_DEVICES=-1 JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 JAX_PLATFORMS=cpu \
	    XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
	    .venv-aot-gpu/bin/python -m tests.aot.check gpu $(ONLY)

.venv-aot-%/.stamp: requirements.lock pyproject.toml | setup
	@echo "setting up .venv-aot-$*"
	@$(PYTHON) -m venv --clear .venv-aot-$*
	@.venv/bin/uv pip install --quiet --python .venv-aot-$*/bin/python --requirements pyproject.toml \
	    --extra $(if $(filter gpu,$*),cuda,$*) --constraints requirements.lock
	@touch $@

lint: setup
	@.venv/bin/ruff check --quiet . && .venv/bin/ruff format --quiet --check .

format: setup
	@.venv/bin/ruff check --quiet --fix . ; .venv/bin/ruff format --quiet .

clean:
	rm -rf .venv .venv-aot-* .pytest_cache .ruff_cache
