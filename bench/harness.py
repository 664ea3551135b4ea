"""The harness on the mesh beside the harness's own adapter for transformers: python bench/harness.py [--layers N ...].

Both get the same random Llama and tokenizer and answer the tasks of evaluation/tasks. Every measurement is a process
alone, and they take turns: ours, theirs, ours, theirs. One JSON line for each, and one with the ratios of medians and
the largest difference between log-likelihoods. Needs the extras `evaluation` and `compare`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
VOCABULARY = 4096
OURS = {"ours": (), "ours, compiling": ("runtime.compile_cache=null",)}  # with the compile cache, and without
LIKELY, WRITTEN = "loglikelihood", "generate_until"


def twins(folder: Path, sizes: dict[str, int]) -> tuple[Path, Path]:
    """The same random model and tokenizer twice: a run directory, and a folder that transformers opens.

    sizes: layers, width, heads, kv_heads, head_dim, ffn.
    """
    import jax
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from checkpoint.config import CheckpointConfig
    from checkpoint.store import CheckpointStore
    from config.compose import load, to_yaml
    from config.schema import Config, finish
    from data.corpus import documents
    from data.tokenizer import END_OF_TEXT, TokenizerConfig, train_bpe
    from model.config import ModelConfig

    run, theirs = folder / "run", folder / "theirs"
    run.mkdir(parents=True)
    texts = [document.text for _, document in zip(range(300), documents(load([]).data), strict=False)]
    tokenizer = train_bpe(texts, VOCABULARY)
    tokenizer.save(run / "tokenizer.json")
    names = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    PreTrainedTokenizerFast(tokenizer_file=str(run / "tokenizer.json"), **names).save_pretrained(theirs)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=sizes["width"], intermediate_size=sizes["ffn"],
            num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"], head_dim=sizes["head_dim"], tie_word_embeddings=True,
            max_position_embeddings=256, rms_norm_eps=1e-6, initializer_range=0.1,
            bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id,
        )
    )  # fmt: skip
    model.save_pretrained(theirs)
    config = finish(
        Config(
            model=ModelConfig(**sizes, vocab_size=VOCABULARY),
            tokenizer=TokenizerConfig("file", path=str(run / "tokenizer.json")),
            train=replace(Config().train, seq_len=256),
        )
    )
    (run / "config.yaml").write_text(to_yaml(config))
    with closing(CheckpointStore(run / "checkpoints", CheckpointConfig(asynchronous=False))) as store:
        weights = {name: w.numpy() for name, w in model.state_dict().items()}
        assert store.save(1, {"params": jax.tree.map(jax.numpy.asarray, _as_ours(weights, config.model))}, {})
    return run, theirs


def _as_ours(weights: dict[str, np.ndarray], c) -> dict:
    """A Llama's weights by our names and in our shapes; layers are stacked."""
    every = lambda name, shape: np.stack(
        [weights[f"model.layers.{i}.{name}.weight"].T.reshape(shape) for i in range(c.layers)]
    )
    one = lambda name, shape: {"weight": every(name, shape)}
    scale = lambda name: {"scale": every(name, (c.width,))}
    part = lambda letter, heads: one(f"self_attn.{letter}_proj", (c.width, heads, c.head_dim))
    return {
        "tokens": {"weight": weights["model.embed_tokens.weight"]},
        "final_norm": {"scale": weights["model.norm.weight"]},
        "layers": {
            "attention": {
                "query": part("q", c.heads),
                "key": part("k", c.kv_heads),
                "value": part("v", c.kv_heads),
                "out": one("self_attn.o_proj", (c.heads, c.head_dim, c.width)),
            },
            "attention_norm": scale("input_layernorm"),
            "ffn_norm": scale("post_attention_layernorm"),
            "ffn": {
                "gate": one("mlp.gate_proj", (c.width, c.ffn)),
                "up": one("mlp.up_proj", (c.width, c.ffn)),
                "down": one("mlp.down_proj", (c.ffn, c.width)),
            },
        },
    }


