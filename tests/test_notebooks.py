"""Every notebook runs from top to bottom, and its committed text is what it prints."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def printed(notebook: "nbformat.NotebookNode") -> list[str]:
    """What each code cell printed, stdout only, pieces joined."""
    return [
        "".join(o["text"] for o in cell["outputs"] if o["output_type"] == "stream" and o["name"] == "stdout")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path: Path, smollm2_path: Path) -> None:
    committed = nbformat.read(path, as_version=4)
    assert any(printed(committed)), "commit the notebook with its outputs"
    fresh = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}).execute()
    assert printed(fresh) == printed(committed)
