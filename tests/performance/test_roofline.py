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


@pytest.mark.parametrize(
    ("inputs", "weights", "out", "labels", "window", "flops"),
    [
        ("64,32", "32,16", "64,16", "bf_io->bf", "", 2 * 64 * 32 * 16),
        ("32,64", "32,16", "64,16", "fb_io->bf", "", 2 * 64 * 32 * 16),
        # a batch of 8 matmuls: of 8 places of the window, all but one meet zeros
        (
            *("8,64,32", "8,32,16", "8,64,16", "0bf_0io->0bf"),
            *(" window={size=8 stride=7 pad=7_7 lhs_dilate=8 rhs_reversal=1},", 8 * 2 * 64 * 32 * 16),
        ),
    ],
)
def test_matmuls_of_tpus_are_convolutions(inputs, weights, out, labels, window, flops):
    layout = "{2,1,0}" if inputs.count(",") == 2 else "{1,0}"
    shape = lambda dims: f"f32[{dims}]{layout}"
    text = (
        f"HloModule m\n\nENTRY %main (x: {shape(inputs)}, w: {shape(weights)}) -> {shape(out)} {{\n"
        f"  %x = {shape(inputs)} parameter(0)\n  %w = {shape(weights)} parameter(1)\n"
        f"  ROOT %c = {shape(out)} convolution(%x, %w),{window} dim_labels={labels}, {SCOPE}\n}}\n"
    )
    (found,) = kernels(text)
    assert found.flops == flops


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


# ----------------------------------------------------------------------------------- what a better program would not do

LARGE = 2048 * 4096  # elements of a large array
BIG = "  %big = f32[2048,4096]{1,0} parameter(2)\n  %half = bf16[2048,4096]{1,0} parameter(3)\n"


def named(area: str, primitive: str = "mul", backward: bool = False) -> str:
    return f'metadata={{op_name="jit(f)/{"transpose(jvp())" if backward else "jvp()"}/{area}/{primitive}"}}'


def marks(lines: str, more: str = "") -> dict[str, tuple[str, float]]:
    """Of each marked kernel what is said of it, and the bytes that a better program would not move."""
    text = program(lines, more).replace("parameter(1)\n", f"parameter(1)\n{BIG}", 1)
    return {kernel.name: (kernel.mark, kernel.avoidable) for kernel in kernels(text) if kernel.mark}


def test_transposes_copies_and_layouts():
    entry = (
        "  %t = bf16[4096,2048]{1,0} transpose(%half), dimensions={1,0}\n"
        "  %c = bf16[2048,4096]{1,0} copy(%half)\n"
        "  ROOT %l = bf16[2048,4096]{0,1} copy(%half)\n"
    )
    both = 2 * 2 * LARGE
    assert marks(entry) == {"t": ("transposed", both), "c": ("copied", both), "l": ("laid out anew", both)}


def test_zeros_that_are_filled_later():
    fused = (
        "%fused () -> f32[2048,4096] {\n  %z = f32[] constant(0)\n  ROOT %b = f32[2048,4096]{1,0} broadcast(%z)\n}\n"
    )
    entry = "  ROOT %f = f32[2048,4096]{1,0} fusion(), kind=kLoop, calls=%fused\n"
    assert marks(entry, fused) == {"f": ("zeros that are filled later", 4 * LARGE)}


def test_float32_between_kernels_and_not_in_the_optimizer():
    entry = (
        f"  %e = f32[2048,4096]{{1,0}} multiply(%big, %big), {named('block/ffn')}\n"
        f"  ROOT %o = f32[2048,4096]{{1,0}} multiply(%e, %e), {named('optimizer')}\n"
    )
    assert marks(entry) == {"e": ("float32 between kernels", 2 * 4 * LARGE)}


def test_logits_in_float32_in_all_passes_over_them():
    contracted = "lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    x, table = "bf16[2048,16]{1,0} parameter(4)", "bf16[4096,16]{1,0} parameter(5)"
    entry = (
        f"  %h = {x}\n  %t = {table}\n"
        f"  %logits = f32[2048,4096]{{1,0}} dot(%h, %t), {contracted}, {named('loss/head', 'dot_general')}\n"
        f"  %e = f32[2048,4096]{{1,0}} exponential(%logits), {named('loss', 'exp')}\n"
        f"  ROOT %g = f32[4096,16]{{1,0}} dot(%e, %h), lhs_contracting_dims={{0}}, rhs_contracting_dims={{0}}, "
        f"{named('loss/head', 'dot_general', backward=True)}\n"
    )
    narrower = 2 * LARGE  # bytes, of a pass in bfloat16 that is not taken in float32
    expected = {"logits": narrower, "e": 2 * narrower, "g": narrower}
    assert marks(entry) == {name: ("logits in float32", size) for name, size in expected.items()}
    assert marks(entry.replace("f32[2048,4096]", "bf16[2048,4096]")) == {}


