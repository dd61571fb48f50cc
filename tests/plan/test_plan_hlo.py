"""Reading compiled programs: what is counted in one agrees with what was traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.errors import UserError
from maxlm.model.flops import count_matmul_flops
from maxlm.plan import collectives, hlo

# Lines as the TPU compiler writes them, shortened.
TPU = """
HloModule jit_train_step, is_scheduled=true

%turns (arg: (s32[], f32[8,16])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %arg = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %five), direction=LT
}

%scattered (p: f32[64,32]) -> f32[16,32] {
  %p = f32[64,32]{1,0:T(8,128)} parameter(0)
  %sum = f32[64,32]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %cut = f32[16,32]{1,0} dynamic-slice(%sum, %where, %zero), dynamic_slice_sizes={16,32}
}

%body (arg.1: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %arg.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%arg.1), index=1
  %g = f32[64,32]{1,0:T(8,128)} broadcast(%x), dimensions={}
  %scatter = f32[16,32]{1,0:T(8,128)} fusion(%g), kind=kCustom, calls=%scattered, metadata={op_name="jit(train_step)/b"}, backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion"}}
  %gather = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, dimensions={0}, backend_config={"collective_algorithm_config":{"emitter":"1DAllGatherNonMajorDimImbalanced"}}
  %start = (f32[8,16]{1,0}, f32[8,16]{1,0}) collective-permute-start(%x), source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %busy = f32[8,16]{1,0:T(8,128)} add(%x, %x), backend_config={"window_config":{"estimated_cycles":"700"}}
  %done = f32[8,16]{1,0} collective-permute-done(%start)
  %one = s32[]{:T(128)} constant(1)
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%one, %done)
}

ENTRY %main (param: f32[8,16]) -> f32[8,16] {
  %param = f32[8,16]{1,0:T(8,128)} parameter(0), metadata={op_name="state.params[\\'w\\']"}
  %param.1 = f32[8,16]{1,0:T(8,128)} parameter(1), metadata={op_name="state.opt_state[\\'adamw\\'].mu"}
  %zero = s32[]{:T(128)} constant(0)
  %start.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%zero, %param)
  %kernel = f32[2,32]{1,0} custom-call(%param), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof": "{}"
}}, metadata={op_name="jit(train_step)/kernel"}
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%start.1), condition=%turns, body=%body, metadata={op_name="jit(train_step)/while"}
  %all = f32[2101]{0} all-reduce(%kernel), replica_groups=[1,8]<=[8], to_apply=%add, metadata={op_name="jit(train_step)/reduce_scatter"}, backend_config={"collective_algorithm_config":{"emitter":"RotatedPincerEmitter"}}
  ROOT %result = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_a_loop_without_a_known_count_turns_as_its_condition_says():
    module = hlo.parse(TPU)
    assert module.runs == {"main": 1.0, "body": 5.0}
    assert sum(i.cycles * times for i, _, times in module.scheduled()) == 3500
    kernel = next(i for i in module.computations["main"] if i.name == "kernel")
    assert kernel.op_name == "jit(train_step)/kernel"  # behind a text of several lines


OFFLOADED = """
HloModule jit_train_step, is_scheduled=true

%first (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %first.0 = f32[4]{0} add(%a, %a)
}, execution_thread="sparsecore"

%sends (b: f32[4]) -> f32[32] {
  %b = f32[4]{0} parameter(0)
  ROOT %gather = f32[32]{0} all-gather(%b), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (c: f32[4]) -> f32[32] {
  %c = f32[4]{0} parameter(0)
  %start = ((f32[4]{0}), f32[32]{0}, u32[]) async-start(%c), async_execution_thread="sparsecore", calls=%sends
  ROOT %done = f32[32]{0} async-done(%start)
}
"""


def test_a_computation_of_another_thread_ends_where_it_does_and_sends_once():
    module = hlo.parse(OFFLOADED)
    ends = {name: [i.name for i in instructions if i.root] for name, instructions in module.computations.items()}
    assert ends == {"first": ["first.0"], "sends": ["gather"], "main": ["done"]}
    assert [i.name for i in module.computations["sends"]] == ["b", "gather"]
    (sent,) = collectives.find(module, {"data": 8})
    assert (sent.name, sent.kind, sent.times, sent.payload) == ("start", "all-gather", 1, 4 * 32)


def test_a_loop_whose_turns_the_data_decides_turns_once_unless_it_is_said_how_often():
    text = TPU.replace("%five = s32[]{:T(128)} constant(5)", "%five = s32[]{:T(128)} get-tuple-element(%arg), index=1")
    module = hlo.parse(text)
    assert module.runs["body"] == 1.0
    assert dataclasses.replace(module, turns={"loop": 2.5}).runs["body"] == 2.5


def test_a_text_that_is_no_program_is_answered_in_a_sentence():
    with pytest.raises(UserError, match="cannot be read: it has no ENTRY computation; take the versions"):
        hlo.parse("HloModule m")


