"""Triton kernels and their PyTorch twins. Their modules are in `kernels/` at the top of a checkout, in a wheel here."""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
# In site-packages that path may be another distribution's package named `kernels`; only ours contains preference.py.
if (_checkout / "preference.py").is_file():
    __path__.append(str(_checkout))
