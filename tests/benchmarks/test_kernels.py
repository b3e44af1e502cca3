import jax
import jax.numpy as jnp

from tests.benchmarks.kernels import by_family, kernels

PROGRAM = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_reduce (param_0: bf16[16,64,32]) -> f32[16,32] {
  %param_0 = bf16[16,64,32]{2,1,0} parameter(0)
  %wide = f32[16,64,32]{2,1,0} convert(%param_0)
  %zero = f32[] constant(0)
  ROOT %total = f32[16,32]{1,0} reduce(%wide, %zero), dimensions={1}, to_apply=%add
}

%fused_slice (param_0.1: f32[16,32], param_1: f32[16,8]) -> f32[16,8] {
  %param_0.1 = f32[16,32]{1,0} parameter(0)
  %part = f32[16,8]{1,0} slice(%param_0.1), slice={[0:16], [0:8]}
  %param_1 = f32[16,8]{1,0} parameter(1)
  ROOT %sum.1 = f32[16,8]{1,0} add(%part, %param_1)
}

ENTRY %main (x: bf16[16,64,32], y: f32[16,8]) -> f32[16,8] {
  %x = bf16[16,64,32]{2,1,0} parameter(0)
  %y = f32[16,8]{1,0} parameter(1)
  %reduced = f32[16,32]{1,0} fusion(%x), calls=%fused_reduce, metadata={op_name="a/sum"}
  %conv = bf16[4,4]{1,0} custom-call(%x, %x), custom_call_target="__cudnn$convBackwardFilter"
  ROOT %out = f32[16,8]{1,0} fusion(%reduced, %y), kind=kLoop, calls=%fused_slice
}
"""


class Compiled:
    def as_text(self):
        return PROGRAM


def test_bytes_and_families_of_a_program():
    found = {kernel.name: kernel for kernel in kernels(Compiled())}
    assert list(found) == ["reduced", "conv", "out"]
    x, total, part = 2 * 16 * 64 * 32, 4 * 16 * 32, 4 * 16 * 8
    assert (found["reduced"].bytes, found["reduced"].lanes) == (x + total, 32)
    assert found["reduced"].operation == "a/sum"
    assert found["conv"].bytes == x + 2 * 16  # an operand given twice is read once
    assert found["out"].bytes == 3 * part  # of `reduced` only a slice
    assert by_family(list(found.values())) == {
        "reduction": (1, x + total),
        "convolution, filter gradient": (1, x + 32),
        "elementwise": (1, 3 * part),
    }


def test_a_compiled_program_is_read():
    compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(jnp.zeros((64, 8))).compile()
    assert sum(kernel.bytes for kernel in kernels(compiled)) == 2 * 64 * 8 * 4
