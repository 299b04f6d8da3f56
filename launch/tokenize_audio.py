"""Fills the store of audio codes of a run's data.

    python launch/tokenize_audio.py --config configs/tiny.py

The same as `baichuan-omni tokenize`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["tokenize", *sys.argv[1:]]))
