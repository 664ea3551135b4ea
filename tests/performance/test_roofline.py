"""The least time of programs: against what is known of them by hand, and of a real one by its shapes."""

import jax
import jax.numpy as jnp
import pytest

from performance.__main__ import main
from performance.roofline import Machine, by_area, kernels, table

SLOW = Machine("a device of round numbers", flops=1e6, bandwidth=1e3, source="none")
SCOPE = 'metadata={op_name="jit(f)/block/ffn/dot_general"}'


def program(entry: str, more: str = "") -> str:
    """A module with an f32[64,32] %x, an f32[32,16] %w and the entry's lines."""
    parameters = "  %x = f32[64,32]{1,0} parameter(0)\n  %w = f32[32,16]{1,0} parameter(1)\n"
    return (
        f"HloModule m\n\n{more}\nENTRY %main (x: f32[64,32], w: f32[32,16]) -> f32[64,16] {{\n{parameters}{entry}}}\n"
    )


DOT = f"f32[64,16]{{1,0}} dot(%x, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, {SCOPE}"


def test_a_matmul_by_hand():
    (found,) = kernels(program(f"  ROOT %d = {DOT}\n"))
    assert (found.area, found.kind, found.times) == ("ffn", "matmul", 1)
    assert found.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert found.flops == 2 * 64 * 32 * 16
    assert found.seconds(SLOW) == max(found.bytes / 1e3, found.flops / 1e6)


def test_cublas_and_cudnn_calls_count_as_what_they_are():
    gemm = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    shape = "(f32[64,16]{1,0}, s8[33554432]{0})"
    target = 'custom_call_target="__cublas$lt$matmul"'
    call = f"  %g = {shape} custom-call(%x, %w), {target}, {SCOPE}, backend_config={{{gemm}}}\n"
    out = "  ROOT %r = f32[64,16]{1,0} get-tuple-element(%g), index=0\n"
    (found,) = kernels(program(call + out))
    assert found.flops == 2 * 64 * 32 * 16
    assert found.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16), "the workspace is not traffic"


@pytest.mark.parametrize("trips", [1, 48])
def test_loops_count_as_often_as_they_run(trips):
    state = "(s32[], f32[64,32]{1,0}, f32[32,16]{1,0})"
    body = (
        f"%body (p: {state}) -> {state} {{\n  %p = {state} parameter(0)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n  %x = f32[64,32]{1,0} get-tuple-element(%p), index=1\n"
        f"  %w = f32[32,16]{{1,0}} get-tuple-element(%p), index=2\n  %d = {DOT}\n"
        f"  ROOT %t = {state} tuple(%i, %x, %w)\n}}\n"
    )
    count = f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    entry = (
        f"  %z = s32[] constant(0)\n  %t = {state} tuple(%z, %x, %w)\n"
        f"  ROOT %l = {state} while(%t), condition=%cond, body=%body, {count}\n"
    )
    (found,) = kernels(program(entry, body))
    assert found.times == trips
    assert found.seconds(SLOW) == pytest.approx(trips * found.bytes / 1e3)


def test_of_an_updated_array_only_the_update_is_traffic():
    fused = (
        "%fused (a: f32[64,32], b: f32[1,32], i: s32[]) -> f32[64,32] {\n"
        "  %a = f32[64,32]{1,0} parameter(0)\n  %b = f32[1,32]{1,0} parameter(1)\n  %i = s32[] parameter(2)\n"
        "  ROOT %u = f32[64,32]{1,0} dynamic-update-slice(%a, %b, %i, %i)\n}\n"
    )
    entry = (
        "  %i = s32[] constant(0)\n  %b = f32[1,32]{1,0} slice(%x), slice={[0:1], [0:32]}\n"
        "  ROOT %f = f32[64,32]{1,0} fusion(%x, %b, %i), kind=kLoop, calls=%fused\n"
    )
    update = next(kernel for kernel in kernels(program(entry, fused)) if kernel.name == "f")
    assert update.bytes == 4 * (32 + 32) + 4, "the row read, the row written, and where"


def test_marks_what_a_better_program_would_not_have():
    large = "f32[2048,4096]{1,0}"
    entry = (
        f"  %c = {large} transpose(%big), dimensions={{1,0}}\n"
        f'  ROOT %e = {large} add(%c, %c), metadata={{op_name="jit(f)/block/ffn/mul"}}\n'
    )
    text = program(entry).replace("parameter(1)\n", f"parameter(1)\n  %big = {large} parameter(2)\n")
    marks = {kernel.name: kernel.mark for kernel in kernels(text)}
    assert marks == {"c": "transposed", "e": "float32 between kernels"}


def test_a_real_program_has_the_flops_of_its_shapes():
    def loss(w, x):
        with jax.named_scope("ffn"):
            return jnp.tanh(x @ w).sum()

    w, x = jax.ShapeDtypeStruct((256, 512), jnp.float32), jax.ShapeDtypeStruct((128, 256), jnp.float32)
    found = kernels(jax.jit(jax.grad(loss)).lower(w, x).compile().as_text())
    assert sum(kernel.times * kernel.flops for kernel in found) == 2 * 2 * 128 * 256 * 512, "forward and dw"
    assert set(by_area(found, SLOW)) <= {"ffn", "other"}
    least = 4 * (256 * 512 + 128 * 256 + 256 * 512)
    assert sum(kernel.times * kernel.bytes for kernel in found) >= least, "each input read, the gradient written"
    assert "a step" in table(found, SLOW)


def test_command_line(tmp_path, capsys):
    path = tmp_path / "program.txt"
    path.write_text(program(f"  ROOT %d = {DOT}\n"))
    assert main(["--text", str(path)]) == 0
    assert "ffn" in capsys.readouterr().out
    assert main(["--text", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
