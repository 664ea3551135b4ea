"""Optima of a key by size: found where they are, refused where the grid does not hold them."""

import json
import math

import pytest

from scaling.__main__ import main
from scaling.transfer.optimum import transfers

RATES = [1e-3 * 2**n for n in range(7)]


def rows_of(name: str, best: dict[int, float], rates=RATES, seeds=1) -> list[dict]:
    """Losses with their minimum at `best` of each width, and a seed's own offset."""
    return [
        {"parametrization": name, "width": width, "lr": lr, "seed": seed}
        | {"loss": 3 + width**-0.5 + 0.01 * seed + 0.05 * math.log(lr / optimum) ** 2}
        for width, optimum in best.items()
        for lr in rates
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("exponent", [0.0, 0.3, 0.5])
def test_the_factor_is_found(exponent):
    best = {width: 9e-3 * (width / 64) ** -exponent for width in (64, 128, 512)}
    (found,) = transfers(rows_of("mup", best, seeds=2), "lr", "width", "parametrization")
    assert found.factor == pytest.approx(8**exponent)
    for optimum in found.optima:
        assert optimum.value == pytest.approx(best[optimum.size])
        assert optimum.loss == pytest.approx(3.005 + optimum.size**-0.5)
        assert optimum.by_seed == pytest.approx((optimum.value,) * 2)


def test_an_optimum_beyond_the_grid_is_refused():
    rows = rows_of("mup", {64: 8e-3, 512: 8e-3}) + rows_of("standard", {64: 8e-3, 512: 2e-4})
    mup, standard = transfers(rows, "lr", "width", "parametrization")
    assert mup.factor == pytest.approx(1)
    assert standard.factor is None
    assert "the lowest of 7 values, 0.001, is the best" in standard.optima[1].refused


def test_what_diverged_and_what_lacks_a_seed_is_left_out():
    rows = rows_of("mup", {64: 8e-3}, seeds=2)
    rows[-1]["loss"] = None  # at the highest rate
    (found,) = transfers(rows, "lr", "width", "parametrization")
    assert list(found.optima[0].losses) == RATES[:-1]
    with pytest.raises(ValueError, match="there twice"):
        transfers([*rows, rows[0]], "lr", "width", "parametrization")
    with pytest.raises(ValueError, match="2 values with every seed; a parabola needs 3"):
        transfers(rows_of("mup", {64: 1}, rates=RATES[:2]), "lr", "width", "parametrization")


def test_the_command(tmp_path, capsys):
    table = tmp_path / "results.jsonl"
    rows = rows_of("mup", {64: 8e-3, 512: 7e-3}) + rows_of("standard", {64: 8e-3, 512: 3e-3})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["transfer", str(table), "--json", str(tmp_path / "out.json"), "--png", str(tmp_path / "out.png")]) == 0
    assert "standard: the best lr moves by a factor of 2.67 from 64 to 512" in capsys.readouterr().out
    assert [round(one["factor"], 2) for one in json.loads((tmp_path / "out.json").read_text())] == [1.14, 2.67]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert main(["transfer", str(table), "--within", "1.5"]) == 1
    assert main(["transfer", str(table), "--within", "3"]) == 0
    capsys.readouterr()
    assert main(["transfer", str(table), "--key", "speed"]) == 2
    assert "no row with a loss has speed; there are: loss, lr," in capsys.readouterr().err
