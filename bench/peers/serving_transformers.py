"""transformers' generate: python serving_transformers.py FOLDER DTYPE DEVICE < JOB; see bench/serving.py.

Requests that run at once are one left-padded batch, which lasts until the longest of its answers is there.
"""

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

PAD = 0


class Clock(StoppingCriteria):
    """Writes down when each token came, and ends a row that has as many as were asked for."""

    def __init__(self, width: int, asked: list[int], began: float):
        self.width, self.asked, self.began = width, torch.tensor(asked), began
        self.times = []

    def __call__(self, input_ids, scores, **_):
        new = input_ids.shape[1] - self.width
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.began)
        return (new >= self.asked).to(input_ids.device)


@torch.inference_mode()
def answer(model, requests: list[dict], began: float) -> list[dict]:
    """Requests as one batch."""
    width, longest = max(len(one["prompt"]) for one in requests), max(one["new"] for one in requests)
    ids_BT = torch.full((len(requests), width), PAD)
    mask_BT = torch.zeros_like(ids_BT)
    for row, one in enumerate(requests):
        ids_BT[row, width - len(one["prompt"]) :] = torch.tensor(one["prompt"])
        mask_BT[row, width - len(one["prompt"]) :] = 1
    clock = Clock(width, [one["new"] for one in requests], began)
    out_BT = model.generate(
        ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), max_new_tokens=longest, do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip
    rows = out_BT[:, width:].tolist()
    return [
        {"tokens": row[: one["new"]], "times": clock.times[: one["new"]]}
        for row, one in zip(rows, requests, strict=True)
    ]


def serve(model, requests: list[dict], slots: int) -> dict:
    """Requests in batches of as many as run at once."""
    began, answers = time.perf_counter(), []
    for first in range(0, len(requests), slots):
        answers += answer(model, requests[first : first + slots], began)
    return {"seconds": time.perf_counter() - began, "answers": answers}


def main() -> None:
    folder, dtype, device = sys.argv[1:]
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    for work in job["works"]:
        serve(model, [one | {"new": 2} for one in work["requests"][: work["slots"]]], work["slots"])  # warm
        runs = [serve(model, work["requests"], work["slots"]) for _ in range(work["repeats"])]
        print(json.dumps({"name": work["name"], "runs": runs}), flush=True)


if __name__ == "__main__":
    main()
