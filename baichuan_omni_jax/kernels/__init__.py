"""Two kernels, each with one door and several back ends: attention over packed rows, and residual codebook lookup.

A kernel is a folder. Its `__init__.py` is the door (shapes, choice of a back end, `shard_map`), `reference.py` the
oracle that says what it means, `xla.py` the implementation that runs everywhere, `pallas_tpu.py` and `pallas_gpu.py`
those for one kind of device. The sizes that all are tried on stand in `cases.py`, those of the lookup below its oracle.
Nothing here imports the rest of the library.

To add a back end to a kernel:

1. Write a module beside the others with the kernel's function (`attention` or `lookup`, the signature of `xla.py`)
   and `unsupported(...)`, which returns why it cannot compute these arguments, or None.
2. Name it in `backends.py`: in `Implementation`, in `NEEDED_PLATFORM` if it runs on one kind of device only, and in
   `PREFERRED` where `implementation=None` shall try it.
3. Enter the module in `BACK_ENDS` of the kernel's `__init__.py`.
4. Prove it against `reference.py` on the small cases, values and gradients: tests/kernels has a file a back end.
"""
