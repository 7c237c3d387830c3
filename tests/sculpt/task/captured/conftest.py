"""Collected only where `test_graphs.py` one folder up asks for it.

A device of its own, `"graphed"`, without memory or kernels: fake tensors that are on it have no
values, and unlike those on "cuda" they need no build for it. torch knows one such device in a
process, so these cases have a process of their own.
"""

from __future__ import annotations

import os

import torch

collect_ignore_glob = ["test_*.py"]

if os.environ.get("SCULPT_TEST_CAPTURED") == "1":
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    class Graphed:
        """What torch asks of a device."""

        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def is_initialized() -> bool:
            return True

        @staticmethod
        def _is_in_bad_fork() -> bool:
            return False

        @staticmethod
        def device_count() -> int:
            return 1

        @staticmethod
        def current_device() -> int:
            return 0

        @staticmethod
        def get_amp_supported_dtype() -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    _setup_privateuseone_for_python_backend("graphed", Graphed)
    collect_ignore_glob = []
