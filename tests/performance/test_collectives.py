"""The reader of compiled programs: every form of device groups, loops, branches, kernels, and real programs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.mesh import AXES, make_mesh
from performance.collectives import collectives, describe, summary
from performance.hlo import Array, arrays, device_groups

SIZES = dict.fromkeys(AXES, 1) | {"data": 2, "fsdp": 2, "tensor": 2}


def module(*lines: str, more: str = "") -> str:
    """A module whose entry has the instructions `lines` after an f32[4,8] parameter %x; `more`: other computations."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, num_partitions=8\n\n{more}\nENTRY %main (x: f32[4,8]) -> f32[4,8] {{\n" + (
        f"  %x = f32[4,8]{{1,0}} parameter(0)\n{body}\n}}\n"
    )


@dataclass(frozen=True)
class Chip:
    """A TPU that is not here."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "tpu"


# ------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x=1", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("channel_id=1, replica_groups=[4,2]<=[8], x=1", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'b'}, x=1", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("source_target_pairs={{0,1},{1,0}}, x=1", [[0, 1], [1, 0]]),
    ],
)
def test_every_form_of_groups(attributes, groups):
    assert sorted(device_groups(attributes, 8)) == sorted(groups)


@given(axes=st.sets(st.sampled_from(("data", "fsdp", "tensor")), min_size=1))
def test_axes_follow_from_groups(axes):
    ids = np.arange(8).reshape(tuple(SIZES.values()))
    moved = np.moveaxis(ids, [list(SIZES).index(a) for a in axes], range(-len(axes), 0))
    groups = moved.reshape(-1, 2 ** len(axes)).tolist()
    spelled = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"
    text = module(f"ROOT %r = f32[4,8]{{1,0}} all-reduce(%x), replica_groups={spelled}, to_apply=%add")
    (found,) = collectives(text, SIZES)
    assert set(found.axes) == axes
    assert found.group == 2 ** len(axes)


def test_single_devices_do_not_communicate():
    alone = "{{0},{1},{2},{3},{4},{5},{6},{7}}"
    assert collectives(module(f"ROOT %r = f32[4,8]{{1,0}} all-reduce(%x), replica_groups={alone}"), SIZES) == []
    pairs = "source_target_pairs={{0,0},{1,1}}"
    assert collectives(module(f"ROOT %r = f32[4,8]{{1,0}} collective-permute(%x), {pairs}"), SIZES) == []


def test_shapes():
    assert arrays("(f32[4,64]{1,0:T(8,128)S(1)}, /*index=1*/bf16[], u32[]{:S(2)})") == [
        Array("f32", (4, 64)),
        Array("bf16", ()),
        Array("u32", ()),
    ]
    sizes = [arrays(f"{dtype}[16]")[0].bytes for dtype in ("pred", "s4", "f8e4m3fn", "bf16", "f32", "c64", "token")]
    assert sizes == [16, 8, 16, 32, 64, 128, 0]


# -------------------------------------------------------------------------------------------------------------- bytes

PAIRS = "replica_groups=[4,2]<=[8]"
SIZE = 4 * 8 * 4  # bytes of %x


@pytest.mark.parametrize(
    ("line", "kind", "received"),
    [
        (f"f32[8,8]{{1,0}} all-gather(%x), {PAIRS}, dimensions={{0}}", "all-gather", SIZE),
        (f"f32[2,8]{{1,0}} reduce-scatter(%x), {PAIRS}, to_apply=%add", "reduce-scatter", SIZE / 2),
        (f"f32[4,8]{{1,0}} all-reduce(%x), {PAIRS}, to_apply=%add", "all-reduce", SIZE),
        (f"(f32[4,8]{{1,0}}, f32[4,8]{{1,0}}) all-reduce(%x, %x), {PAIRS}", "all-reduce", 2 * SIZE),
        (f"f32[4,8]{{1,0}} all-to-all(%x), {PAIRS}, dimensions={{0}}", "all-to-all", SIZE / 2),
        ("f32[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", SIZE),
        (f"(f32[4,8]{{1,0}}, f32[8,8]{{1,0}}) all-gather-start(%x), {PAIRS}", "all-gather", SIZE),
        (f"((f32[4,8]{{1,0}}), f32[2,8]{{1,0}}) reduce-scatter-start(%x), {PAIRS}", "reduce-scatter", SIZE / 2),
    ],
)
def test_bytes_received(line, kind, received):
    text = module(f"%r = {line}", "ROOT %d = f32[4,8]{1,0} all-reduce-done(%r)")
    (found,) = collectives(text, SIZES)
    assert (found.kind, found.axes, found.dtype) == (kind, ("tensor",), "f32")
    assert found.bytes == received


# ------------------------------------------------------------------------------------------------ loops and branches

ADD = "%a (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  ROOT %s = f32[] add(%a, %a)\n}\n"
BODY = f"""{ADD}
%body (s: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %s = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %v = f32[4,8]{{1,0}} get-tuple-element(%s), index=1
  %r = f32[4,8]{{1,0}} all-reduce(%v), {PAIRS}, to_apply=%a, metadata={{op_name="jit(f)/while/body/psum"}}
  %two = s32[] constant(2)
  %next = s32[] add(%n, %two)
  ROOT %t = (s32[], f32[4,8]{{1,0}}) tuple(%next, %r)
}}
%condition (s: (s32[], f32[4,8])) -> pred[] {{
  %s = (s32[], f32[4,8]{{1,0}}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %k = s32[] constant(9)
  ROOT %lt = pred[] compare(%n, %k), direction=LT
}}
"""
LOOP = "%w = (s32[], f32[4,8]{1,0}) while(%i), condition=%condition, body=%body"


def test_trips_of_loops():
    start = ("%zero = s32[] constant(2)", "%c = s32[] copy(%zero)", "%i = (s32[], f32[4,8]{1,0}) tuple(%c, %x)")
    (known,) = collectives(module(*start, LOOP + ', backend_config={"known_trip_count":{"n":"5"}}', more=BODY), SIZES)
    assert (known.times, known.bytes) == (5, 5 * SIZE)
    (counted,) = collectives(module(*start, LOOP, more=BODY), SIZES)
    assert (counted.times, counted.scope) == (4, "jit(f)/while/body/psum")  # 2, 4, 6, 8
    kernels = """
%less (a: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %k = s32[] constant(9)
  ROOT %lt = pred[] compare(%a, %k), direction=LT
}
%more (b: s32[]) -> s32[] {
  %b = s32[] parameter(0)
  %two = s32[] constant(2)
  ROOT %sum = s32[] add(%b, %two)
}
"""  # as compilers for GPUs write it
    fused = BODY.replace("%next = s32[] add(%n, %two)", "%next = s32[] fusion(%n), kind=kLoop, calls=%more")
    fused = fused.replace("pred[] compare(%n, %k), direction=LT", "pred[] fusion(%n), kind=kLoop, calls=%less")
    (counted,) = collectives(module(*start, LOOP, more=kernels + fused), SIZES)
    assert counted.times == 4
    unknown = ("%p = s32[] custom-call()", "%i = (s32[], f32[4,8]{1,0}) tuple(%p, %x)")
    with pytest.raises(ValueError, match="trips of w "):
        collectives(module(*unknown, LOOP, more=BODY), SIZES)


def test_what_tpu_slices_exchange():
    """Between slices the program only hands data to its host: no collective of XLA's is to be seen."""
    attributes = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    line = f"ROOT %s = (f32[4,8]{{1,0}}, u32[], token[]) send(%x, %t), frontend_attributes={{{attributes}}}"
    devices = [Chip(i, i // 4) for i in range(8)]
    mesh = Mesh(np.array(devices).reshape(tuple(SIZES.values())), tuple(SIZES))
    (found,) = collectives(module(line), mesh)
    assert (found.kind, found.axes, found.group, found.bytes) == ("all-reduce", ("data",), 2, SIZE)


@pytest.mark.parametrize(
    ("line", "asynchronous"),
    [
        ("f32[8,8]{1,0} all-gather(%x), ", False),
        ("(f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), ", True),
        ('(f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%x), backend_config={"is_sync":true}, ', False),
    ],
)
def test_what_is_begun_and_waited_for_later_is_asynchronous(line, asynchronous):
    (found,) = collectives(module(f"%g = {line}{PAIRS}"), SIZES)
    assert found.asynchronous == asynchronous


def test_what_an_asynchronous_computation_calls_is_so_too():
    body = (
        "%inner (p: f32[4,8]) -> f32[8,8] {\n  %p = f32[4,8]{1,0} parameter(0)\n"
        f"  ROOT %g = f32[8,8]{{1,0}} all-gather(%p), {PAIRS}\n}}\n"
    )
    begun = "%s = ((f32[4,8]{1,0}), f32[8,8]{1,0}, u32[]) async-start(%x), calls=%inner"
    (found,) = collectives(module(begun, "%d = f32[8,8]{1,0} async-done(%s), calls=%inner", more=body), SIZES)
    assert found.asynchronous


def test_kernels_that_share_one_collective_count_once():
    """As a TPU writes an all-gather that runs while matmuls do: in the kernel that starts it, and in the next."""
    kernels, config = "", '"async_collective_fusion_config":{"flag_start":"2"}'
    for name, channel in (("k1", 7), ("k2", 7), ("k3", 8)):
        gather = f"f32[8,8]{{1,0}} all-gather(%p), channel_id={channel}, {PAIRS}, backend_config={{{config}}}"
        kernels += (
            f"%{name} (p: f32[4,8]) -> f32[8,8] {{\n  %p = f32[4,8]{{1,0}} parameter(0)\n  ROOT %g = {gather}\n}}\n"
        )
    calls = [f"%f{k} = f32[8,8]{{1,0}} fusion(%x), kind=kCustom, calls=%k{k}" for k in (1, 2, 3)]
    assert summary(collectives(module(*calls, more=kernels), SIZES)) == {("all-gather", ("tensor",)): (2, 2 * SIZE)}


def test_a_kernel_that_reduces_and_slices_is_a_reduce_scatter():
    """The TPU compiler's spelling; the same outside of a kernel stays an all-reduce unless asked otherwise."""
    lines = (
        f"%r = f32[4,8]{{1,0}} all-reduce(%x), {PAIRS}, to_apply=%a",
        "ROOT %d = f32[2,8]{1,0} dynamic-slice(%r, %o, %o), dynamic_slice_sizes={2,8}",
    )
    kernel = "%k (x: f32[4,8]) -> f32[2,8] {\n  %x = f32[4,8]{1,0} parameter(0)\n" + "\n".join(
        f"  {line}" for line in lines
    )
    call = "ROOT %f = f32[2,8]{1,0} fusion(%x), kind=kCustom, calls=%k"
    assert [c.kind for c in collectives(module(call, more=kernel + "\n}\n"), SIZES)] == ["reduce-scatter"]
    assert [c.kind for c in collectives(module(*lines), SIZES)] == ["all-reduce"]
    assert [c.kind for c in collectives(module(*lines), SIZES, as_accelerator=True)] == ["reduce-scatter"]


# ------------------------------------------------------------------------------------------------------ real programs


def compiled(function, mesh, shape, spec, out=None):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(function, out_shardings=out and NamedSharding(mesh, out)).lower(x).compile().as_text()


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(SIZES)


def test_collectives_of_manual_code(mesh):
    """Each collective of JAX appears with its axis and bytes, as often as the scan around it runs."""

    def exchange(x):  # x: (4, 16) on each device
        def body(x, _):
            x = x + jax.lax.psum(x, "tensor")
            x = jax.lax.all_to_all(x, "fsdp", 0, 0, tiled=True)
            y = jax.lax.all_gather(x, "data", axis=0, tiled=True)
            x = x + jax.lax.psum_scatter(y, ("data", "fsdp"), scatter_dimension=0, tiled=True).sum() / 7
            return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), None

        return jax.lax.scan(body, x, length=3)[0]

    manual = jax.shard_map(exchange, in_specs=P(("data", "fsdp", "tensor")), out_specs=P(("data", "fsdp", "tensor")))
    size, found = 4 * 16 * 4, collectives(compiled(manual, mesh, (32, 16), P(("data", "fsdp", "tensor"))), mesh)
    assert summary(found) == {
        ("all-reduce", ("tensor",)): (3, 3 * size),
        ("all-to-all", ("fsdp",)): (3, 3 * size / 2),
        ("all-gather", ("data",)): (3, 3 * size),
        ("reduce-scatter", ("data", "fsdp")): (3, 3 * 2 * size * 3 / 4),
        ("collective-permute", ("tensor",)): (3, 3 * size),
    }
    assert not any(c.conditional for c in found)
    table = describe(found)
    assert len(table.splitlines()) == 6
    assert "reduce-scatter       data fsdp" in table


def test_collectives_in_branches_are_marked(mesh):
    def branch(x):
        index = jax.lax.axis_index("data")
        inner = lambda x: jax.lax.cond(x.sum() > 0, lambda x: jax.lax.psum(x, "tensor"), lambda x: 2 * x, x)
        permute = lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)])
        return jax.lax.switch(index, [permute, inner], x) + jax.lax.psum(x, "fsdp")

    manual = jax.shard_map(branch, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    found = {c.kind + c.axes[0]: c for c in collectives(compiled(manual, mesh, (4, 8), P("data")), mesh)}
    assert not found["all-reducefsdp"].conditional
    assert found["collective-permutefsdp"].branch.endswith("[0]")
    outer, inner = found["all-reducetensor"].branch.split("/")
    assert outer.endswith("[1]")
    assert inner.startswith("conditional") or "[" in inner


def test_a_loop_that_clears_its_own_flag_is_a_branch(mesh):
    """A while that runs once or not at all: how code spells a branch that has no other side."""

    def once(x):
        flag = jax.lax.axis_index("data") > 0
        return jax.lax.while_loop(lambda s: s[0], lambda s: (False, jax.lax.psum(s[1], "tensor")), (flag, x))[1]

    manual = jax.shard_map(once, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    (found,) = collectives(compiled(manual, mesh, (4, 8), P("data")), mesh)
    assert (found.times, found.axes, found.conditional) == (1, ("tensor",), True)


def test_an_accelerator_would_reduce_sums_once_and_scatter_them(mesh):
    """The CPU compiler reduces both products whole; those for GPU and TPU reduce their sum, and only a slice of it."""
    constrain = jax.lax.with_sharding_constraint

    def two_products(x):
        matrices = (constrain(jnp.outer(jnp.arange(8.0) + i, jnp.ones(8)), P("tensor")) for i in (1, 2))
        return sum(constrain(x @ matrix, P()) for matrix in matrices)

    text = compiled(two_products, mesh, (4, 8), P(None, "tensor"), P("tensor"))
    plain, ours = (summary(collectives(text, mesh, as_accelerator=flag)) for flag in (False, True))
    assert plain.keys() == {("all-reduce", ("tensor",))}
    assert plain["all-reduce", ("tensor",)][1] == 2 * SIZE
    assert ours == {("reduce-scatter", ("tensor",)): (1, SIZE / 2)}
