"""What a device holds, from XLA's reports."""

from maxlm.plan import hlo, memory

PROGRAM = """
HloModule jit_train_step, is_scheduled=true

%go (a: (s32[])) -> pred[] {
  %three = s32[] constant(3)
  %a = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  ROOT %lt = pred[] compare(%i, %three), direction=LT
}

%forward (b: (s32[], bf16[3,128])) -> (s32[], bf16[3,128]) {
  %b = (s32[], bf16[3,128]{1,0}) parameter(0)
  ROOT %keep = bf16[3,128]{1,0} fusion(%b), kind=kLoop, calls=%x, metadata={op_name="jit(train_step)/loss_and_gradients/jvp(layers)/while/body/mlp/dynamic_update_slice"}
}

%backward (c: (s32[], bf16[3,128])) -> (s32[], bf16[3,128]) {
  %c = (s32[], bf16[3,128]{1,0}) parameter(0)
  ROOT %grads = f32[3,64]{1,0} fusion(%c), kind=kLoop, calls=%x, metadata={op_name="jit(train_step)/loss_and_gradients/transpose(jvp(layers))/while/body/mlp/add"}
}

ENTRY %main (p0: f32[3,64], p1: f32[3,64]) -> f32[] {
  %p0 = f32[3,64]{1,0} parameter(0), metadata={op_name="state.params[\\'layers\\'][\\'mlp\\']"}
  %p1 = f32[3,64]{1,0} parameter(1), metadata={op_name="state.opt_state[\\'adamw\\'].mu"}
  %cast = bf16[3,64]{1,0} convert(%p0), metadata={op_name="jit(train_step)/loss_and_gradients/jvp(layers)/while"}
  %while.1 = (s32[], bf16[3,128]{1,0}) while(%cast), condition=%go, body=%forward, metadata={op_name="jit(train_step)/loss_and_gradients/jvp(layers)/while"}
  %logits = f32[500]{0} fusion(%while.1), kind=kLoop, calls=%x, metadata={op_name="jit(train_step)/loss_and_gradients/jvp(loss)/dot"}
  %while.2 = (s32[], f32[3,64]{1,0}) while(%logits), condition=%go, body=%backward, metadata={op_name="jit(train_step)/loss_and_gradients/transpose(jvp(layers))/while"}
  ROOT %end = f32[] add(%p0, %p1)
}
"""  # noqa: E501

BUFFERS = """BufferAssignment:
allocation 0: size 768, parameter 0, shape |f32[3,64]| at ShapeIndex {}, maybe-live-out:
 value: <1 p0 @0> (size=768,offset=0): f32[3,64]{1,0}
allocation 1: size 768, parameter 1, shape |f32[3,64]| at ShapeIndex {}, maybe-live-out:
 value: <2 p1 @0> (size=768,offset=0): f32[3,64]{1,0}
allocation 2: size 9999, color 1, preallocated-temp:
 value: <3 fast @1> (size=9999,offset=0): f32[2499]{0:S(1)}
allocation 3: size 4096, preallocated-temp:
 value: <4 keep @0> (size=768,offset=0): bf16[3,128]{1,0}
 value: <5 while.1{1} (phi) @0> (size=768,offset=0): bf16[3,128]{1,0}
 value: <6 cast @0> (size=384,offset=768): bf16[3,64]{1,0}
 value: <7 logits @0> (size=2000,offset=1152): f32[500]{0}
 value: <8 grads @0> (size=768,offset=1152): f32[3,64]{1,0}
allocation 4: size 16, output shape is |f32[]|, maybe-live-out:
"""

RANGES = """HloLiveRange (max 9):
  InstructionSequence:
    0:p0
    1:cast
    2:b
    3:keep
    4:while.1
    5:logits
    6:c
    7:grads
    8:while.2
  BufferLiveRange:
    p0{}:0-9
    cast{}:1-9
    keep{}:3-4
    while.1{1}:4-8
    logits{}:5-5
    grads{}:7-8
  Live ranges at 5 (peak):
    keep{}: 768 bytes (cumulative: 768 bytes)
"""


def test_the_fullest_moment_by_component():
    held = memory.read_memory(hlo.parse(PROGRAM), BUFFERS, RANGES)
    expected = {
        "parameters": 768,
        "optimizer": 768,
        "weights in the compute dtype": 384,
        "kept activations": 768,  # in place from the forward loop to the end of the backward one, counted once
        "loss": 2000,
        "gaps": 4096 - 384 - 768 - 2000 + 16,  # the region's empty places, and a result
    }
    assert {name: size for name, size in held.components.items() if size} == expected
    assert held.total == 2 * 768 + 4096 + 16  # vector memory is not device memory
    assert [buffer.name for buffer in held.largest[:2]] == ["logits{}", "p0"]
    assert held.largest[0].made_by == "loss/dot"


def test_an_array_is_named_by_the_code_that_fills_it_not_by_its_zeros():
    """As of a loop's stack: zeros in its place first, then what is written into them."""
    scope, shape = "jit(train_step)/loss_and_gradients/jvp(layers)", "bf16[3,128]{1,0}"
    zeros = f'  %zeros = {shape} broadcast(%p0), metadata={{op_name="{scope}/while/body/a/b/broadcast_in_dim"}}\n'
    copied = f'  %copied = {shape} copy(%zeros), metadata={{op_name="state.params/a/b/c/d/e/f"}}\n'
    program = PROGRAM.replace("  %cast = ", f"{zeros}{copied}  %cast = ")
    names = ((9, "zeros"), (10, "copied"))
    values = "".join(f" value: <{number} {name} @0> (size=768,offset=0): {shape}\n" for number, name in names)
    buffers = BUFFERS.replace(" value: <4 keep", f"{values} value: <4 keep")
    ranges = RANGES.replace("    keep{}:3-4", "    zeros{}:1-1\n    copied{}:1-2\n    keep{}:3-4")
    held = memory.read_memory(hlo.parse(program), buffers, ranges)
    assert held.components == memory.read_memory(hlo.parse(PROGRAM), BUFFERS, RANGES).components
    (kept,) = [buffer for buffer in held.largest if buffer.component == "kept activations"]
    assert kept.made_by == "layers/mlp/dynamic_update_slice"


def test_gradients_are_found_where_the_loss_is_over():
    later = RANGES.replace("logits{}:5-5", "logits{}:1-0")
    held = memory.read_memory(hlo.parse(PROGRAM), BUFFERS, later)
    assert held.components["gradients"] == 768 and held.components["loss"] == 0


def test_names_of_code_are_short_and_say_the_direction():
    name = "jit(train_step)/loss_and_gradients/transpose(jvp(layers))/while/body/closed_call/checkpoint/"
    assert memory.readable(name + "mlp/bsd,bsf->df/dot_general") == "backward layers/mlp/bsd,bsf->df/dot_general"
    assert memory.readable(name + "rematted_computation/mlp/mul") == "recomputed layers/mlp/mul"
    assert memory.readable("state.params[\\'head\\'][\\'kernel\\']") == "state.params['head']['kernel']"
