"""Compares converted weights with the released computation.

    python launch/verify_parity.py --fixtures DIR

The same as `baichuan-omni verify`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
