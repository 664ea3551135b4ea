"""Draws the loss of a run: python experiments/nano/plot.py RUN_DIR [OUT.png]."""

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

run = Path(sys.argv[1])
out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("loss.png")
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
train = [(row["tokens"], row["train/loss"] / math.log(2)) for row in rows if "train/loss" in row]
heldout = [(row["tokens"], row["eval/bits_per_byte"]) for row in rows if "eval/bits_per_byte" in row]

figure, axes = plt.subplots(figsize=(7, 3.4), dpi=130)
axes.plot(*zip(*train, strict=True), color="#9db7d5", linewidth=1.2, label="training batches")
axes.plot(*zip(*heldout, strict=True), color="#1f4e8c", marker="o", markersize=4, label="held-out files")
axes.annotate(f"{heldout[-1][1]:.2f}", heldout[-1], xytext=(0, 8), textcoords="offset points", ha="center")
axes.set_xlabel("tokens (bytes of Python source)")
axes.set_ylabel("bits per byte")
axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.1f}M")
axes.set_ylim(1.5, 6)
axes.grid(alpha=0.3)
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(out)
print(out)
