"""Serves the web page to talk to a checkpoint.

    python launch/web_demo.py --checkpoint runs/tiny

The same as `baichuan-omni serve`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
