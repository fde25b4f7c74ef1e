import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes and types of public functions are checked in tests, never at run time.
install_import_hook("diptych", "beartype.beartype")


@pytest.fixture
def data() -> Path:
    """Return the folder of data bundles."""
    folder = os.environ.get("DIPTYCH_DATA")
    if not folder:
        pytest.skip("DIPTYCH_DATA is unset: it names a folder of data bundles")
    return Path(folder)


@pytest.fixture
def golden(data: Path) -> Callable[[str, str], dict[str, np.ndarray]]:
    """Return a reader of one case of the official numbers, which lie beside the data bundles."""
    folder = data.parent / "golden"
    if not folder.is_dir():
        pytest.skip("there are no official numbers beside DIPTYCH_DATA")

    def read(slug: str, case: str) -> dict[str, np.ndarray]:
        with np.load(folder / f"{slug}.npz", allow_pickle=False) as archive:
            prefix = f"{case}."
            return {name.removeprefix(prefix): archive[name] for name in archive.files if name.startswith(prefix)}

    return read
