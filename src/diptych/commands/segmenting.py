"""`segment`: which class every pixel of pictures shows."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count as counting
from pathlib import Path

import numpy as np
from PIL import Image
from tyro.conf import Positional

from diptych.commands.terminal import chosen, progress, say
from diptych.data.class_masks import class_map, shown_classes
from diptych.data.images import FORMATS, decode
from diptych.data.sources import AbstractSource, Columns, Listed, open_source
from diptych.errors import DataError
from diptych.evaluation.segmentation import BACKGROUND, Said, Segmentation, Vocabulary, measure_said, segment_source
from diptych.files import atomic_folder, write_text
from diptych.methods.trident import Adapter, Config, Labeller
from diptych.models.dense_features import load_self_supervised
from diptych.models.sam import load_sam
from diptych.models.weights import load
from diptych.types import Sample
from diptych.use.segments import Segmented, colours_of, painted, reduced, render_segments


def segment(
    images: Positional[str],
    *,
    labels: str | None = None,
    background: str = "",
    model: str = "auto",
    features: Path | None = None,
    segmenter: Path | None = None,
    settings: Config = Config(),
    out: Path | None = None,
    html: Path | None = None,
    count: int = 30,
    columns: Columns = Columns(),
    seed: int = 0,
    offline: bool = False,
) -> Segmentation | None:
    """Give every pixel one of the labels, from words alone; where masks are known, measure it.

    Args:
        images: A picture, a folder of pictures, or any source.
        labels: Names of the classes, with commas between them; those of the source's masks when absent.
        background: Words for what is none of them, with commas between, such as "sky,wall,ground"; none when empty.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        features: Folder of a DINO or DINOv2 of transformers, by which places within a window are alike; the model's own tokens when absent.
        segmenter: Folder of a SAM of transformers; when absent, like colours stand in for it.
        settings: All others.
        out: Folder for masks, pictures with the classes laid over them, and classes.csv.
        html: Page with pictures and their classes.
        count: Pictures on the page.
        columns: What the columns of a table mean.
        seed: Of the bootstrap.
        offline: Never touch the network.
    """
    source = _open(images, columns)
    for note in source.notes:
        say(note)
    vocabulary = Vocabulary(shown_classes(source) if labels is None else _words(labels), _words(background))
    model = chosen(model)
    labeller = Adapter(
        settings,
        vocabulary,
        features=None if features is None else load_self_supervised(features),
        segmenter=None if segmenter is None else load_sam(segmenter),
    ).fit(load(model, offline=offline))
    say(f"Mixed are the {labeller.tokens} of the image tower.")
    found = _segment(labeller, source, vocabulary.classes, out=out, count=count)
    measured = measure_said(found.confusions, vocabulary.classes, seed=seed)
    if measured is not None:
        for name, value in measured.headline().items():
            say(f"  {name:18} {value}")
    if out is not None:
        say(f"Masks, pictures and classes.csv are in {out}.")
    if html is not None:
        rows = [
            ("model", model),
            ("words for background", ", ".join(vocabulary.background) or "none"),
            ("features", "the model's own tokens" if features is None else str(features)),
            ("segmenter", "like colours" if segmenter is None else str(segmenter)),
            *((name, str(value)) for name, value in vars(settings).items()),
        ]
        write_text(html, _page(found, measured, vocabulary.classes, source.name, model, rows))
        say(f"The pictures are in {html}.")
    return measured


@dataclass(frozen=True)
class _Found:
    """What was found in the pictures of a source.

    Attributes:
        confusions: Of each picture; None where it has no mask.
        pictures: The first of them, small, to be shown.
        skipped: Why others were left out.
    """

    confusions: list[np.ndarray | None]
    pictures: list[Segmented]
    skipped: list[str]


def _segment(
    labeller: Labeller, source: AbstractSource, classes: Sequence[str], *, out: Path | None, count: int
) -> _Found:
    """Segment all pictures, say of each what it shows, and write masks and overlays if a folder is given.

    Raises:
        DataError: If no picture could be read; no folder is left then.
    """
    found = _Found([], [], [])
    with ExitStack() as stack:
        advance = stack.enter_context(progress("segmenting", len(source)))
        write = None if out is None else stack.enter_context(_writing(out, classes))
        for said in segment_source(labeller, source, classes, skip=found.skipped.append):
            print(f"{said.sample.key}  {_shares(said.labels, classes)}")
            found.confusions.append(said.confusion)
            picture = _segmented(said, classes)
            if write is not None:
                write(picture)
            if len(found.pictures) < count:
                found.pictures.append(reduced(picture))
            advance(1)
        for note in found.skipped:
            say(f"  {note}")
        if not found.confusions:
            raise DataError(f"No picture of {source.name} could be read. {' '.join(found.skipped[:1])}")
    return found


def _page(
    found: _Found,
    measured: Segmentation | None,
    classes: Sequence[str],
    source: str,
    model: str,
    settings: Sequence[tuple[str, str]],
) -> str:
    return render_segments(
        found.pictures,
        classes,
        title=f"Segments: {source}",
        lead=f"{len(found.confusions):,} pictures, each pixel of which {model} gave one of {len(classes)} classes; {len(found.pictures)} are shown. "
        "No mask was learnt from.",
        measured=measured,
        settings=settings,
        notes=found.skipped,
    )


def _open(images: str, columns: Columns) -> AbstractSource:
    """Return a source, which one picture is too."""
    path = Path(images)
    if path.is_file() and path.suffix.lower() in Image.registered_extensions():
        if Image.registered_extensions()[path.suffix.lower()] in FORMATS:
            return Listed([Sample(path.name, path.read_bytes(), (), path.name)], path.name)
    return open_source(images, columns=columns)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",")) if text.strip() else ()


def _shares(labels: np.ndarray, classes: Sequence[str]) -> str:
    """Return the classes of a picture with their shares of it, the largest first."""
    share = np.bincount(labels.ravel(), minlength=len(classes)) / labels.size
    order = np.argsort(-share, kind="stable").tolist()
    return ", ".join(f"{classes[number]} {share[number]:.3f}" for number in order if share[number])


@contextmanager
def _writing(folder: Path, classes: Sequence[str]) -> Iterator[Callable[[Segmented], None]]:
    """Open a folder, whole or not at all, and what writes a mask and an overlay for each picture; say which number is which class."""
    colours = colours_of(classes)
    with atomic_folder(folder) as target, (target / "pictures.csv").open("w", newline="", encoding="utf-8") as file:
        for name in ("masks", "overlays"):
            (target / name).mkdir()
        with (target / "classes.csv").open("w", newline="", encoding="utf-8") as legend:
            rows = csv.writer(legend)
            rows.writerow(("number", "class", "colour"))
            for number, (name, colour) in enumerate(zip(classes, colours.tolist(), strict=True)):
                rows.writerow((number, name, "#{:02x}{:02x}{:02x}".format(*colour)))
        pictures, places = csv.writer(file), counting()
        pictures.writerow(("key", "mask", "overlay", *classes))

        def write(one: Segmented) -> None:
            place = next(places)
            mask, overlay = f"masks/{place:05}.png", f"overlays/{place:05}.png"
            _mask(one.labels, colours).save(target / mask)
            painted(one.image, one.labels, classes).save(target / overlay)
            shares = np.bincount(one.labels.ravel(), minlength=len(classes)) / one.labels.size
            pictures.writerow((one.name, mask, overlay, *(f"{share:.4f}" for share in shares)))

        yield write


def _mask(labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Return a picture whose values are the numbers of the classes: in their colours up to 256 of them, 16-bit grey beyond."""
    if len(colours) > 256:
        return Image.fromarray(labels.astype(np.uint16))
    mask = Image.fromarray(labels.astype(np.uint8))
    mask.putpalette(colours.tobytes())
    return mask


def _segmented(said: Said, classes: Sequence[str]) -> Segmented:
    """Return a picture as it is shown."""
    sample, background = said.sample, classes[0] == BACKGROUND
    assert sample.image is not None  # or it would not have been segmented
    truth = None if sample.mask is None else class_map(sample, classes[background:], background=background)
    return Segmented(sample.key, decode(sample.image), said.labels, truth)
