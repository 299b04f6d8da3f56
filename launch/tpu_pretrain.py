"""Trains: the same command on a laptop's CPU, a GPU, a TPU VM or every host of a pod slice.

    python launch/tpu_pretrain.py --config configs/tiny.py --workdir runs/tiny [--set train.steps=20 ...]

The same as `baichuan-omni train`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
