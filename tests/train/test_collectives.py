"""What programs send, counted from their text, against sizes worked out by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from lin_jax.train.collectives import Collective, find_collectives, sent_bytes

# As XLA writes programs for TPUs, shortened: layouts with tiles, exchanges that are started and finished apart.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (f32[8,16]{1,0}, f32[32,16]{1,0:T(8,128)S(1)}) all-gather-start(%a), replica_groups=[2,4]<=[4,2]T(1,0)
  ROOT %d = f32[32,16]{1,0:T(8,128)} all-gather-done(%s)
}

%async (p: bf16[8,5]) -> bf16[2,5] {
  ROOT %rs = bf16[2,5]{1,0:T(8,128)(2,1)} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (p: f32[]) -> f32[] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %as = ((bf16[8,5]), bf16[2,5], u32[]) async-start(%p), calls=%async
  %ad = bf16[2,5] async-done(%as), calls=%async
  %cp = (bf16[2]{0:T(256)}, bf16[2], u32[]{:S(2)}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %me = f32[4] all-gather(%z), replica_groups=mesh['x'=2,'y'=4], device_ids=([2,2,2]T(1,0,2)) {'x','y':(2)2}
  %alone = f32[7] all-reduce(%y), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %a = (f32[3], bf16[8]{0:T(256)(2,1)}) all-reduce-start(%u, %v), replica_groups={}, metadata={op_name="jit(f)/g"}
}
"""


def test_asynchronous_exchanges_count_once_and_loops_as_often_as_they_turn():
    halves = ((0, 1, 2, 3), (4, 5, 6, 7))
    assert find_collectives(TPU) == [
        Collective("all-gather", 32 * 16 * 4, ((0, 2, 4, 6), (1, 3, 5, 7)), 3, ""),
        Collective("reduce-scatter", 8 * 5 * 2, halves, 1, ""),
        Collective("collective-permute", 4, ((0, 1),), 1, ""),
        Collective("all-gather", 16, ((0, 1, 2, 3), (4, 5, 6, 7)), 1, ""),
        Collective("all-reduce", 28, (tuple(range(8)),), 1, "jit(f)/g"),
    ]


def test_bytes_of_a_compiled_program():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    cut = PartitionSpec(("a", "b"))

    def local(x, w):
        def turn(x, w):
            x = jax.lax.ppermute(x, "b", [(0, 1), (1, 2)])
            whole = jax.lax.all_gather(w, "b", tiled=True)
            return jnp.tanh(x @ whole), jax.lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True)

        y, z = jax.lax.scan(turn, x, w)
        return jax.lax.psum(y, "a") + jax.lax.all_to_all(z, "b", 2, 1, tiled=True).sum(axis=(0, 2))[:8, None]

    f = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(cut, PartitionSpec(None, "b")), out_specs=cut))
    found = find_collectives(f.lower(jnp.ones((64, 16)), jnp.ones((5, 16, 16))).compile().as_text())
    assert sent_bytes(found) == {
        "collective-permute": 5 * 8 * 16 * 4,
        "all-gather": 5 * 16 * 16 * 4 * 3 // 4,
        "reduce-scatter": 5 * 8 * 16 * 4 * 3 // 4,
        "all-reduce": 2 * 8 * 16 * 4 // 2,
        "all-to-all": 5 * 8 * 4 * 4 * 3 // 4,
    }
    assert {c.groups for c in found if c.kind == "all-reduce"} == {((0, 4), (1, 5), (2, 6), (3, 7))}


# What libtpu writes: an exchange in steps beside other work, loops without their length, groups by axes of a mesh.
STEPS = """HloModule jit_f, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (input: f32[2048,512]) -> f32[2048,128] {
  %ar = f32[2048,512]{1,0:T(8,128)} all-reduce(%input), channel_id=72, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[2048,128]{1,0:T(8,128)S(1)} dynamic-slice(%ar, %zero, %offset), dynamic_slice_sizes={2048,128}
}

%first (p: bf16[1,128]) -> bf16[1,512] {
  ROOT %g = bf16[1,512]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, frontend_attributes={chain_id="3"}
}

%second (p: bf16[1,128]) -> bf16[1,512] {
  ROOT %g2 = bf16[1,512]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, frontend_attributes={chain_id="3"}
}

%body (p: (s32[], bf16[1,128])) -> (s32[], bf16[1,128]) {
  %x = bf16[1,512]{1,0} fusion(%p), kind=kCustom, calls=%first
  %y = bf16[1,512]{1,0} fusion(%p), kind=kCustom, calls=%second
  ROOT %r = f32[4]{0:T(128)} all-reduce(%z), channel_id=9, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
}

%condition (p: (s32[], bf16[1,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[]) -> f32[] {
  %s = f32[2048,128]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %w = (s32[], bf16[1,128]) while(%t), condition=%condition, body=%body
}
"""  # noqa: E501


def test_exchanges_in_steps_count_once_and_loops_by_their_condition():
    halves = ((0, 1, 2, 3), (4, 5, 6, 7))
    assert find_collectives(STEPS) == [
        Collective("reduce-scatter", 2048 * 512 * 4, halves, 1, ""),
        Collective("all-gather", 512 * 2, halves, 32, ""),
        Collective("all-reduce", 16, ((0, 4), (1, 5), (2, 6), (3, 7)), 32, ""),
    ]
