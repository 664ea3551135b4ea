"""The adapter against sums of single next-token probabilities, and the project's own tasks."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from data.tokenizer import ByteTokenizer
from evaluation.harness import MeshModel
from evaluation.options import own_tasks
from evaluation.scoring import Scorer
from evaluation.suite import load_tasks, run_tasks

REACH = 24
BEGIN = 1
MINE = "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: a.jsonl}}"


class Letters(ByteTokenizer):
    """Bytes below 97, so that the tiny model knows them."""

    vocab_size = 97

    def encode(self, text):
        return super().encode(text) % 97


def instances(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@pytest.fixture
def adapter(description, params, on_mesh):
    with on_mesh() as mesh:
        scorer = Scorer(description, params, mesh, jnp.float32)
        yield MeshModel(scorer, Letters(), REACH)


def likelihood(next_token, ids, count):
    """Of the last `count` ids, and whether they are greedy; only REACH tokens are read at once."""
    ids = ids[-(REACH + 1) :]
    logs = [next_token(ids[:at]) for at in range(len(ids) - count, len(ids))]
    tokens = ids[-count:]
    greedy = all(int(np.argmax(log)) == token for log, token in zip(logs, tokens, strict=True))
    return sum(float(log[token]) for log, token in zip(logs, tokens, strict=True)), greedy


def test_log_likelihoods(adapter, next_token):
    encode = lambda text: Letters().encode(text).tolist()
    best = encode("AB")
    greedy = chr(int(np.argmax(next_token(best))))
    asked = [("AB", "CD"), ("AB", "CDE"), ("AB", "CD"), ("", "XY"), ("A" * 40, "BC"), ("AB", greedy), ("A B ", "C")]
    found = adapter.loglikelihood(instances("loglikelihood", *asked))
    whole = [([0] if not context else []) + encode(context + text) for context, text in asked]
    counts = [len(text) for _, text in asked]
    counts[-1] += 1  # the space before it goes with the continuation
    expected = [likelihood(next_token, ids, count) for ids, count in zip(whole, counts, strict=True)]
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], rtol=1e-5)
    assert [flag for _, flag in found] == [flag for _, flag in expected]
    assert found[5][1]


def test_what_a_model_wants_before_a_text(adapter, next_token):
    adapter.begin = [BEGIN]
    (found,) = adapter.loglikelihood(instances("loglikelihood", ("AB", "C")))
    (empty,) = adapter.loglikelihood(instances("loglikelihood", ("", "C")))
    ids = Letters().encode("ABC").tolist()
    assert found[0] == pytest.approx(float(next_token([BEGIN, *ids[:2]])[ids[2]]), rel=1e-5)
    assert empty[0] == pytest.approx(float(next_token([BEGIN])[ids[2]]), rel=1e-5)


def test_equal_inputs_are_read_once(adapter, monkeypatch):
    read = []
    whole = adapter.scorer.scores_of
    monkeypatch.setattr(adapter.scorer, "scores_of", lambda rows, *more: read.extend(rows) or whole(rows, *more))
    adapter.loglikelihood(instances("loglikelihood", ("ABC", "D"), ("ABC", "E"), ("ABC", "F"), ("ABC", "DE")))
    assert len(read) == 2


def test_rolling_covers_a_text_once(adapter, next_token):
    text = "the mesh is not a hyperparameter, and this is longer than one window"
    ids = [0, *Letters().encode(text).tolist()]
    expected = 0.0
    for first in range(1, len(ids), REACH):  # disjoint windows; the last one reaches back
        last = min(first + REACH, len(ids))
        start = max(0, last - 1 - REACH)
        expected += sum(float(next_token(ids[start:at])[ids[at]]) for at in range(first, last))
    found = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("A",), ("",)))
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == pytest.approx(float(next_token([0])[65]), rel=1e-5)
    assert found[2] == 0


def test_texts_end_at_a_stop_string_or_their_length(adapter, next_token):
    def greedy(context, count):
        ids = Letters().encode(context).tolist()
        for _ in range(count):
            ids.append(int(np.argmax(next_token(ids))))
            if ids[-1] == 0:
                return Letters().decode(ids[len(context) : -1])
        return Letters().decode(ids[len(context) :])

    contexts = ["AB", "Hello", "x"]
    free = [greedy(context, 18) for context in contexts]
    settings = {"until": [], "max_gen_toks": 18}
    found = adapter.generate_until(instances("generate_until", *((context, settings) for context in contexts)))
    assert found == free
    stop = free[1][3:5]
    settings = {"until": stop, "max_gen_toks": 18}
    (found,) = adapter.generate_until(instances("generate_until", ("Hello", settings)))
    assert found == free[1].split(stop)[0]
    long = "A" * 50  # loses its beginning
    (found,) = adapter.generate_until(instances("generate_until", (long, {"max_gen_toks": 4})))
    assert found == greedy("A" * (REACH - 4), 4)
    with pytest.raises(ValueError, match="30 new tokens and the model reads 24 at once"):
        adapter.generate_until(instances("generate_until", ("A", {"max_gen_toks": 30})))


def test_own_tasks_are_whole():
    """Of each, 40 to 100 items, no item twice, and an answer that is one of the choices."""
    tasks = load_tasks(["offline"])
    assert set(tasks) == set(own_tasks())
    for name, task in tasks.items():
        docs = list(task.eval_docs)
        assert 40 <= len(docs) <= 100, name
        assert len({json.dumps(doc, sort_keys=True) for doc in docs}) == len(docs), name
        for doc in docs:
            if "choices" in doc:
                assert len(set(doc["choices"])) == len(doc["choices"]) == 4
                assert 0 <= doc["answer"] < 4
            else:
                assert all(isinstance(value, str) and value for value in doc.values())
                assert len(set(doc.values())) == 2


def test_arithmetic_and_patterns_are_right():
    tasks = load_tasks(["arithmetic", "patterns"])
    for doc in tasks["arithmetic"].eval_docs:
        sum_ = doc["text"].removeprefix("What is ").rstrip("?")
        for word, sign in (("plus", "+"), ("minus", "-"), ("times", "*")):
            sum_ = sum_.replace(word, sign)
        assert doc["choices"][doc["answer"]] == str(eval(sum_))
    for doc in tasks["patterns"].eval_docs:
        *seen, last = [*doc["text"].rstrip(",").split(", "), doc["next"]]
        if last.isdecimal():
            assert len({int(b) - int(a) for a, b in zip(seen, [*seen[1:], last], strict=True)}) == 1


class Oracle(MeshModel):
    """Finds what `right` says likely, and writes what it says."""

    def __init__(self, right):
        super().__init__(None, ByteTokenizer(), 1 << 20)
        self.right = right

    def loglikelihood(self, requests, disable_tqdm=True):
        return [(0.0, True) if one.args[1].strip() in self.right else (-9.0, False) for one in requests]

    def generate_until(self, requests, disable_tqdm=False):
        return [" " + self.right[one.args[0]] for one in requests]


def test_who_knows_all_answers_gets_every_point_and_who_knows_none_gets_no_point():
    tasks = load_tasks(["offline"])
    right = {}
    for task in tasks.values():
        for doc in task.eval_docs:
            if "choices" in doc:
                right[doc["choices"][doc["answer"]]] = None
            right |= {doc[key]: None for key in ("good", "word") if key in doc}
            right |= {doc["text"]: doc["next"]} if "next" in doc else {}
    # a right answer of one item may be a wrong choice of another: each multiple choice is asked alone
    for name, task in tasks.items():
        if name in ("capitals", "arithmetic", "opposites", "common_sense"):
            continue
        outcome = run_tasks(Oracle(right), {name: task})[name]
        metric = outcome.metrics.get("acc") or outcome.metrics["exact_match"]
        assert (metric.value, metric.stderr) == (1.0, 0.0), name
    nothing = run_tasks(Oracle(dict.fromkeys((doc["text"] for doc in tasks["patterns"].eval_docs), "?")), tasks)
    assert nothing["cloze"].metrics["acc"].value == 0
    assert nothing["cloze"].metrics["perplexity"].value == pytest.approx(math.exp(9))
    assert nothing["patterns"].metrics["exact_match"].value == 0


def test_values_are_means_of_items_with_their_standard_error():
    tasks = load_tasks(["capitals"])
    found = run_tasks(Oracle(dict.fromkeys(["Paris", "Berlin", "Lyon"])), tasks, limit=12)["capitals"]
    values = found.items["acc"]
    assert found.count == len(values) == len(set(found.ids)) == 12
    assert found.metrics["acc"].value == pytest.approx(values.mean())
    assert found.metrics["acc"].stderr == pytest.approx(values.std(ddof=1) / math.sqrt(12))
    again = run_tasks(Oracle({}), tasks, limit=12)["capitals"]
    assert again.digest == found.digest
    assert again.ids == found.ids
    assert run_tasks(Oracle({}), tasks, limit=11)["capitals"].digest != found.digest


@pytest.mark.parametrize(
    ("text", "data", "message"),
    [
        (MINE.replace("a.jsonl", "gone.jsonl"), "", "gone.jsonl"),
        (MINE, "{", "a.jsonl, line 1: not JSON"),
        (MINE, "{}\n7", "line 2: not an object"),
        ("dataset_path: json", "", "it has no task: NAME"),
        ("task: [", "", "mine.yaml"),
    ],
)  # fmt: skip
def test_mistakes_in_a_task_file(tmp_path, text, data, message):
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "a.jsonl").write_text(data)
    with pytest.raises(ValueError) as error:
        load_tasks([str(tmp_path / "mine.yaml")])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_tasks_of_ones_own_are_found_with_their_data_beside_them(tmp_path, monkeypatch):
    text = own_tasks()["capitals"].read_text().replace("capitals", "towns")
    (tmp_path / "towns.yaml").write_text(text)
    (tmp_path / "towns.jsonl").write_text(own_tasks()["capitals"].with_suffix(".jsonl").read_text())
    monkeypatch.chdir("/")
    for name in (tmp_path, tmp_path / "towns.yaml"):
        assert len(list(load_tasks([str(name)])["towns"].eval_docs)) == 60
    with pytest.raises(ValueError, match="two tasks are called towns"):
        load_tasks([str(tmp_path), str(tmp_path / "towns.yaml")])
