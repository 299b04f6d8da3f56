"""Collectives read off HLO text: every way to write groups, loops and their lengths, asynchronous halves, fusions."""

import pytest

from baichuan_omni_jax.train.preflight.hlo import Collective, collectives_of

MESH = {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: f32[8,4]) -> f32[2,4] {
  ROOT %reduce-scatter.1 = f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}, \
to_apply=%add, metadata={op_name="jit(step)/backward"}
}

%body (s: (s32[], bf16[2,8])) -> (s32[], bf16[2,8]) {
  %all-gather-start.1 = (bf16[2,8]{1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)}) all-gather-start(%g), \
replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}, metadata={op_name="jit(step)/while/body/weights"}
  %all-gather-done.1 = bf16[4,8]{1,0} all-gather-done(%all-gather-start.1)
  %scattered = f32[2,4]{1,0} fusion(%h), kind=kCustom, calls=%fused
}

%cond (s: (s32[], bf16[2,8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%wrapped (p: f32[16]) -> f32[16] {
  ROOT %permute = f32[16]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0},{4,5}}
}

ENTRY %main (a: f32[16], b: f32[16]) -> f32[] {
  %loop = (s32[], bf16[2,8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"28"}}
  %async-start = ((f32[16]), f32[16], u32[]) async-start(%a), calls=%wrapped
  %async-done = f32[16] async-done(%async-start), calls=%wrapped
  %mesh = f32[] all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0', 'axis_1':(2)2}, to_apply=%add
  %alone = f32[] all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %all = (f32[4]{0}, f32[]) all-reduce(%y, %z), replica_groups={}, to_apply=%add
}
"""


def test_every_collective_is_found_once():
    found = collectives_of(TEXT, MESH)
    assert found == [
        Collective("reduce-scatter", 8 * 4 * 4, ("context",), "jit(step)/backward", 1, 28),
        Collective("all-gather", 4 * 8 * 2, ("fsdp",), "jit(step)/while/body/weights", 1, 28),
        Collective("collective-permute", 64, ("context",), "", 0, 1),
        Collective("all-reduce", 4, ("fsdp", "context"), "", 0, 1),
        Collective("all-reduce", 20, ("fsdp", "context"), "", 0, 1),
    ]


def test_text_of_another_mesh_is_refused():
    with pytest.raises(ValueError, match="more devices than the mesh"):
        collectives_of(TEXT, {"data": 2})


def test_loop_length_is_read_off_its_condition():
    """As XLA writes programs for TPU: the loop carries no note, its condition compares the counter with a constant."""
    silent = TEXT.replace(', backend_config={"known_trip_count":{"n":"28"}}', "")
    bounded = silent.replace("  ROOT %less", "  %n = s32[]{:T(128)} constant(28)\n  ROOT %less")
    assert collectives_of(bounded, MESH) == collectives_of(TEXT, MESH)
    assert [one.times for one in collectives_of(silent, MESH)] == [1] * 5
