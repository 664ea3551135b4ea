"""Published tables that no factor of the planner was set with: what its error on others' figures is."""

from published import GPT, LLAMA2_70B, Row, _mesh, _read, config_of

from model.counts import flops_per_token

MPT = {"1b": (24, 2048, 16), "3b": (32, 2560, 20), "7b": (32, 4096, 32), "13b": (40, 5120, 40)}
MPT |= {"30b": (48, 7168, 56), "70b": (80, 8192, 64)}
NEMO_GPT = {"GPT3-5B": (24, 4096, 32), "GPT3-20B": (44, 6144, 48), "GPT3-175B": (96, 12288, 96)}
NEMOTRON = {"8B": (32, 4096, 32, 32, 16384), "22B": (40, 6144, 48, 48, 24576), "340B": (96, 18432, 96, 8, 73728)}
LLAMA2 = {
    "LLAMA2-7B": ("model.layers=32", "model.width=4096", "model.heads=32", "model.kv_heads=32", "model.ffn=11008"),
    "LLAMA2-13B": ("model.layers=40", "model.width=5120", "model.heads=40", "model.kv_heads=40", "model.ffn=13824"),
    "LLAMA2-70B": (),
}


def _sizes(layers: int, width: int, heads: int, kv_heads: int = 0, ffn: int = 0) -> tuple[str, ...]:
    sizes = {"layers": layers, "width": width, "heads": heads, "kv_heads": kv_heads or heads}
    sizes |= {"head_dim": width // heads, "ffn": ffn or 4 * width}
    return tuple(f"model.{key}={value}" for key, value in sizes.items())


def mosaic_mpt() -> list[Row]:
    """MPT models on A100s and H100s, PyTorch's FSDP: rows of 2,048 and 8,192 tokens of models of 1b and more."""
    rows = []
    for row in _read("mosaic_mpt_2023.csv"):
        seq, devices = int(row["seq"]), int(row["gpus"])
        run = (*_sizes(*MPT[row["model"]]), "model.vocab_size=50368", f"model.max_positions={seq}", "model.bias=none")
        run += (*(word for word in GPT if "bias" not in word), f"train.seq_len={seq}", "train.loss_chunk=0")
        run += (f"train.batch_size={row['global_batch']}",)
        remat = f"train.remat={'full' if row['checkpointing'] == '1' else 'none'}"
        layout = (*_mesh(1, 1, 1, devices), remat)
        cut = -(-int(row["global_batch"]) // (devices * int(row["microbatch"])))
        layout += (f"train.grad_accumulation={cut}",)
        step = float(row["global_batch"]) * seq / devices / float(row["tps_per_gpu"])
        name = f"{row['model']} {row['gpu']} x{devices} {seq}"
        where = (row["gpu"], devices, "torchtitan-eager")
        rows.append(Row(name, run, layout, *where, step, float(row["params"]) / 1e9, free=("mesh.data=1", remat)))
    return rows


def nemo_h100() -> list[Row]:
    """NVIDIA NeMo 24.07 on DGX H100, FP8."""
    rows = []
    for row in _read("nemo_h100_2024.csv"):
        name, devices, seq = row["model"], int(row["gpus"]), int(row["seq"])
        tensor, pipe, context = int(row["tp"]), int(row["pp"]), int(row["cp"])
        if name in NEMO_GPT:
            run = (*_sizes(*NEMO_GPT[name]), "model.vocab_size=51200", f"model.max_positions={seq}", *GPT)
        elif name.startswith("Nemotron"):
            run = (*_sizes(*NEMOTRON[name.partition("-")[2]]), "model.vocab_size=256000", "model.activation=relu2")
            run += ("model.norm=layer", "model.tied_embeddings=false", "optimizer=adamw")
        elif name in LLAMA2:
            run = (*LLAMA2_70B, *LLAMA2[name], "optimizer=adamw")
        else:
            run = ("model=llama3_70b" if "70B" in name else "model=llama3_8b", "optimizer=adamw")
        run += (
            f"train.seq_len={seq}",
            f"train.batch_size={row['gbs']}",
            "model.matmul_dtype=float8",
            "train.loss_chunk=0",
        )
        data = devices // (tensor * pipe * context)
        cut = int(row["gbs"]) // (data * int(row["mbs"]))
        layout = _mesh(tensor, pipe, data, 1, context)
        if pipe > 1:
            layout += ("pipeline.schedule=interleaved", f"pipeline.chunks={row['vp']}", f"pipeline.microbatches={cut}")
        else:
            layout += (f"train.grad_accumulation={cut}",)
        step = float(row["gbs"]) * seq / devices / float(row["tps_per_gpu"])
        flops = float(row["tflops_per_gpu"]) * 1e12 * devices * step
        where = ("h100", devices, "megatron")
        rows.append(Row(f"{name} x{devices}", run, layout, *where, step, flops=flops, free=("mesh.fsdp=1",)))
    return rows


def maxtext_v5p() -> list[Row]:
    """MaxText's scaled models on one and two slices of TPU v5p."""
    rows = []
    for row in _read("maxtext_v5p_2024.csv"):
        size, slices, chips = int(row["params_b"]), int(row["slices"]), int(row["chips"])
        doublings, rest = divmod(size.bit_length() - 1, 3)
        heads = 16 * 2 ** (doublings + (rest > 0))
        model = {"layers": 16 * 2**doublings, "width": 2048 * 2 ** (doublings + (rest > 1)), "heads": heads}
        model |= {"kv_heads": heads, "head_dim": 128, "ffn": 448 * heads, "vocab_size": 32000}
        model |= {"tied_embeddings": "false", "scan_layers": "true"}
        batch = int(row["per_device_batch"]) * chips * slices
        run = tuple(f"model.{key}={value}" for key, value in model.items())
        run += ("optimizer=adamw", "train.seq_len=2048", f"train.batch_size={batch}", "train.loss_chunk=0")
        tensor = int(row["tensor"])
        remat = f"train.remat={'dots' if row['remat'] == 'minimal' else 'full'}"
        layout = (*_mesh(tensor, 1, slices, chips // tensor), remat, "train.grad_accumulation=1")
        # the program counts scores of all keys, as if there were no mask
        flops = flops_per_token(config_of(run).model, 2048, full_attention=True) * batch * 2048
        step = flops / (chips * slices * float(row["tflops_per_chip"]) * 1e12)
        told = f"{size}B {slices} x {chips}"
        where = ("v5p", chips * slices, "maxtext")
        rows.append(Row(told, run, layout, *where, step, float(size), flops, free=(remat,), domain=chips))
    return rows
