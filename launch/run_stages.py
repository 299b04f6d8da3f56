"""Trains stages one after the other, each from the weights of the one before.

    python launch/run_stages.py --workdir runs/recipe --tiny

The same as `baichuan-omni stages`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["stages", *sys.argv[1:]]))
