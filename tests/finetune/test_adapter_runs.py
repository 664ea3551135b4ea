"""A run that trains adapters: what its checkpoints hold, how it goes on, what it refuses, and what is made of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import yaml
from safetensors.numpy import load_file, save_file

from checkpoint.digests import read_manifest
from finetune.__main__ import main
from finetune.adapters import peft_format
from finetune.options import parse
from inference.adapters import AdapterReader
from inference.opening import Opened, find_model

DONE, MISTAKE = 0, 2
STEPS = 8
HERE = ("runtime.cpu_devices=8", "mesh.fsdp=4", "mesh.tensor=2")  # how programs open what one device trained
SHAPE = ("model.layers=2", "model.width=32", "model.heads=4", "model.kv_heads=2", "model.head_dim=8", "model.ffn=64")


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # whatever a run writes by mistake lands here


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a text, a trained model `base`, and one with adapters on it, `tuned`."""
    folder = tmp_path_factory.mktemp("adapters")
    runs.corpus(folder / "text")
    assert runs.run(runs.overrides(folder / "text", folder / "base", f"train.steps={STEPS}"), devices=1) == DONE
    assert tune(folder, folder / "tuned", f"train.steps={STEPS}") == DONE
    return folder


def tune(home: Path, directory: Path, *more: str, devices: int = 1) -> int:
    """Trains adapters on `base`."""
    arguments = runs.overrides(home / "text", directory)
    arguments = [argument for argument in arguments if argument not in SHAPE and not argument.startswith("model.")]
    arguments += [f"model.from={home / 'base'}", "adapter=lora", "adapter.rank=2", "adapter.dora=true"]
    return runs.run([*arguments, *more], devices=devices)


def logits(path: Path) -> np.ndarray:
    return logits_of(find_model(path, HERE).open())


def logits_of(opened: Opened) -> np.ndarray:
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16)).astype(np.int32))
    with jax.set_mesh(opened.mesh):
        model = lambda params: opened.description.bind(params)
        run = jax.jit(lambda params: model(params).logits(model(params)(tokens_BT, dtype=jnp.float32)[0]))
        return np.asarray(run(opened.params))


def beside(base: Path) -> AdapterReader:
    """What reads adapters of a model that is served."""
    found = find_model(base, HERE)
    reader = AdapterReader(found)
    reader.put_base(found.open())
    return reader


def test_checkpoints_hold_adapters_alone(home):
    leaves = read_manifest(home / "tuned/checkpoints/00000008")["leaves"]
    params = [name for name in leaves if name.startswith("params/")]
    assert params
    assert all("/adapter/" in name for name in leaves if "layers/" in name or name.startswith("params/"))
    size = lambda run: sum(f.stat().st_size for f in (home / run / "checkpoints/00000008").rglob("*") if f.is_file())
    assert size("tuned") < 0.6 * size("base")  # of a model so small that metadata weigh


def test_it_learns_and_goes_on_bitwise(home, tmp_path):
    shutil.copytree(home / "tuned", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/00000008")
    assert tune(home, tmp_path / "run", f"train.steps={STEPS}") == DONE
    assert runs.losses(tmp_path / "run") == runs.losses(home / "tuned")
    ours, theirs = runs.checkpoint(tmp_path / "run", STEPS), runs.checkpoint(home / "tuned", STEPS)
    runs.assert_same_arrays(ours, theirs)
    base = runs.evaluations(home / "base")[STEPS]
    assert runs.evaluations(home / "tuned")[STEPS] < base


def test_it_goes_on_on_a_mesh_as_on_one_device(home, tmp_path):
    shutil.copytree(home / "tuned", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/00000008")
    mesh = ("mesh.fsdp=2", "mesh.tensor=2")
    assert tune(home, tmp_path / "run", f"train.steps={STEPS}", *mesh, devices=4) == DONE
    runs.assert_near(runs.losses(tmp_path / "run"), runs.losses(home / "tuned"))


def test_another_base_is_refused(home, tmp_path, capsys):
    shutil.copytree(home, tmp_path / "other")
    step = next((tmp_path / "other/base/checkpoints").glob("*8/manifest.json"))
    shutil.rmtree(step.parent)  # so that an earlier one is the newest
    other = home.parent / "other"
    shutil.move(home / "base", home / "kept")
    shutil.move(tmp_path / "other/base", home / "base")
    try:
        assert tune(home, home / "tuned", f"train.steps={STEPS + 2}") == MISTAKE
        assert "weights.digest" in (said := capsys.readouterr().err)
        assert len(said.strip().splitlines()) == 1
        with pytest.raises(ValueError, match=r"than those that the adapters were trained on .* fit no other base"):
            find_model(home / "tuned", HERE).open()
        with pytest.raises(ValueError, match=r"tuned was trained on other weights .* adapters fit no other base"):
            beside(home / "base").read("tuned", home / "tuned")
    finally:
        shutil.rmtree(home / "base")
        shutil.move(home / "kept", home / "base")
    assert not other.exists()


def test_merged_exported_and_imported_it_gives_the_same_logits(home, tmp_path, capsys):
    theirs = logits(home / "tuned")
    near = lambda path: np.testing.assert_allclose(logits(path), theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())
    (home / "tuned/reference.npz").write_bytes(b"kept")  # as a run on preferences keeps it
    assert main(parse(["merge", str(home / "tuned"), "merged", *HERE])) == DONE
    assert Path("merged/reference.npz").read_bytes() == b"kept"
    near(Path("merged"))
    assert main(parse(["export", str(home / "tuned"), "peft", *HERE])) == DONE
    assert json.loads(Path("peft/adapter_config.json").read_text())["use_dora"] is True
    assert main(parse(["import", "peft", "again", "--base", str(home / "base"), *HERE])) == DONE
    near(Path("again"))
    reader = beside(home / "base")
    run, published = reader.read("run", home / "tuned"), reader.read("peft", Path("peft"))
    assert (run.rank, run.stretched, run.values.keys()) == (2, True, published.values.keys())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), run.values, published.values)
    capsys.readouterr()
    assert main(parse(["export", str(home / "base"), "none"])) == MISTAKE
    assert "base has no adapters: adapter.kind=none" in capsys.readouterr().err
    assert not Path("none").exists()
    settings = json.loads(Path("peft/adapter_config.json").read_text()) | {"bias": "all"}
    Path("peft/adapter_config.json").write_text(json.dumps(settings))
    assert main(parse(["import", "peft", "none", "--base", str(home / "base"), *HERE])) == MISTAKE
    assert "bias='all' is not known here" in capsys.readouterr().err


