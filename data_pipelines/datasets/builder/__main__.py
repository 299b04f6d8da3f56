"""`python -m data_pipelines.datasets.builder`: the command `baichuan-omni data build`."""

import sys

from data_pipelines.datasets.builder.command import main

sys.exit(main())
