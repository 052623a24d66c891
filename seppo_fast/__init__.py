"""SePPO for diffusion models: preference fine-tuning from winners alone, without pairs and without a reward model.

`seppo_fast.loss` is the drop-in loss, `seppo_fast.train` the trainer, `ReferencePool` keeps past policies for other
trainers. Nothing is imported before it is asked for, so that the version or one room never costs torch, triton or a
model library.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers take it for true; `typing` itself would be an import
if TYPE_CHECKING:
    from seppo_fast.references import ReferencePool as ReferencePool


def __getattr__(name: str) -> object:
    if name == "ReferencePool":
        from seppo_fast.references import ReferencePool

        return ReferencePool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
