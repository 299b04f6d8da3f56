"""`python -m baichuan_omni_jax`: the command `baichuan-omni`, where the package is not installed."""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