def test_collectives_are_what_the_compiler_emits_over_the_axes_that_their_groups_span():
    mesh = {"data": 4, "fsdp": 2}
    found = {c.name: c for c in collectives.find(hlo.parse(TPU), mesh)}
    scatter, gather, permute, whole = (found[name] for name in ("scatter", "gather", "start", "all"))
    assert (scatter.kind, scatter.asked, scatter.axes) == ("reduce-scatter", "all-reduce", ("data",))
    assert (scatter.payload, scatter.times, scatter.wire) == (64 * 32 * 4, 5, 64 * 32 * 4 * 3 / 4)
    assert (gather.kind, gather.axes, gather.members) == ("all-gather", ("data",), (0, 2, 4, 6))
    assert not gather.asynchronous
    assert (permute.kind, permute.axes, permute.group) == ("collective-permute", ("data",), 4)
    assert permute.asynchronous
    # Explicit reduce-scatters over all of a slice become all-reduces, and move twice as much.
    assert (whole.kind, whole.axes, whole.wire) == ("all-reduce", ("data", "fsdp"), 2 * 2101 * 4 * 7 / 8)
    traffic = collectives.by_kind_and_axes(list(found.values()))
    assert traffic[0].kind == "all-gather" and traffic[0].payload == 5 * 64 * 128 * 2
    assert collectives.emitted_kind("all-gather", "RotatedPincerEmitter") == "all-reduce"


@pytest.mark.parametrize(
    ("line", "payload"),
    [
        # As the GPU compiler writes them: what is sent and what arrives stand side by side in the start's type.
        ("((f32[4]{0}, f32[2]{0}), (f32[32]{0}, f32[16]{0})) all-gather-start(%a, %b), dimensions={0}", 4 * 48),
        ("(f32[4]{0}, f32[32]{0}) all-gather-start(%a), dimensions={0}", 4 * 32),
        ("((f32[8,4]{1,0}), f32[8,4]{1,0}) all-to-all-start(%c), dimensions={0}", 4 * 32),
        ("((f32[4]{0}, f32[4]{0}), (f32[4]{0}, f32[4]{0}), u32[]) all-to-all-start(%a, %a)", 4 * 8),
        ("(f32[4]{0}, f32[2]{0}) all-reduce-start(%a, %b), to_apply=%add", 4 * 6),
        ("f32[4]{0} all-reduce-start(%a), to_apply=%add", 4 * 4),
        ("((f32[32]{0}), f32[4]{0}) reduce-scatter-start(%c), dimensions={0}, to_apply=%add", 4 * 32),
        ("(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a)", 4 * 4),
    ],
)
def test_a_start_counts_what_arrives_once(line, payload):
    instruction = hlo._instruction(f"  %x = {line}")
    shapes = {"a": "f32[4]{0}", "b": "f32[2]{0}", "c": "f32[8,4]{1,0}"}
    assert collectives._payload(instruction, instruction.opcode.removesuffix("-start"), shapes) == payload


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1},{2,3}}, x", (0, 1)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", (0, 1)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", (0, 1)),
        ("replica_groups={}", tuple(range(8))),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", (0, 2)),
        ("source_target_pairs={{0,0},{1,2},{2,1},{3,3}}", (1, 2)),  # some keep what they have
        ("source_target_pairs={{0,0},{1,1}}", ()),
    ],
)
def test_groups_in_every_form_that_xla_writes(text, group):
    instruction = hlo.Instruction("x", "all-reduce", "f32[]", (), text, False)
    assert collectives.first_group(instruction, 8) == group


@pytest.mark.parametrize(
    ("line", "shapes", "flops"),
    [
        # A product of a stacked pair of dims: heads are a window that covers the input, so each output meets all.
        (
            "f32[2,8192,4096,1]{1,2,3,0} convolution(%a, %b), window={size=1x32}, dim_labels=0b1f_1io0->0bf1",
            {"a": "bf16[2,8192,32,128]", "b": "bf16[32,128,4096,1]"},
            2 * 2 * 8192 * 4096 * 32 * 128,
        ),
        (
            "f32[2,512,4096]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=0bf_oi0->0bf",
            {"a": "bf16[2,512,128256]", "b": "bf16[4096,128256,1]"},
            2 * 2 * 512 * 4096 * 128256,
        ),
        # A batch of products as a window with padding and spread: only one position in each window meets an element.
        (
            "f32[4,8,16]{2,1,0} convolution(%a, %b), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, "
            "dim_labels=0bf_0io->0bf",
            {"a": "f32[4,8,32]", "b": "f32[4,32,16]"},
            2 * 4 * 8 * 16 * 32,
        ),
        (
            '(bf16[128,64]{1,0}, s8[4]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config='
            '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
            {"a": "bf16[128,256]", "b": "bf16[256,64]"},
            2 * 128 * 64 * 256,
        ),
        ("f32[3,5]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
         {"a": "f32[3,7]", "b": "f32[7,5]"}, 2 * 3 * 5 * 7),
    ],
)  # fmt: skip
def test_flops_of_products_in_the_forms_that_compilers_make_of_them(line, shapes, flops):
    assert hlo.product_flops(hlo._instruction(f"  %x = {line}"), shapes) == flops


def test_a_program_compiled_here_has_the_flops_and_gathers_of_the_traced_one():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    place = {name: NamedSharding(mesh, spec) for name, spec in {"x": P("data"), "w": P(None, "fsdp")}.items()}

    def step(w, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, w)[0]

    w = jax.ShapeDtypeStruct((6, 32, 32), jnp.float32, sharding=place["w"])
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place["x"])
    traced = jax.jit(step, out_shardings=place["x"]).trace(w, x)
    module = hlo.parse(traced.lower().compile().as_text())
    assert hlo.total_flops(module) == count_matmul_flops(traced.jaxpr) / 2  # two devices share the rows
    gathers = [c for c in collectives.find(module, {"data": 2, "fsdp": 4}) if c.kind == "all-gather"]
    assert gathers and {c.axes for c in gathers} == {("fsdp",)}
    assert sum(c.payload * c.times for c in gathers) == 6 * 32 * 32 * 4
