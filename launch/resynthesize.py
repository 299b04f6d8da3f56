"""Turns speech into codes and back into a waveform.

    python launch/resynthesize.py --checkpoint DIR --audio in.wav --out out.wav

The same as `baichuan-omni resynthesize`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["resynthesize", *sys.argv[1:]]))
