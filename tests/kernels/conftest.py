"""Which of these files a process can run: Triton decides between interpreter and compiler once, at import."""

import importlib.util
import os

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["*"]
elif os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["*_compile.py", "*_gpu.py", "test_launcher.py"]
else:
    collect_ignore_glob = ["*_interpreter.py"]
