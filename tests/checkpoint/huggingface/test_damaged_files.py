"""Files that are damaged, lie or are not known: one line each. GGUF is read as its own package reads it."""

import json
import re
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from checkpoint.huggingface import safetensors
from checkpoint.huggingface.config_json import read_config
from checkpoint.huggingface.gguf import Gguf, dequantise, read_gguf_config
from checkpoint.huggingface.opened import open_pretrained
from checkpoint.huggingface.safetensors import Safetensors

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "huggingface"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_pretrained(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def changed(folder: Path, **keys) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "bloom"}, "model_type='bloom' is not one of llama, mistral"),
        ({"model_type": ["llama"]}, "is not one of llama, mistral"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config='fp8': quantised weights are read"),
        ({"rope_scaling": {"rope_type": "weird"}}, "rope scaling 'weird' is not one of default"),
        ({"rope_scaling": "yes"}, "should be tables of keys"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is not one of silu"),
        ({"num_hidden_layers": 99}, "there is no tensor model.layers."),
        ({"intermediate_size": 21}, r"mlp.up_proj.weight is \(.*\), and its config asks for \(21, "),
        ({"num_hidden_layers": "two"}, "num_hidden_layers='two' should be a number of 1 or more"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 should be a number"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, "rope scaling 'mrope' is not one of default"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "config.json has no factor"),
    ],
)
def test_configs_that_are_not_known(folder, keys, message):
    changed(folder, **keys)
    refused(folder, message)


def with_tensors(folder: Path, change) -> None:
    """The folder's tensors after `change(dict)`."""
    there = Safetensors(folder / "model.safetensors")
    tensors = {name: np.array(there.tensor(name)) for name in sorted(there.names())}
    change(tensors)
    with (folder / "model.safetensors").open("wb") as file:
        safetensors.write_header(file, {name: (value.dtype, value.shape) for name, value in tensors.items()})
        for value in tensors.values():
            file.write(value.tobytes())


def test_tensors_that_would_be_left_out_or_misread(folder, caplog):
    with_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.int8)}))
    refused(folder, "model.norm.weight is int8, not float32")
    with_tensors(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float16)}))
    open_pretrained(folder)
    with_tensors(folder, lambda t: t.update({"value_head.weight": np.ones(3, np.float32)}))
    assert open_pretrained(folder).left_out() == ["value_head.weight"]
    layer = "model.layers.7.input_layernorm.weight"
    with_tensors(folder, lambda t: t.update({layer: np.ones(3, np.float32)}))
    refused(folder, f"{layer} is there, and its config has . layers")


def test_folders_that_are_not_whole(folder, tmp_path):
    (folder / "config.json").write_text("{")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json")
    with pytest.raises(ValueError, match="there is no such folder or file"):
        open_pretrained(tmp_path / "nowhere" / "at" / "all")


def test_a_pickle_is_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "a pickle can run code when it is opened.*--allow-pickle")


def with_header(path: Path, header: dict | bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + b"\0" * 64)


ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (ENTRY | {"data_offsets": [0, 32]}, "needs 64 bytes, and its place is 0 to 32"),
        (ENTRY | {"data_offsets": [64, 128]}, "needs 64 bytes, and its place is 64 to 128 of 64"),
        (ENTRY | {"shape": [2**40, 2**40]}, "needs .* bytes, and its place"),
        (ENTRY | {"shape": [-4, -4]}, "has no sound dtype, shape"),
        (ENTRY | {"shape": "44"}, "has no sound dtype, shape"),
        (ENTRY | {"dtype": "F7"}, "is F7, not one of F64, F32"),
        (ENTRY | {"dtype": ["F32"]}, "is .*F32.*, not one of F64"),
        ({}, "has no sound dtype, shape"),
    ],
)
def test_safetensors_that_lie(tmp_path, entry, message):
    with_header(tmp_path / "a.safetensors", {"weight": entry})
    with pytest.raises(ValueError, match=message) as error:
        Safetensors(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


def test_headers_that_are_none(tmp_path):
    path = tmp_path / "a.safetensors"
    for header, length, message in ((b"{", None, "not JSON"), (b"[]", None, "no table"), (b"{}", 2**60, "a header of")):
        with_header(path, header, length)
        with pytest.raises(ValueError, match=message):
            Safetensors(path)
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="a header of"):
        Safetensors(path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3, "missing.safetensors"])
def test_an_index_names_files_beside_it_only(folder, name):
    (folder / safetensors.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, "is no name of a file beside it|which is not there")


def test_every_cut_of_a_file_is_noticed(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for length in np.random.default_rng(0).integers(0, len(whole), 25):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(folder, "damaged|cut short")


# ---------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_are_read_as_by_their_own_package(kind):
    quantisation = gguf.GGMLQuantizationType[kind]
    weights = np.random.default_rng(0).standard_normal((6, 64), np.float32)
    blocks = quantize(weights, quantisation)
    ours = dequantise(blocks.reshape(-1, gguf.GGML_QUANT_SIZES[quantisation][1]), kind).reshape(weights.shape)
    np.testing.assert_array_equal(ours, dequantize(blocks, quantisation))


def write_gguf(path: Path, kind: str = "Q8_0", **metadata) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {
        "block_count": 1, "embedding_length": 32, "feed_forward_length": 64, "attention.head_count": 4,
        "attention.head_count_kv": 2, "context_length": 128,
    } | metadata  # fmt: skip
    for name, number in numbers.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd": (40, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
        "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,),
    }  # fmt: skip
    for name, shape in shapes.items():
        value = draw.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", value)
        else:
            quantisation = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", quantize(value, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_a_gguf_file_is_read_as_by_its_own_package(tmp_path, kind):
    write_gguf(tmp_path / "a.gguf", kind)
    ours, theirs = Gguf(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    assert ours.names() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        expected = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(tensor.shape)[::-1])
        np.testing.assert_array_equal(ours.tensor(tensor.name).astype(np.float32), expected)
    config = read_gguf_config(ours)
    assert (config.layers, config.heads, config.kv_heads, config.head_dim, config.vocab_size) == (1, 4, 2, 8, 40)
    assert config.tied_embeddings
    open_pretrained(tmp_path / "a.gguf")


