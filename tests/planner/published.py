"""Published tables as rows that a planner can be asked for: what was run, on what, and how long a step took."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from config import compose
from config.schema import Config
from model.counts import flops_per_token
from planner.cost import Planner, Prediction
from planner.machine import open_machine
from planner.search import pins_of, search
from planner.software import program

TABLES = Path(__file__).parent / "tables"
GPT = (
    *("model.activation=gelu", "model.norm=layer", "model.bias=all", "model.positions=learned"),
    *("model.scan_layers=true", "optimizer=adamw"),
)
LLAMA_405B = ("model=llama3_70b", "model.layers=126", "model.width=16384", "model.heads=128", "model.ffn=53248")
LLAMA2_70B = ("model=llama3_70b", "model.vocab_size=32000")


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    run: tuple[str, ...]  # the model and the batch
    layout: tuple[str, ...]  # what the table says of the layout
    hardware: str
    devices: int
    program: str
    step: float  # seconds
    parameters: float | None = None  # billions, as the table has them
    flops: float | None = None  # of a step, by the paper's formula
    free: tuple[str, ...] = ()  # what the program cannot do otherwise: kept when layouts are searched
    memory: float | None = None  # bytes of a device, as the table has them
    domain: int | None = None  # devices of one slice, where it is not as large as it can be

    def planner(self) -> Planner:
        """For this row's run and machine."""
        machine = open_machine(self.hardware, calibrated=False)
        machine = replace(machine, domain=self.domain or machine.domain)
        return Planner(
            config_of(self.run + self.layout), machine, self.devices, program(self.program, machine.platform)
        )

    def prediction(self) -> Prediction:
        """Of the published layout, with the best of what the table does not say."""
        planner = self.planner()
        found = search(planner, pins_of(planner.config, list(self.run + self.layout)))
        return planner.predict((found.fitting or found.too_large)[0].layout)

    def place(self, *, shards_held: bool = False) -> int | None:
        """Where the published mesh stands among all, with data, fsdp and expert as one: 1 is the best. A mesh counts
        once, with the best of its schedules and microbatches. `shards_held`: among those with as many shards of the
        batch, where a table has a fixed local batch or as many replicas in every row.
        """
        asked = {
            word.partition("=")[0]: int(word.partition("=")[2]) for word in self.layout if word.startswith("mesh.")
        }
        planner, seen = self.planner(), []
        shards = tuple(word for word in self.layout if word.startswith(("mesh.data=", "mesh.fsdp=")))
        held = shards if shards_held else ()
        for weighed in search(planner, pins_of(planner.config, list(self.run + self.free + held))).fitting:
            mesh = (weighed.layout.tensor, weighed.layout.pipe, weighed.layout.context)
            if mesh not in seen:
                seen.append(mesh)
        wanted = asked["mesh.tensor"], asked["mesh.pipe"], asked["mesh.context"]
        return seen.index(wanted) + 1 if wanted in seen else None


GROUPS = ("model", "train", "optimizer", "mesh", "pipeline")


@lru_cache(64)
def _preset(words: tuple[str, ...]) -> Config:
    return compose.load(list(words))


@lru_cache(256)
def config_of(words: tuple[str, ...]) -> Config:
    """The config of these overrides; each choice of presets is composed once, which is what takes time."""
    presets = tuple(word for word in words if "." not in word.partition("=")[0])
    keys = [word for word in words if word not in presets]
    return compose.overridden(_preset(presets), keys, GROUPS)


def _read(name: str) -> Iterator[dict[str, str]]:
    with (TABLES / name).open() as file:
        yield from csv.DictReader(file)