def test_layers_without_an_adapter_compute_as_the_base(home, capsys):
    """An adapter of DoRA in the second of two layers: imported, the first is that of the base."""
    assert main(parse(["merge", str(home / "tuned"), "merged", *HERE])) == DONE
    assert main(parse(["export", str(home / "tuned"), "peft", *HERE])) == DONE
    tensors = load_file("peft/adapter_model.safetensors")
    save_file({name: x for name, x in tensors.items() if ".layers.0." not in name}, "peft/adapter_model.safetensors")
    assert main(parse(["import", "peft", "again", "--base", str(home / "base"), *HERE])) == DONE
    merged, base = (find_model(path, HERE).open() for path in ("merged", home / "base"))
    first_of = lambda base, ours: jnp.concatenate([base[:1], ours[1:]])
    layers = jax.tree.map(first_of, base.params["layers"], merged.params["layers"])
    theirs = logits_of(replace(base, params=base.params | {"layers": layers}))
    np.testing.assert_allclose(logits(Path("again")), theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())


def test_scales_and_beginnings_are_read_as_peft_reads_them(tmp_path):
    """Patterns are regular expressions, of which the first that fits counts; what changes the base is refused."""
    scale = lambda **patterns: peft_format._scale({"lora_alpha": 8, "alpha_pattern": patterns}, "model.layers.0.q", 4)
    assert scale(**{r"layers\.0\..*q": 64}) == 16
    assert scale(**{"q": 12, "layers.0.q": 64}) == 3
    assert scale(**{"yers.0.q": 64}) == 2
    with pytest.raises(ValueError, match=r"alpha_pattern '\(q' is no regular expression"):
        scale(**{"(q": 1})
    for name, value in {"init_lora_weights": "pissa_niter_4", "use_qalora": True}.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", name: value}))
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            peft_format.open_published(tmp_path)


def test_what_cannot_be_switched_by_request_is_one_clear_line(home, tmp_path):
    reader = AdapterReader(find_model(home / "base", HERE))
    with pytest.raises(ValueError, match=r"base has no adapters: adapter.kind=none"):
        reader.check("x", home / "base")
    with pytest.raises(ValueError, match=r"text is no run directory \(no config.yaml\), nor a folder of peft"):
        reader.check("x", home / "text")
    with pytest.raises(ValueError, match=r"tuned has adapters of its own \(adapter.kind=lora\): serve its base .*base"):
        AdapterReader(find_model(home / "tuned", HERE))
    edited = yaml.safe_load((home / "tuned/config.yaml").read_text())

    def told(name: str, **changes) -> str:
        (tmp_path / name).mkdir()
        adapter = changes.pop("adapter", {"kind": "lora", "rank": 2})
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({**edited, "adapter": adapter, **changes}))
        with pytest.raises(ValueError) as refused:
            AdapterReader(find_model(home / "base", HERE)).check(name, tmp_path / name)
        return str(refused.value)

    assert "adapters of kind ia3 are not switched by request; lora, rslora, " in told("ia3", adapter={"kind": "ia3"})
    also = {"kind": "lora", "rank": 2, "also": ["final_norm/*"]}
    assert "has trained the model's own final_norm/scale: merge it" in told("also", adapter=also)
    assert "stands on the weights that its seed draws" in told("seed", weights={})
    wider = {**edited["model"], "ffn": 32}
    assert "is of another model than" in told("wider", model=wider)
    quantised = {"kind": "lora", "rank": 2, "base": "nf4", "group": 8}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**edited, "adapter": quantised}))
    reader.check("tuned", home / "tuned")
    with pytest.raises(ValueError, match=r"codes was trained on a base in nf4, and tuned on one in float: serve them"):
        reader.check("codes", tmp_path)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"adapter": {"kind": "lora", "rank": 2, "also": ["final_norm/*"]}}, "final_norm/scale"),
        ({"model": {"head": "classes", "labels": 2}}, "head_labels/weight"),
    ],
    ids=["also", "head"],
)
def test_what_peft_has_no_place_for_is_not_left_out(home, tmp_path, capsys, changes, trained):
    settings = runs.saved_config(home / "tuned")
    settings = {**settings, **changes, "model": settings["model"] | changes.get("model", {})}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(parse(["export", str(tmp_path), "peft", *HERE])) == MISTAKE
    assert f"has trained the model's own {trained}, and peft's files hold adapters alone" in capsys.readouterr().err
    assert not Path("peft").exists()


def test_a_run_with_adapters_is_no_base(home, tmp_path, capsys):
    arguments = [a for a in runs.overrides(home / "text", tmp_path / "run") if not a.startswith("model.")]
    assert runs.run([*arguments, f"model.from={home / 'tuned'}"], devices=1) == MISTAKE
    assert "holds adapters: make a whole model of them with python -m finetune merge" in capsys.readouterr().err