def test_written_and_read_again():
    sine = "%fused (p: bf16[2048,4096]) -> bf16[2048,4096] {\n  %p = bf16[2048,4096]{1,0} parameter(0)\n"
    sine += "  ROOT %s = bf16[2048,4096]{1,0} sine(%p)\n}\n"
    fusion = "bf16[2048,4096]{1,0} fusion(%SOURCE), kind=kLoop, calls=%fused"
    first = f"  %a = {fusion.replace('SOURCE', 'half')}, {named('block/ffn')}\n"
    again = f"  ROOT %b = {fusion.replace('SOURCE', 'a')}, {named('block/ffn')}\n"
    assert marks(first + again, sine) == {"a": ("written and read again", 2 * 2 * LARGE)}
    later = f"  ROOT %b = {fusion.replace('SOURCE', 'a')}, {named('block/ffn', backward=True)}\n"
    assert marks(first + later, sine) == {}, "the backward pass cannot be one with the forward pass"
    twice = f"  %c = {fusion.replace('SOURCE', 'a')}, {named('block/ffn')}\n"
    assert marks(first + twice + again, sine) == {}, "two kernels need it"


NARROWED = "%fused (p: f32[2048,4096]) -> bf16[2048,4096] {\n  %p = f32[2048,4096]{1,0} parameter(0)\n"
NARROWED += "  %n = bf16[2048,4096]{1,0} convert(%p)\n  ROOT %s = bf16[2048,4096]{1,0} RESULT\n}\n"


@pytest.mark.parametrize(
    ("result", "saved"),
    [("bitcast(%n)", (4 + 2) * LARGE), ("sine(%n)", (4 - 2) * LARGE)],  # the whole kernel; reading what is narrower
)
def test_converted_a_second_time_also_in_a_fusion(result, saved):
    entry = (
        "  %c = bf16[2048,4096]{1,0} convert(%big)\n"
        f"  ROOT %f = bf16[2048,4096]{{1,0}} fusion(%big), kind=kLoop, calls=%fused, {named('block/ffn')}\n"
    )
    assert marks(entry, NARROWED.replace("RESULT", result)) == {"f": ("converted a second time", saved)}
    other = entry.replace("convert(%big)", "convert(%other)")
    other = "  %other = f32[2048,4096]{1,0} parameter(6)\n" + other
    assert marks(other, NARROWED.replace("RESULT", result)) == {}, "two values, each once"


def test_widened_inside_of_kernels_costs_nothing():
    widened = NARROWED.replace("f32", "f16").replace("bf16", "f32").replace("f16", "bf16")
    widened = widened.replace("RESULT", "sine(%n)")
    fusion = 'f32[2048,4096]{1,0} fusion(%half), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/optimizer/sin"}'
    assert marks(f"  %a = {fusion}\n  ROOT %b = {fusion}\n", widened) == {}


def test_two_loops_that_convert_the_same_layers():
    """As a scan over layers and its backward pass do, where each casts a layer's weights."""
    state = "(s32[], f32[8,2048,4096]{2,1,0})"
    body = (
        f"%NAME (p: {state}) -> {state} {{\n  %p = {state} parameter(0)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n  %z = s32[] constant(0)\n"
        "  %w = f32[8,2048,4096]{2,1,0} get-tuple-element(%p), index=1\n"
        "  %NAME.c = bf16[1,2048,4096]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused\n"
        f"  ROOT %t = {state} tuple(%i, %w)\n}}\n\n"
    )
    fused = (
        "%fused (a: f32[8,2048,4096], i: s32[]) -> bf16[1,2048,4096] {\n"
        "  %a = f32[8,2048,4096]{2,1,0} parameter(0)\n  %i = s32[] parameter(1)\n  %z = s32[] constant(0)\n"
        "  %last = s32[] constant(7)\n  %j = s32[] subtract(%last, %i)\n"
        "  %s = f32[1,2048,4096]{2,1,0} dynamic-slice(%a, %j, %z, %z), dynamic_slice_sizes={1,2048,4096}\n"
        "  ROOT %n = bf16[1,2048,4096]{2,1,0} convert(%s)\n}\n\n"
    )
    count = 'backend_config={"known_trip_count":{"n":"8"}}'
    entry = (
        "  %z = s32[] constant(0)\n  %w8 = f32[8,2048,4096]{2,1,0} parameter(6)\n"
        f"  %t = {state} tuple(%z, %w8)\n  %l1 = {state} while(%t), condition=%cond, body=%forward, {count}\n"
        "  %g = f32[8,2048,4096]{2,1,0} get-tuple-element(%l1), index=1\n"
        f"  %t2 = {state} tuple(%z, %g)\n  ROOT %l2 = {state} while(%t2), condition=%cond, body=%backward, {count}\n"
    )
    bodies = body.replace("NAME", "forward") + body.replace("NAME", "backward")
    found = marks(entry, fused + bodies)
    assert found == {"backward.c": ("converted a second time", (4 + 2) * LARGE)}


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
