"""Imported before torch: its profiler announces itself on stderr unless the environment says no."""

import os

# torch reads both when it is imported, and never again. Who sets them to look sees all.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
