"""isomesh's engine: python serving_isomesh.py FOLDER DTYPE < JOB; see bench/serving.py."""

import json
import queue
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from inference.engine import Engine
from inference.engine_options import EngineOptions
from inference.opening import find_model
from inference.requests import Request, Sampling


def serve(engine: Engine, requests: list[dict], slots: int) -> dict:
    """Requests as they are, but never more than `slots` of them at a time."""
    came, answers = queue.SimpleQueue(), [{"tokens": [], "times": []} for _ in requests]
    began, following, running = time.perf_counter(), 0, 0
    while following < len(requests) or running:
        while following < len(requests) and running < slots:
            asked = requests[following]
            sampling = Sampling(max_tokens=asked["new"], temperature=0, ignore_eos=True)
            told = lambda piece, number=following: came.put((number, time.perf_counter() - began, piece))
            engine.submit(Request(f"r{began}-{following}", tuple(asked["prompt"]), sampling), told)
            following, running = following + 1, running + 1
        number, at, piece = came.get()
        answers[number]["tokens"] += piece.tokens
        answers[number]["times"] += [at] * len(piece.tokens)
        assert piece.finish in (None, "length"), piece
        running -= piece.finish is not None
    return {"seconds": time.perf_counter() - began, "answers": answers}


def main() -> None:
    path, dtype = sys.argv[1:]
    job = json.load(sys.stdin)
    found = find_model(path)
    train = replace(found.config.train, param_dtype=dtype, compute_dtype=dtype)
    opened = replace(found, config=replace(found.config, train=train)).open()
    # Each work is timed with the whole prompt computed: no request may profit from the one before it.
    options = EngineOptions(max_running=job["slots"], max_length=job["longest"], prefix_sharing=False, **job["engine"])
    engine = Engine(opened, options)
    began = time.perf_counter()
    engine.start()
    print(json.dumps({"name": "start", "seconds": time.perf_counter() - began}), flush=True)
    for work in job["works"]:
        serve(engine, [one | {"new": 2} for one in work["requests"][: work["slots"]]], work["slots"])  # warm
        runs = [serve(engine, work["requests"], work["slots"]) for _ in range(work["repeats"])]
        print(json.dumps({"name": work["name"], "runs": runs}), flush=True)
    print(json.dumps({"name": "end", "compiles": engine.state().compiles}), flush=True)
    engine.stop(1)


if __name__ == "__main__":
    main()