def test_queries_and_keys_of_gguf_turn_in_neighbouring_pairs(tmp_path):
    """llama.cpp has the dims (i, i + H/2) of a pair side by side; its converter's own permutation is undone."""
    write_gguf(tmp_path / "a.gguf", "F16")
    opened = open_pretrained(tmp_path / "a.gguf")
    spec, place = opened.places["layers", "attention", "query", "weight"]
    there = opened.source.tensor("blk.0.attn_q.weight")
    ours = place.ours(there, spec.of_one_layer())  # (D, N, H)
    half = 4
    for head in range(4):
        for pair in range(half):
            np.testing.assert_array_equal(ours[:, head, pair], there[head * 8 + 2 * pair])
            np.testing.assert_array_equal(ours[:, head, pair + half], there[head * 8 + 2 * pair + 1])


def test_every_cut_of_a_gguf_file_is_noticed(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for length in [0, 3, 8, *np.random.default_rng(0).integers(0, len(whole) - 64, 25)]:
        (tmp_path / "b.gguf").write_bytes(whole[:length])
        refused(tmp_path / "b.gguf", "cut short|says that .* follow|not a GGUF file|cannot mmap an empty file")


def test_gguf_files_that_lie_about_their_counts(tmp_path):
    write_gguf(tmp_path / "a.gguf")
    whole = bytearray((tmp_path / "a.gguf").read_bytes())
    for at, message in (
        (8, "says that .* values follow"),
        (16, "says that .* values follow"),
        (24, "says that .* bytes follow"),
    ):
        lying = bytearray(whole)
        lying[at : at + 8] = struct.pack("<Q", 2**62)
        (tmp_path / "b.gguf").write_bytes(lying)
        refused(tmp_path / "b.gguf", message)
    lying = bytearray(whole)
    lying[4:8] = struct.pack("<I", 9)
    (tmp_path / "b.gguf").write_bytes(lying)
    refused(tmp_path / "b.gguf", "GGUF version 9; versions 2 and 3")


def test_gguf_of_other_architectures(tmp_path):
    write_gguf(tmp_path / "a.gguf", expert_count=4)
    refused(tmp_path / "a.gguf", "experts are not read from GGUF")
    content = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(re.sub(b"(?<=\x05\0\0\0\0\0\0\0)llama", b"other", content))
    refused(tmp_path / "b.gguf", "general.architecture='other': only llama is read")


def test_what_a_config_leaves_out_is_what_its_family_has():
    """Files of the hub leave out what is their class's default, and have rotary positions in an older form."""
    old = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
            "original_max_position_embeddings": 8192,
        },
    }  # fmt: skip
    config = read_config(old, {"lm_head.weight"})
    assert (config.kv_heads, config.head_dim, config.tied_embeddings, config.activation) == (32, 128, False, "swiglu")
    assert (config.rope_theta, config.rope_scaling.kind, config.rope_scaling.factor) == (500000.0, "llama3", 8.0)
    gemma = {
        "model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "final_logit_softcapping": None,
    }  # fmt: skip
    config = read_config(gemma, set())
    assert (config.head_dim, config.tied_embeddings, config.window_pattern, config.window) == (256, True, "LG", 4096)
    assert (config.attention_softcap, config.logit_softcap, config.attention_scale) == (50.0, 0.0, 1 / 16)


SIZES = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip


def test_windows_are_off_where_a_class_has_them_off():
    """Qwen's files of older versions have a sliding_window and no use_sliding_window, which is then false."""
    for family in ("qwen2", "qwen3", "qwen3_moe"):
        config = {"model_type": family, **SIZES, "sliding_window": 8, "num_experts": 8, "moe_intermediate_size": 8}
        assert not any(read_config(config, set()).windows()), family
    config = read_config({"model_type": "qwen2", **SIZES, "sliding_window": 8, "use_sliding_window": True}, set())
    assert config.windows() == (0,) * 28 + (8, 8)  # the layers from max_window_layers on, 28 if it is not said
    assert read_config({"model_type": "mistral", **SIZES}, set()).window == 4096
    assert read_config({"model_type": "mistral", **SIZES, "sliding_window": None}, set()).window == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"head_dim": 12.0}, "head_dim=12.0 should be a whole number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' should be true or false"),
        ({"rope_parameters": [1]}, "should be tables of keys"),
        ({"rope_parameters": {"full_attention": 3}}, "config.json has a value of the wrong type"),
    ],
)
def test_values_of_the_wrong_type(folder, keys, message):
    changed(folder, **keys)
    refused(folder, message)


def test_tables_that_differ_are_not_tied(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "tied"))
    assert open_pretrained(folder).config.tied_embeddings
    copied = lambda t: t["model.embed_tokens.weight"]
    with_tensors(folder, lambda t: t.update({"lm_head.weight": copied(t)}))
    assert open_pretrained(folder).config.tied_embeddings
    with_tensors(folder, lambda t: t.update({"lm_head.weight": copied(t) + 1}))
    assert not open_pretrained(folder).config.tied_embeddings
