"""Chats, transcribes, speaks or describes with a checkpoint.

    python launch/generate.py chat --checkpoint runs/tiny --prompt "What is a star?"

The same as `baichuan-omni generate`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
