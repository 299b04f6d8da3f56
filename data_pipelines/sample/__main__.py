"""`python -m data_pipelines.sample`: the command `baichuan-omni data sample`."""

import sys

from data_pipelines.sample.build import main

sys.exit(main())