def _gpt(row: dict[str, str], seq: int, vocabulary: int) -> tuple[str, ...]:
    width, heads = int(row["hidden"]), int(row["heads"])
    sizes = {"layers": row["layers"], "width": width, "heads": heads, "kv_heads": heads, "head_dim": width // heads}
    sizes |= {"ffn": 4 * width, "vocab_size": vocabulary, "max_positions": seq}
    model = tuple(f"model.{key}={value}" for key, value in sizes.items())
    return (*model, f"train.seq_len={seq}", f"train.batch_size={row['global_batch']}", *GPT)


def _mesh(tensor: int, pipe: int, data: int, fsdp: int = 1, context: int = 1) -> tuple[str, ...]:
    sizes = {"tensor": tensor, "pipe": pipe, "data": data, "fsdp": fsdp, "context": context}
    return tuple(f"mesh.{axis}={size}" for axis, size in sizes.items())


def _megatron(file: str, seq: int, vocabulary: int, times: float, **row_of) -> list[Row]:
    rows = []
    for row in _read(file):
        tensor, pipe, devices = int(row["tp"]), int(row["pp"]), int(row["gpus"])
        L, D, B = int(row["layers"]), int(row["hidden"]), int(row["global_batch"])
        # arXiv 2104.04473, equation 3; `times` 72, or 96 with recomputation, which the head does not have
        head = vocabulary / (16 * L * D) if times == 96 else vocabulary / (12 * L * D)
        flops = times * B * seq * L * D**2 * (1 + seq / (6 * D) + head)
        step = flops / (devices * float(row["tflops_per_gpu"]) * 1e12)
        free = ("mesh.fsdp=1", "mesh.context=1", row_of["remat"])
        layout = (*_mesh(tensor, pipe, devices // tensor // pipe), row_of["remat"])
        layout += ("pipeline.schedule=interleaved",) if pipe > 1 else ()
        run = (*_gpt(row, seq, vocabulary), *row_of["more"])
        billions = float(row.get("params_b") or row["model"].replace("T", "000").rstrip("B"))
        where = (row_of["hardware"], devices, row_of["program"])
        rows.append(Row(row["model"], run, layout, *where, step, billions, flops, free))
    return rows


def megatron_a100() -> list[Row]:
    """Ten GPT models on A100s, all activations recomputed."""
    kind = {"hardware": "a100", "program": "megatron2021", "remat": "train.remat=full", "more": ()}
    return _megatron("megatron_a100_2021.csv", 2048, 51200, 96, **kind)


def megatron_h100() -> list[Row]:
    """Nine GPT models on H100s, attention's inside recomputed."""
    kind = {"hardware": "h100", "program": "megatron", "remat": "train.remat=attention"}
    return _megatron("megatron_h100_2024.csv", 4096, 131072, 72, more=("model.tied_embeddings=false",), **kind)


def torchtitan() -> list[Row]:
    """Llama 3 on H100s of 96 GB."""
    rows = []
    for row in _read("torchtitan_llama3_h100.csv"):
        name = row["model"].removeprefix("llama3.1-")
        model = {"8B": ("model=llama3_8b",), "70B": ("model=llama3_70b",), "405B": LLAMA_405B}[name]
        pipe, devices = int(row["pp"]), int(row["gpus"])
        run = (*model, "optimizer=adamw", f"train.seq_len={row['seq']}", f"train.batch_size={row['global_batch']}")
        run += ("train.loss_chunk=0", *(("model.matmul_dtype=float8",) if row["float8"] == "1" else ()))
        remat = f"train.remat={'dots' if row['ac'] == 'selective' else 'full'}"
        layout = (*_mesh(int(row["tp"]), pipe, 1, int(row["fsdp"]), int(row["cp"])), remat)
        chunks = 1 if row["schedule"] == "1F1B" else 2
        name_of = {1: "1f1b", 2: "interleaved"}[chunks]
        piped = (
            f"pipeline.schedule={name_of}",
            f"pipeline.microbatches={pipe * chunks}",
            *(("pipeline.chunks=2",) if chunks == 2 else ()),
        )
        layout += piped if pipe > 1 else ("train.grad_accumulation=1",)
        compiled = "torchtitan" if row["compile"] == "1" else "torchtitan-eager"
        which = "torchtitan-async" if row["async_tp"] == "1" else compiled
        tokens = float(row["global_batch"]) * float(row["seq"])
        step = tokens / (devices * float(row["tps_per_gpu"]))
        told = f"{name} x{devices} {row['seq']} {which} {row['schedule']}" + (" float8" if row["float8"] == "1" else "")
        memory, free = float(row["mem_gib"]) * 2**30, ("mesh.data=1", remat)
        rows.append(Row(told, run, layout, "h100_96gb", devices, which, step, free=free, memory=memory))
    return rows


def llama3_405b() -> list[Row]:
    """Llama 3 405B on up to 16,384 H100s, interleaved, nothing recomputed."""
    rows = []
    for row in _read("llama3_405b_2024.csv"):
        data, seq, devices = int(row["dp"]), int(row["seq"]), int(row["gpus"])
        batch = data * int(row["sequences_per_dp"])
        run = (*LLAMA_405B, "optimizer=adamw", f"train.seq_len={seq}", f"train.batch_size={batch}")
        layout = (*_mesh(int(row["tp"]), int(row["pp"]), data, 1, int(row["cp"])), "train.remat=none")
        layout += ("pipeline.schedule=interleaved",)
        flops = flops_per_token(config_of(run).model, seq) * batch * seq
        step = flops / (devices * float(row["tflops_per_gpu"]) * 1e12)
        rows.append(Row(f"{devices} cp{row['cp']}", run, layout, "h100", devices, "llama3", step))
    return rows


def maxtext() -> list[Row]:
    """Llama and Mixtral on TPUs; batches are not published, so that each device has some that fit."""
    models = {"llama2-70b": LLAMA2_70B, "llama3.1-8b": ("model=llama3_8b",), "llama3.1-70b": ("model=llama3_70b",)}
    models["mixtral-8x7b"] = ("model=mixtral_8x7b",)
    batches = {("mixtral-8x7b", "v5p"): 8, ("mixtral-8x7b", "v6e"): 4}
    rows = []
    for row in _read("maxtext_tpu_2025.csv"):
        chips, a_chip = int(row["chips"]), batches.get((row["model"], row["hardware"]), 2)
        run = (
            *models[row["model"]],
            "optimizer=adamw",
            f"train.seq_len={row['seq']}",
            f"train.batch_size={chips * a_chip}",
        )
        step = a_chip * int(row["seq"]) / float(row["tps_per_chip"])
        rows.append(
            Row(
                f"{row['model']} {row['hardware']}",
                run,
                ("mesh.pipe=1", "mesh.context=1"),
                row["hardware"],
                chips,
                "maxtext",
                step,
            )
        )
    return rows


def h200() -> list[tuple[Row, float]]:
    """This project on one H200, and the bytes that its step takes."""
    rows = []
    for row in _read("isomesh_h200_2026.csv"):
        run = (
            f"model={row['model']}",
            f"train.batch_size={row['batch']}",
            f"train.seq_len={row['seq']}",
            "optimizer=adamw",
        )
        run += (
            f"model.scan_layers={row['scan_layers']}",
            *(("optimizer.moment_dtype=bfloat16",) if "llama" in row["model"] else ()),
        )
        layout = (f"train.remat={row['remat']}", "train.grad_accumulation=1")
        size = 1e9 * (float(row["argument_gb"]) + float(row["temporary_gb"]))
        rows.append(
            (
                Row(
                    f"{row['model']} scan={row['scan_layers']}",
                    run,
                    layout,
                    "h200",
                    1,
                    "isomesh",
                    float(row["step_ms"]) / 1e3,
                ),
                size,
            )
        )
    return rows
