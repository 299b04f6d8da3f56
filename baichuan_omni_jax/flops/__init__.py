"""Model FLOPs: one set of formulas that training metrics, preflight and the order of packed rows all read."""
