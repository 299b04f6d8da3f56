"""Whether a run fits a TPU slice, found out without one: the real step, compiled ahead of time for its chips."""

from baichuan_omni_jax.train.preflight.packing import Packing
from baichuan_omni_jax.train.preflight.report import Report, preflight
from baichuan_omni_jax.train.preflight.topology import devices_of

__all__ = ["Packing", "Report", "devices_of", "preflight"]
