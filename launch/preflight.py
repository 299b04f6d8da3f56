"""Tells whether a run fits a TPU slice, without a TPU.

    python launch/preflight.py --config configs/omni_64k.py --topology v5p:4x4x4

The same as `baichuan-omni preflight`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["preflight", *sys.argv[1:]]))
