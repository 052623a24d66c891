"""Selects the test files that this process can run: Triton chooses interpreter or compiler once, at import."""

import importlib.util
import os

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["*"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["*_compile.py", "*_gpu.py", "test_launcher.py"]
else:
    collect_ignore_glob = ["*_interpreter.py"]
