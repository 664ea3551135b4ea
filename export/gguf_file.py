"""A model as a GGUF file of llama.cpp: its tensors by the names of an architecture, its sizes, its tokenizer.

Keys and names: docs/gguf.md of github.com/ggml-org/ggml, and gguf-py of llama.cpp, which writes the file.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from checkpoint.huggingface.export import pieces_of, tensor_of
from checkpoint.huggingface.families import Family
from checkpoint.huggingface.gguf import BLOCK, FAMILY, NAMES
from export.gguf_vocabulary import Vocabulary
from model.config import ModelConfig, RopeScaling
from model.rotary import rope_frequencies

QWEN3 = NAMES | {
    "layers/attention/query_norm": "blk.{layer}.attn_q_norm",
    "layers/attention/key_norm": "blk.{layer}.attn_k_norm",
}
GPT2 = NAMES | {
    "positions": "position_embd",
    "layers/attention/query": "blk.{layer}.attn_qkv[query]",
    "layers/attention/key": "blk.{layer}.attn_qkv[key]",
    "layers/attention/value": "blk.{layer}.attn_qkv[value]",
}
FAMILIES = {
    "llama": FAMILY,
    "qwen3": Family("qwen3 (GGUF)", "", QWEN3, {}),
    "gpt2": Family("gpt2 (GGUF)", "", GPT2, {}),
}
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "q8_0": Kind.Q8_0}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # general.file_type: what most tensors are


def save(
    path: Path,
    architecture: str,
    config: ModelConfig,
    params: dict,
    vocabulary: Vocabulary,
    *,
    kind: str,
    length: int,
    name: str,
    chat: str | None = None,
) -> None:
    """Writes a file, from plain parameters.

    architecture: as export.limits.architecture_of says. kind: f32, f16 or q8_0, of matrices and tables; vectors and
    learned positions are float32. length: tokens of the longest sequence. name: of the model. chat: its template.
    """
    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    _sizes(writer, config, length)
    write_tokenizer(writer, vocabulary, chat)
    tensors = pieces_of(FAMILIES[architecture], config)
    for tensor, pieces in tensors.items():
        _, spec, place, *_ = pieces[0]
        _add(writer, tensor, tensor_of(pieces, place.shape(spec), params).astype(np.float32), kind)
    if (divisors := _rope_divisors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sizes(writer: gguf.GGUFWriter, config: ModelConfig, length: int) -> None:
    c = config
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(length)
    writer.add_embedding_length(c.width)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    if c.norm == "layer":
        writer.add_layer_norm_eps(c.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(c.norm_eps)
    if c.positions == "rotary":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.rotary_dims)
        writer.add_rope_freq_base(c.rope_theta)


def write_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary, chat: str | None = None) -> None:
    """The keys of a tokenizer, and of a chat template if there is one."""
    v = vocabulary
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list(v.tokens)
    writer.add_token_types(v.types)
    writer.add_token_merges(v.merges)
    writer.add_eos_token_id(v.eos)
    writer.add_bos_token_id(v.eos if v.begin is None else v.begin)  # llama.cpp has a number of its own else
    writer.add_add_bos_token(v.begin is not None)
    if chat is not None:
        writer.add_chat_template(chat)


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: str) -> None:
    """One tensor; in 16 bits where its rows are not cut into blocks of 32."""
    if array.ndim < 2 or name == "position_embd.weight":
        kind = "f32"
    elif kind == "q8_0" and array.shape[-1] % BLOCK:
        kind = "f16"
    if kind == "q8_0":
        writer.add_tensor(name, gguf.quants.quantize(array, KINDS[kind]), raw_dtype=KINDS[kind])
    else:
        writer.add_tensor(name, array.astype({"f32": np.float32, "f16": np.float16}[kind]))


def _rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """What each pair's frequency is divided by, float32; None where nothing is scaled."""
    if config.positions != "rotary" or config.rope_scaling.kind == "none":
        return None
    pairs, R = np.arange(config.rotary_dims // 2, dtype=np.float64), config.rotary_dims
    plain, _ = rope_frequencies(pairs, R, config.rope_theta, RopeScaling())
    scaled, _ = rope_frequencies(pairs, R, config.rope_theta, config.rope_scaling)
    return (plain / scaled).astype(np.float32)
