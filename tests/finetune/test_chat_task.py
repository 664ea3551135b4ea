"""Dialogues through a template: whose words count, packed or not, and the same on every mesh."""

import functools
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from every import few_of
from tuning import SMALL, assert_same, trace

from config import compose
from data.chat import open_chat
from data.tokenizer import ByteTokenizer
from finetune.chats import marked
from finetune.examples import Sequences, Table
from finetune.opening import open_task
from finetune.table import LeftOut, Row

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def folder() -> Path:
    """A byte tokenizer with two special tokens and a template, and forty dialogues."""
    made, draw = Path(tempfile.mkdtemp()), random.Random(0)
    spec = json.loads(ByteTokenizer().as_json())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, name in enumerate(("<|im_start|>", "<|im_end|>"), 256):
        spec["added_tokens"].append({"id": number, "content": name, **flags})
    (made / "tokenizer.json").write_text(json.dumps(spec))
    (made / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    rows = []
    for _ in range(40):
        turns = [("user", "say " + draw.choice("abcd")), ("assistant", draw.choice("abcd") * 3)] * draw.randint(1, 2)
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (made / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def dialogues() -> list[Row]:
    lines = (folder() / "rows.jsonl").read_text().splitlines()
    return [Row(f"a:{i}", json.loads(line)) for i, line in enumerate(lines)]


def arguments(*more: str) -> list[str]:
    own = ["tokenizer=file", f"tokenizer.path={folder()}", f"task.path={folder()}/rows.jsonl", "task.heldout=0.2"]
    return ["task=chat", *SMALL, *own, "train.seq_len=128", "train.batch_size=4", *more]


one_device = functools.cache(lambda: trace(arguments()))


MESHES = [{"context": 2, "tensor": 2}, {"pipe": 2, "data": 2}]


@pytest.mark.parametrize("mesh", few_of(MESHES, MESHES[1:]), ids=str)
def test_the_mesh_changes_nothing(mesh):
    assert_same(trace(arguments(), **mesh), one_device())
    assert one_device().metrics["perplexity"] == pytest.approx(np.exp(one_device().metrics["loss"]))


def spelled(ids) -> str:
    names = {256: "<", 257: ">"}
    return "".join(names.get(int(i), chr(int(i)) if 31 < i < 127 else "~") for i in ids)


def test_only_the_words_of_the_asked_roles_count():
    template = open_chat(folder())
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yo"), ("user", "?"), ("assistant", "ok")]
    dialogue = [{"role": role, "content": content} for role, content in turns]

    def text(*roles, **how):
        ids, counts = marked(template, dialogue, roles, **how)
        return spelled(ids[counts])

    answer = lambda text: [*text, ">"]
    assert [c for c in text("assistant") if c in "yok>"] == [*answer("yo"), *answer("ok")]
    assert "hi" not in text("assistant")
    assert "hi" in text("user")
    assert "yo" not in text("assistant", last=True)
    whole, _ = marked(template, dialogue, ("assistant",))
    np.testing.assert_array_equal(whole, template.encode(dialogue))


def test_packed_dialogues_stand_whole_beside_each_other():
    config = compose.load(arguments())
    task = open_task(config)
    rows = dialogues()
    examples = [example for made in task.encode(rows, LeftOut()) for example in made]
    packed = Sequences(Table(rows, examples, LeftOut()), 128, packs=True)
    assert len(packed) < len(examples) / 1.5
    assert packed.fill > 0.75
    batch = packed.read(range(len(packed)))
    found = []
    for tokens, segments, places in zip(batch["tokens_BT"], batch["segments_BT"], batch["places_BT"], strict=True):
        for segment in range(1, segments.max() + 1):
            part = tokens[segments == segment]
            assert places[segments == segment].tolist() == list(range(len(part)))
            found.append(part.tobytes())
    assert sorted(found) == sorted(example.arrays["tokens_T"].tobytes() for example in examples)
    assert batch["mask_BT"].sum() == sum(example.arrays["mask_T"].sum() for example in examples)


def test_packing_changes_no_loss():
    """A row of two dialogues loses what the two lose alone: they do not see each other."""
    config = compose.load(arguments())
    task = open_task(config)
    import jax

    from parallel.mesh import make_mesh
    from parallel.sharding import put_batch
    from training.job import make_job
    from training.parity import ONE_DEVICE
    from training.step import hidden

    rows = dialogues()[:4]
    examples = [example for made in task.encode(rows, LeftOut()) for example in made]
    table = Table(rows, examples, LeftOut())
    with jax.set_mesh(mesh := make_mesh(ONE_DEVICE, jax.devices()[:1])):
        job = make_job(config, mesh)
        params, sums = job.init(0).params, []
        for packs in (True, False):
            sequences = Sequences(table, 128, packs=packs)
            batch = put_batch(mesh, sequences.read(range(len(sequences))), len(sequences))
            model, x_BTD, _ = hidden(job.description, config.train, params, batch)
            sums.append(float(task.loss(model, x_BTD, batch, config.train).nll))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "assistant"}, "content is neither a text nor a list of parts"),
        ({"role": "assistant", "content": None}, "content is neither a text nor a list of parts"),
        ({"role": "assistant", "content": {"a": 1}}, "content is neither a text nor a list of parts"),
        ({"from": "gpt", "content": "x"}, "a message without a role"),
        ({"role": ["assistant"], "content": "x"}, "a message without a role"),
        ({"role": "assistant", "content": "", "tool_calls": None}, ""),
        ({"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]}, ""),
    ],
)
def test_a_message_that_says_nothing_is_not_learned(message, said):
    task, left_out = open_task(compose.load(arguments())), LeftOut()
    (made,) = task.encode([Row("a:1", {"messages": [{"role": "user", "content": "x"}, message]})], left_out)
    assert said in left_out.told()
    assert bool(made) == (not said)


def test_what_cannot_be_used_is_told():
    task, left_out = open_task(compose.load(arguments())), LeftOut()
    user = {"role": "user", "content": "x"}
    rows = [Row("a:1", {"messages": "text"}), Row("a:2", {"messages": [user]})]
    assert task.encode(rows, left_out) == [[], []]
    assert "no list of messages" in left_out.told()
    assert "nothing is said by assistant" in left_out.told()
    with pytest.raises(ValueError, match="there is no chat template"):
        open_task(compose.load(["task=chat", *SMALL, "task.path=a.jsonl"]))
