"""What a layer may keep so that its backward pass need not run attention forward again."""

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

ATTENTION_OUT = "attention_out"


def named(out: Array, lse: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp under the name that remat policies know.

    Named inside the derivative rule: what the backward kernels read is what is kept.
    """
    return checkpoint_name(out, ATTENTION_OUT), checkpoint_name(lse, ATTENTION_OUT)
