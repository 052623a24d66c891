"""Executes docs/quickstart.ipynb in a kernel of its own; `python -m tests.helpers.notebook` stores fresh outputs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """Executes a copy of a notebook from top to bottom with this interpreter and this checkout.

    Args:
        notebook: the notebook; it is not changed.
        folder: the kernel's working directory and its place for temporary files.

    Returns:
        The executed copy.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    executed = nbformat.from_dict(notebook)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    # Sockets are files in a folder of their own, so processes never compete for ports; its path must be short.
    with tempfile.TemporaryDirectory() as sockets:
        manager = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # ipykernel's own: the user's may be another Python
            connection_file=str(Path(sockets) / "kernel.json"),
            transport="ipc",
        )
        client = NotebookClient(
            executed,
            km=manager,
            timeout=600,  # seconds per cell: for a kernel that hangs
            coalesce_streams=True,
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        return client.execute(env=environment, cleanup_kc=True)  # shuts the kernel down although it is ours


def main() -> None:
    """Replaces the stored outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    metadata = nbformat.from_dict(notebook.metadata)
    with tempfile.TemporaryDirectory() as folder:
        executed = execute(notebook, Path(folder))
    executed.metadata = metadata  # the kernel adds its exact version
    nbformat.write(executed, NOTEBOOK)


if __name__ == "__main__":
    main()
