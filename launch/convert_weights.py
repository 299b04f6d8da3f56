"""Moves weights between Hugging Face folders and checkpoints.

    python launch/convert_weights.py to-jax --from HF_DIR --to DIR

The same as `baichuan-omni convert`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
