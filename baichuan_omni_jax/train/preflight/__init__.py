"""Whether a run fits a TPU slice or a GPU, found out without one: the real step, compiled ahead of time for it."""

from baichuan_omni_jax.train.preflight.compile import devices_of
from baichuan_omni_jax.train.preflight.packing import Packing
from baichuan_omni_jax.train.preflight.report import Report, preflight

__all__ = ["Packing", "Report", "devices_of", "preflight"]
