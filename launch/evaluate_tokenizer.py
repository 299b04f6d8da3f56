"""Measures how much of speech an audio tokenizer keeps.

    python launch/evaluate_tokenizer.py --checkpoint DIR --manifest asr.jsonl

The same as `baichuan-omni evaluate tokenizer`; `--help` lists every flag.
"""

import sys

from baichuan_omni_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", "tokenizer", *sys.argv[1:]]))
