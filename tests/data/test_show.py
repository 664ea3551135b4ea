"""python -m data show: what it prints is what the run reads; mistakes are one line."""

import json

import numpy as np
import pytest

from config import compose
from data.__main__ import main
from data.commands.show import END, VISIBLE, documents_of, in_words, token_text
from data.opening import open_corpora
from data.streams import training_stream
from data.tokenizer import ByteTokenizer

SETTINGS = ("data.source=mixture", "data.segments=true", "data.packing=best_fit", "train.seq_len=64")


@pytest.fixture
def settings(tmp_path):
    for name in ("ab", "xy"):
        texts = [name * (1 + 5 * i % 24) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sources = ", ".join(f"{name}: {{path: {tmp_path}/{name}.jsonl}}" for name in ("ab", "xy"))
    return [*SETTINGS, f"data.mixture={{{sources}}}", f"data.cache={tmp_path}/cache", "data.heldout=0.2"]


def test_it_prints_the_rows_of_the_step(settings, capsys):
    assert main(["show", *settings, "--step", "3", "--rows", "5"]) == 0
    printed = capsys.readouterr().out
    assert "packing of ab: best_fit" in printed
    config = compose.load(settings)
    corpora = open_corpora(config.data, config.tokenizer)
    stream = training_stream(config.data, corpora, seq_len=64, batch_size=config.train.batch_size, seed=config.seed)
    batch, names = stream.batch(2), stream.names(2)
    rows = printed.split("\nrow ")[1:]
    assert len(rows) == 5
    for number, row in enumerate(rows):
        assert row.startswith(f"{number} · {names[number]} · ")
        text = ByteTokenizer().decode(batch["tokens_BT"][number][batch["segments_BT"][number] > 0]).translate(VISIBLE)
        said = "".join(line.split("  ")[-1] for line in row.splitlines()[1:] if "nothing" not in line)
        assert said.replace(END, "") == text
        assert f"{int(batch['mask_BT'][number].sum())} of 64 targets count" in row


def test_targets_that_do_not_count_are_reversed_and_documents_have_their_positions():
    row = {
        "tokens_BT": np.array([*b"hi\0you", 0, 0]),
        "segments_BT": np.array([1, 1, 1, 2, 2, 2, 0, 0]),
        "places_BT": np.array([0, 1, 2, 0, 1, 2, 0, 0]),
        "mask_BT": np.array([1, 1, 0, 1, 1, 0, 0, 0]),
    }
    first, second, nothing = documents_of(row, ByteTokenizer())
    assert (first.plain, second.plain) == (f"  1  0-2  hi{END}", "  2  0-2  you")
    assert nothing.plain.endswith("2 x nothing")
    reversed_ = [second.plain[span.start : span.end] for span in second.spans if "reverse" in str(span.style)]
    assert reversed_ == ["u"]
    assert in_words(row) == "2 documents · 4 of 8 targets count · 2 places are empty"


def test_tokens_are_printable():
    tokenizer = ByteTokenizer()
    shown = [token_text(tokenizer, token) for token in range(256)]
    assert all(text.isprintable() and text for text in shown)
    assert shown[ord("\n")] == "⏎"
    assert shown[27] == "�"


def test_it_draws(settings, tmp_path, capsys):
    picture = tmp_path / "new" / "batch.png"
    assert main(["show", *settings, "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == ["batch.png"]
    assert main(["show", f"data.cache={tmp_path}/cache", "data.source=text", f"data.path={tmp_path}/ab.jsonl"]) == 0
    assert "documents are not kept apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0"], "error: --step 0: the run has steps 1 to train.steps=500"),
        (["--step", "501"], "error: --step 501: the run has steps 1 to train.steps=500"),
        (["--rows", "0"], "error: --rows 0: must be 1 or more"),
        (["--png", "batch.jpg"], "error: --png batch.jpg: the name of a picture ends in .png"),
        (["data.packing=concatenate", "train.seq_len=10000"], "error: data.mixture.ab: the training stream has"),
        (["data.packing=tight"], "error: data.packing=tight: choose one of concatenate, best_fit"),
    ],
)
def test_mistakes_are_one_line(settings, arguments, message, capsys):
    assert main(["show", *settings, *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("...")]
    assert len(error) == 1
    assert error[0].startswith(message)
