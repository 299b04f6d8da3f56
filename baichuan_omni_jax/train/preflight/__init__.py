"""Whether a run fits a TPU slice, found out without one: the real step, compiled ahead of time for its chips."""

from baichuan_omni_jax.train.preflight.compile import devices_of
from baichuan_omni_jax.train.preflight.report import Packing, Report, preflight

__all__ = ["Packing", "Report", "devices_of", "preflight"]
