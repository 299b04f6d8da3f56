"""Proof that a conversion computes what the released model computes: golden inputs, weights and outputs against ours.

`verify` runs every check of a fixtures folder, `verify_released` compares with the released code where the user has it;
`launch/verify_parity.py` is the command of both. Sizes come from the folder.
"""

from baichuan_omni_jax.verify.fixtures import Comparison, Fixtures, Golden, exact_arithmetic
from baichuan_omni_jax.verify.run import CHECKS, run_check, verify, verify_released

__all__ = ["CHECKS", "Comparison", "Fixtures", "Golden", "exact_arithmetic", "run_check", "verify", "verify_released"]
