"""The order of runs, ratios, and that every peer is given the same model."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bench import peers
from config import compose
from model.counts import parameter_count

sys.path.append(str(Path(peers.__file__).parent / "peers"))  # where the scripts of the peers find each other

import handwritten
import isomesh
from work import WORKS, batch, measure

PARAMETERS = {"gpt2": 124_439_808, "llama": 56_369_664}


def lines(**speeds: tuple[float, ...]) -> list[dict]:
    about = {"work": "gpt2", "dtype": "float32"}
    return [{**about, "peer": peer, "tokens_per_s": s} for peer, several in speeds.items() for s in several]


def test_runs_take_turns():
    assert peers.order(["torch", "handwritten"], 2) == [
        *((0, peer) for peer in ("isomesh", "torch", "handwritten")),
        *((1, peer) for peer in ("isomesh", "torch", "handwritten")),
    ]


def test_ratios_are_of_medians_and_keep_the_spread():
    (line,) = peers.ratios(lines(isomesh=(100, 300, 120), torch=(50, 60, 600)))
    assert line["ratio"] == 120 / 60
    assert (line["low"], line["high"], line["rounds"]) == (120 / 600, 300 / 60, 3)
    assert (line["peer"], line["isomesh_tokens_per_s"], line["peer_tokens_per_s"]) == ("torch", 120, 60)


def test_every_peer_has_its_script():
    for peer in peers.PEERS.values():
        assert (Path(peers.__file__).parent / "peers" / peer.script).is_file()


def test_unknown_and_missing_peers_are_told(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--peers nobody is unknown; choose of handwritten, torch"):
        peers.main(peers.parse(["--peers", "nobody"]))
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="python bench/peers.py --install torch"):
        peers.main(peers.parse(["--peers", "torch"]))


def test_a_peer_that_fails_is_named(monkeypatch):
    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer("work.py", ("--nonsense",)))
    failed = subprocess.CompletedProcess([], 3, "", "no such thing")
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ValueError, match="broken failed with 3: no such thing"):
        peers.run("broken", "gpt2", "float32", 1)


@pytest.mark.parametrize("name", WORKS)
def test_all_train_the_same_model(name):
    shapes = jax.eval_shape(lambda key: handwritten.init(WORKS[name], key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == PARAMETERS[name]
    for dtype in ("float32", "bfloat16"):
        asked = compose.load(isomesh.overrides(WORKS[name], dtype))
        assert parameter_count(asked.model).total == PARAMETERS[name]
        assert (asked.train.batch_size, asked.train.seq_len) == (WORKS[name].batch_size, WORKS[name].seq_len)
        assert (asked.train.compute_dtype, asked.optimizer.name, asked.optimizer.clip_norm) == (dtype, "adamw", 1.0)


def test_warm_up_is_not_timed():
    work = WORKS["llama"]
    seen = []
    found = measure(work, lambda tokens, targets: seen.append(tokens.shape) or 1.0, steps=3)
    assert len(seen) == 5
    assert len(found["step_s"]) == 3
    tokens, targets = batch(work, 7)
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    assert (tokens != batch(work, 8)[0]).any()
