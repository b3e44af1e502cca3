"""Entry of `python -m uss_jax.train`, the same program as `uss-jax train`."""

import sys

from uss_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