def ours(run: Path, *overrides: str) -> dict:
    """The tasks through our adapter, in this process."""
    import jax

    from evaluation.needs import harness
    from evaluation.scoring import Scorer
    from inference.opening import find_model

    suite = harness()
    found = find_model(run, overrides)
    tasks, model = suite.load_tasks(["offline"]), found.open()
    with jax.set_mesh(model.mesh):
        scorer = Scorer(model.description, model.params, model.mesh, model.dtype)
        adapter = suite.MeshModel(scorer, model.tokenizer, found.reach)
        return _measured(adapter, tasks)


def theirs(folder: Path, batch: int) -> dict:
    """The tasks through the harness's adapter for transformers, in this process."""
    from evaluation.needs import harness

    suite = harness()
    from lm_eval.models.huggingface import HFLM

    tasks = suite.load_tasks(["offline"])
    return _measured(HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch), tasks)


def _measured(adapter, tasks: dict) -> dict:
    """Seconds that the adapter took, and what it answered to each request by its kind."""
    answers: dict[str, list] = {}
    spent = 0.0

    def timed(kind: str):
        answer = getattr(adapter, kind)

        def call(requests, **options):
            nonlocal spent
            began = time.perf_counter()
            found = answer(requests, **options)
            spent += time.perf_counter() - began
            answers[kind] = [list(one) if isinstance(one, tuple) else one for one in found]
            return found

        return call

    from evaluation.suite import run_tasks

    for kind in (LIKELY, WRITTEN):
        setattr(adapter, kind, timed(kind))
    outcomes = run_tasks(adapter, tasks)
    metrics = {name: {m: v.value for m, v in task.metrics.items()} for name, task in outcomes.items()}
    return {"requests_s": spent, "answers": answers, "metrics": metrics}


def alone(*arguments: str) -> dict:
    """One measurement in a process of its own; `process_s` is all that a user waits."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, *arguments], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.perf_counter() - began}


def largest_difference(mine: dict, other: dict) -> float:
    """Between log-likelihoods of the same requests."""
    return max(abs(a - b) for (a, _), (b, _) in zip(mine[LIKELY], other[LIKELY], strict=True))


def differing(mine: list, other: list) -> int:
    """How many answers differ."""
    return sum(a != b for a, b in zip(mine, other, strict=True))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("layers", 8), ("width", 384), ("heads", 6), ("kv_heads", 2), ("head_dim", 64), ("ffn", 1024)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--batches", default="8,32", help="batch sizes of theirs; the best counts")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("WHO", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, folder = options.one
        made = theirs(Path(folder), options.batch) if who == "theirs" else ours(Path(folder), *OURS[who])
        print(json.dumps(made))
        return
    names = ("layers", "width", "heads", "kv_heads", "head_dim", "ffn")
    with tempfile.TemporaryDirectory() as folder:
        run, other = twins(Path(folder), {name: getattr(options, name) for name in names})
        found: dict[str, list[dict]] = {}
        for _ in range(options.rounds):
            kinds = [*((who, run, 1) for who in OURS), *(("theirs", other, int(b)) for b in options.batches.split(","))]
            for who, place, batch in kinds:
                one = alone("--one", who, str(place), "--batch", str(batch))
                label = who if who in OURS else f"theirs, batch {batch}"
                found.setdefault(label, []).append(one)
                seconds = {key: round(one[key], 2) for key in ("requests_s", "process_s")}
                print(json.dumps({"who": label} | seconds), flush=True)
    middle = lambda label, key: statistics.median(one[key] for one in found[label])
    best = min((label for label in found if label not in OURS), key=lambda label: middle(label, "requests_s"))
    mine, other = found["ours"][0]["answers"], found[best][0]["answers"]
    ratio = lambda key: round(middle(best, key) / middle("ours", key), 2)
    summary = {
        "best of theirs": best,
        "theirs / ours, requests": ratio("requests_s"),
        "theirs / ours, process": ratio("process_s"),
        "theirs / ours, compiling": round(middle(best, "requests_s") / middle("ours, compiling", "requests_s"), 2),
        "largest difference of log-likelihoods": largest_difference(mine, other),
        "greedy flags that differ": differing([flag for _, flag in mine[LIKELY]], [flag for _, flag in other[LIKELY]]),
        "texts that differ": differing(mine[WRITTEN], other[WRITTEN]),
        "requests": {kind: len(these) for kind, these in mine.items()},
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
