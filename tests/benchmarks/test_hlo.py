import jax
import jax.numpy as jnp
import pytest

from benchmarks.hlo import Kernel, cycles_of, kernels_of

# As XLA writes it, shortened.
HLO = """
HloModule jit_f, is_scheduled=true

%some (param_0: bf16[8,100], param_1: s32[], param_2: bf16[1,100]) -> bf16[1,100] {
  %param_0 = bf16[8,100]{1,0} parameter(0), metadata={scheduling_name="param_0"}
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %same = bf16[8,100]{1,0} bitcast(%param_0)
  %row = bf16[1,100]{1,0} dynamic-slice(%same, %param_1, %zero), dynamic_slice_sizes={1,100}
  %param_2 = bf16[1,100]{1,0} parameter(2)
  ROOT %add = bf16[1,100]{1,0} add(%row, %param_2), metadata={op_name="add"}
}

%written (param_0.1: f32[8,100], param_1.1: f32[1,100], param_2.1: s32[]) -> f32[8,100] {
  %param_0.1 = f32[8,100]{1,0} parameter(0)
  %param_1.1 = f32[1,100]{1,0} parameter(1)
  %param_2.1 = s32[] parameter(2)
  ROOT %update = f32[8,100]{1,0} dynamic-update-slice(%param_0.1, %param_1.1, %param_2.1)
}

%body (arg: (s32[], bf16[8,100], bf16[1,100])) -> (s32[], bf16[8,100], bf16[1,100]) {
  %arg = (s32[], bf16[8,100]{1,0}, /*index=2*/bf16[1,100]{1,0}) parameter(0)
  %index = s32[] get-tuple-element(%arg), index=0
  %rows = bf16[8,100]{1,0} get-tuple-element(%arg), index=1
  %total = bf16[1,100]{1,0} get-tuple-element(%arg), index=2
  %fusion.1 = bf16[1,100]{1,0} fusion(%rows, %index, %total), kind=kLoop, calls=%some
  ROOT %tuple.1 = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) tuple(%index, %rows, %fusion.1)
}

%condition (arg.1: (s32[], bf16[8,100], bf16[1,100])) -> pred[] {
  %arg.1 = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main.1 (x: bf16[8,100], w: f32[8,100], row: f32[1,100], i: s32[]) -> f32[8,100] {
  %x = bf16[8,100]{1,0} parameter(0), sharding={replicated}
  %w = f32[8,100]{1,0} parameter(1)
  %row = f32[1,100]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %gemm = (f32[100,100]{1,0}, s8[4000]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm"
  %start = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) tuple(%i, %x, %x)
  %loop = (s32[], bf16[8,100]{1,0}, bf16[1,100]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  ROOT %fusion.2 = f32[8,100]{1,0} fusion(%w, %row, %i), kind=kLoop, calls=%written
}
"""  # noqa: E501


def test_kernels_and_what_they_move():
    assert kernels_of(HLO) == [
        # An operand is read once, however often it is named; the bytes are for cuBLAS's own use.
        Kernel("gemm", "__cublas$gemm", 1, 4 * 100 * 100 + 2 * 800),
        # One row of eight, an index, the sum so far; the new sum.
        Kernel("fusion.1", "fusion", 8, 3 * 2 * 100 + 4),
        # A row and an index in, the row in place.
        Kernel("fusion.2", "fusion", 1, 2 * 4 * 100 + 4),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be that of a compiled program"),
        (HLO.replace("known", ""), "loop is a loop of unknown length"),
        (HLO.replace(" while(", " conditional("), r"loop \(conditional\) moves is not known"),
    ],
)
def test_what_it_cannot_read(text, message):
    with pytest.raises(ValueError, match=message):
        kernels_of(text)


def test_reads_what_xla_writes():
    x = jnp.ones((100, 200))
    compiled = jax.jit(lambda x: (jnp.sin(x) + 1) * jnp.cos(x)).lower(x).compile()
    assert sum(kernel.total_bytes for kernel in kernels_of(compiled.as_text())) == 2 * x.nbytes


# As XLA writes it for a TPU, shortened.
TPU = """
HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %arg = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8]{0:T(256)} get-tuple-element(%arg), index=1
  %fusion = f32[8]{0:T(256)} fusion(%x), kind=kLoop, calls=%some, backend_config={"flag_configs":[],"estimated_cycles":"30"}
  ROOT %tuple = (s32[]{:T(128)}, f32[8]{0:T(256)}) tuple(%index, %fusion)
}

%condition (arg.1: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %arg.1 = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%index.1, %limit), direction=LT
}

ENTRY %main (start: (s32[], f32[8])) -> f32[8] {
  %start = (s32[]{:T(128)}, f32[8]{0:T(256)}) parameter(0)
  %while = (s32[]{:T(128)}, f32[8]{0:T(256)}) while(%start), condition=%condition, body=%body
  %y = f32[8]{0:T(256)} get-tuple-element(%while), index=1
  %copy-start = (f32[8]{0:T(256)S(1)}, f32[8]{0:T(256)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = f32[8]{0:T(256)S(1)} copy-done(%copy-start)
  ROOT %fusion.1 = f32[8]{0:T(256)} fusion(%copy-done), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


# A kernel that moves 64 bytes, in the loop.
WITH_KERNEL = TPU.replace(
    "  ROOT %tuple =",
    '  %ours.1 = f32[8]{0:T(256)} custom-call(%x), custom_call_target="tpu_custom_call", '
    'backend_config={"custom_call_config":{"body":"abc","cost_estimate":{"bytes_accessed":"64"}}}\n'
    "  ROOT %tuple =",
)


def test_cycles():
    assert cycles_of(TPU) == 5 * 30 + 7
    assert (
        cycles_of(WITH_KERNEL, lambda names, moved: {"ours.1": moved / 2}[names[0]]) == 5 * 62 + 7
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TPU.replace("constant(5)", "parameter(1)"), "while is a loop of unknown length"),
        (TPU.replace("direction=LT", "direction=NE"), "while is a loop of unknown length"),
        (TPU.replace(" while(", " conditional("), "branch of while runs is not known"),
        (WITH_KERNEL, "the kernel ours.1 takes is not known"),
    ],
)
def test_cycles_that_are_not_known(text, message):
    with pytest.raises(ValueError, match=message):
        cycles_of(text)
