"""Measurements: nothing here is imported by the packages or collected by plain `pytest`."""

import os

# The profiler, which counts memory here, announces every start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
