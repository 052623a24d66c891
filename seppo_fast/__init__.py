"""SePPO for diffusion models: preference fine-tuning from winners alone, without pairs and without a reward model.

`seppo_fast.loss` is the drop-in loss, `seppo_fast.train` the trainer, and `ReferencePool` stores past policies for
other trainers. Imports are lazy, so that reading the version or using one subpackage does not load torch, triton or a
model library that it does not need.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers assume it is true; taking it from `typing` would cost an import
if TYPE_CHECKING:
    from seppo_fast.references import ReferencePool as ReferencePool


def __getattr__(name: str) -> object:
    if name == "ReferencePool":
        from seppo_fast.references import ReferencePool

        return ReferencePool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
