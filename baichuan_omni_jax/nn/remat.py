"""What a scanned layer keeps for its backward pass, by name."""

from collections.abc import Callable

import jax

from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.kernels.flash_attention.residuals import ATTENTION_OUT

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention_out": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),
    "none": None,
}


def remat(function: Callable, policy: str) -> Callable:
    """`function` that recomputes in its backward pass all but what `policy` keeps (`none` keeps everything).

    Raises ConfigError on an unknown policy.
    """
    if policy not in POLICIES:
        raise ConfigError(f"compute.remat {policy!r} is not one of {', '.join(POLICIES)}")
    return function if policy == "none" else jax.checkpoint(function, policy=POLICIES[policy])
