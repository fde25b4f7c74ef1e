import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import pytest
from jaxtyping import install_import_hook

# Shapes and types of public functions are checked in tests, never at run time. Commands are left as they are: tyro reads their
# annotations, which the check hides. The "tower" lets an int stand where a float is asked for, as mypy does.
CHECK = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
package = find_spec("diptych")
assert package is not None
modules = {module.name for module in iter_modules(package.submodule_search_locations)} - {"commands", "cli"}
install_import_hook([f"diptych.{name}" for name in sorted(modules)], CHECK)


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
