"""Prints the oldest versions that pyproject.toml allows, as a constraints file for pip.

python tools/oldest.py jax flax > oldest.txt
pip install -e '.[test]' -c oldest.txt
"""

import re
import sys
import tomllib
from pathlib import Path


def main() -> None:
    text = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    bounds = dict(re.split(r"(?:\[\w+\])?>=", line) for line in tomllib.loads(text)["project"]["dependencies"])
    for name in sys.argv[1:] or bounds:
        print(f"{name}=={bounds[name]}")
    if "jax" in (sys.argv[1:] or bounds):
        print(f"jaxlib=={bounds['jax']}")


if __name__ == "__main__":
    main()
