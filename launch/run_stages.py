"""Trains stages one after the other, each from the weights of the one before.

    python launch/run_stages.py --workdir runs/recipe --tiny

The same as `baichuan-omni stages`, and with `--small` as `baichuan-omni recipe small`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    command = ["recipe", "small"] if "--small" in sys.argv else ["stages"]
    sys.exit(main([*command, *(argument for argument in sys.argv[1:] if argument != "--small")]))
