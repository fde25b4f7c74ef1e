"""Make the environment of one anchor: `python environment.py NAME` installs NAME.txt into .bench/NAME.

The environment has packages of its own, except for torch, torchvision and diptych: those are linked from the Python that runs this, so that
all contenders compute with the same torch, and gigabytes are not copied.
"""

import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

import diptych

HERE = Path(__file__).resolve().parent
PLACE = Path(".bench").resolve()
SHARED = ("torch", "torchvision", "triton", "nvidia-", "cuda-")


def link_shared(folder: Path) -> None:
    """Fill a folder with links to diptych and to what torch is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {Path(diptych.__file__).parent}
    for found in distributions():
        name = found.metadata["Name"].lower()
        if name in SHARED or name.startswith(tuple(part for part in SHARED if part.endswith("-"))):
            tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
            parts |= {Path(str(found.locate_file(top))) for top in tops}
    for part in parts:
        link = folder / part.name
        link.unlink(missing_ok=True)
        link.symlink_to(part)


def main(name: str) -> None:
    folder = PLACE / name
    link_shared(PLACE / "shared")
    venv.create(folder, with_pip=True, clear=True, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(f"{PLACE / 'shared'}\n")
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.check_call([*map(str, pip), "--requirement", str(HERE / f"{name}.txt")])
    (folder / ".done").touch()


if __name__ == "__main__":
    main(sys.argv[1])
