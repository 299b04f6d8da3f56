"""What compiled programs do: their products, kernels and copies, and which exchanges are hidden behind them."""

import jax
import jax.numpy as jnp
import pytest

from baichuan_omni_jax.train.preflight.hlo import collectives_of
from baichuan_omni_jax.train.preflight.hlo_work import Product, copied_bytes, products_of


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("mk,kn->mn", [(64, 32), (32, 48)], 2 * 64 * 32 * 48),
        ("bmk,bkn->bmn", [(5, 64, 32), (5, 32, 48)], 2 * 5 * 64 * 32 * 48),
        ("btd,dnh->btnh", [(2, 16, 32), (32, 4, 8)], 2 * 2 * 16 * 32 * 4 * 8),
    ],
)
def test_a_product_counts_two_for_each_multiply_add(equation, shapes, flops):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(lambda a, b: jnp.einsum(equation, a, b)).lower(*arrays).compile().as_text()
    assert [product.flops for product in products_of(text)] == [flops]


def test_a_product_in_a_loop_counts_as_often_as_the_loop_runs():
    def steps(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=7)[0]

    text = jax.jit(steps).lower(jnp.zeros((8, 16)), jnp.zeros((16, 16))).compile().as_text()
    (product,) = [each for each in products_of(text) if each.flops]
    assert (product.flops, product.times) == (2 * 8 * 16 * 16, 7)


# As libtpu writes them: a product whose batch of 8 is a spatial dim kept apart by stride and dilation, an outer one, a
# kernel, and a gather that starts before a product and ends after it.
TPU = """HloModule jit_step, is_scheduled=true

%fused (p0: bf16[64,8,32], p1: bf16[8,32,48]) -> bf16[64,8,48] {
  %p0 = bf16[64,8,32]{2,1,0} parameter(0)
  %p1 = bf16[8,32,48]{2,1,0} parameter(1)
  ROOT %convolution.1 = bf16[64,8,48]{2,1,0} convolution(%p0, %p1), \
window={size=8 stride=7 lhs_dilate=8}, dim_labels=b0f_0io->b0f, \
metadata={op_name="jit(step)/depth/dot_general"}
}

%gathering (p: bf16[16,4]) -> bf16[64,4] {
  %p = bf16[16,4]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[64,4]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, \
metadata={op_name="late"}
}

ENTRY %main (a: bf16[64,8,32], b: bf16[8,32,48], c: bf16[16,4]) -> bf16[64,8,48] {
  %a = bf16[64,8,32]{2,1,0} parameter(0)
  %b = bf16[8,32,48]{2,1,0} parameter(1)
  %c = bf16[16,4]{1,0} parameter(2)
  %all-gather-start.1 = (bf16[16,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%c), replica_groups={{0,1,2,3}}, \
dimensions={0}, metadata={op_name="early"}
  %fusion.1 = bf16[64,8,48]{2,1,0} fusion(%a, %b), kind=kOutput, calls=%fused
  %all-gather-done.1 = bf16[64,4]{1,0} all-gather-done(%all-gather-start.1)
  %async-start.2 = ((bf16[16,4]{1,0}), bf16[64,4]{1,0}, s32[]) async-start(%c), calls=%gathering
  %copy.3 = bf16[64,8,48]{1,2,0} copy(%fusion.1)
  %async-done.2 = bf16[64,4]{1,0} async-done(%async-start.2)
  ROOT %forward_kernel.4 = bf16[64,8,48]{2,1,0} custom-call(%copy.3), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/attention/pallas_call"}
}
"""


def test_what_libtpu_writes_is_read():
    assert products_of(TPU) == [
        Product(2 * 8 * 64 * 32 * 48, "jit(step)/depth/dot_general", 1),
        Product(0, "jit(step)/attention/pallas_call", 1, "forward_kernel"),
    ]
    assert copied_bytes(TPU) == 64 * 8 * 48 * 2


def test_an_exchange_is_hidden_where_work_lies_between_its_start_and_its_end():
    found = {one.scope: one.hidden for one in collectives_of(TPU, {"fsdp": 4})}
    assert found == {"early": True, "late": False}
