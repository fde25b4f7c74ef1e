import io
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from PIL import Image, ImageDraw

# Shapes and types of public functions are checked in tests, never at run time. Commands are left as they are: tyro reads their
# annotations, which the check hides. The "tower" lets an int stand where a float is asked for, as mypy does.
CHECK = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
package = find_spec("diptych")
assert package is not None
modules = {module.name for module in iter_modules(package.submodule_search_locations)} - {"commands", "cli"}
install_import_hook([f"diptych.{name}" for name in sorted(modules)], CHECK)


@pytest.fixture(scope="session", autouse=True)
def features_stay_here(tmp_path_factory):
    """Keep what training computes once out of the user's cache."""
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diptych.files.feature_folder", lambda: folder)
        yield


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


@pytest.fixture(scope="session")
def make_model():
    """Return a function that builds a dual encoder of a few thousand random weights, for 16-pixel images; equal seeds, equal weights."""
    from diptych.data.tokenizer import TextPolicy, Tokenizer
    from diptych.data.transforms import ImagePolicy
    from diptych.models.build import DualConfig, build
    from diptych.models.heads import LinearHeadConfig
    from diptych.models.text import TextConfig
    from diptych.models.vision import VisionConfig

    def make(seed: int = 0, texts: Sequence[str] = ("a red circle", "a blue square")):
        torch.manual_seed(seed)
        config = DualConfig(
            VisionConfig(image_size=16, width=16, depth=1, heads=2, mlp_width=32),
            TextConfig(vocabulary=300, length=16, width=16, depth=1, heads=2, mlp_width=32),
            LinearHeadConfig(8),
            LinearHeadConfig(8),
            image_policy=ImagePolicy(size=16),
            text_policy=TextPolicy(length=16),
        )
        return build(config, Tokenizer.train(texts, vocabulary=300, length=16))

    return make


@pytest.fixture(scope="module")
def saved_model(make_model, tmp_path_factory) -> str:
    """Return the folder of a small model with random weights, as a user would name it."""
    from diptych.models.checkpoint import save_model

    save_model(make_model(), folder := tmp_path_factory.mktemp("model"))
    return str(folder)


@pytest.fixture(scope="session")
def drawings():
    """Return a function that gives `count` drawn samples, each of another colour or shape, with captions that say so."""
    from diptych.data.sources import Listed
    from diptych.types import Sample, Text

    colours = ("red", "green", "blue", "orange", "purple", "black")

    def draw(count: int = 8) -> Listed:
        samples = []
        for i in range(count):
            colour, shape = colours[i % 6], ("circle", "square")[i // 6 % 2]
            image = Image.new("RGB", (24, 20), "white")
            canvas = ImageDraw.Draw(image)
            (canvas.ellipse if shape == "circle" else canvas.rectangle)((4 + i // 12, 2, 20, 17), fill=colour)
            image.save(file := io.BytesIO(), "PNG")
            samples.append(Sample(f"s{i}", file.getvalue(), (Text(f"a {colour} {shape} {i // 12}"),), f"s{i}"))
        return Listed(samples, "drawings")

    return draw
