"""`anomaly`: what is wrong in pictures, and where."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from PIL import Image
from tyro.conf import Positional

from diptych.commands.terminal import chosen, progress, say
from diptych.data.images import decode
from diptych.data.sources import AbstractSource, Columns, open_source
from diptych.errors import DataError
from diptych.evaluation.anomaly import Anomaly, Found, class_means, detect, measure_found
from diptych.files import atomic_folder, write_text
from diptych.methods.anovl import Adapter, Config, Detector
from diptych.models.dense import choose_tokens
from diptych.models.dual import DualEncoder
from diptych.models.weights import load
from diptych.types import Sample
from diptych.use.anomalies import Suspect, render_anomalies


def anomaly(
    images: Positional[str],
    *,
    model: str = "auto",
    detector: Config = Config(),
    out: Path | None = None,
    html: Path | None = None,
    count: int = 60,
    columns: Columns = Columns(),
    seed: int = 0,
    offline: bool = False,
) -> dict[str, Anomaly]:
    """Score pictures by how abnormal they are, and show where, from the product's name alone; where masks are known, measure it.

    Args:
        images: A folder of pictures, or any source.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        detector: Name of the product and all other settings. Where the product is left as `object`, domains of the samples name it.
        out: Folder for scores.csv and for maps as pictures.
        html: Page with the most abnormal pictures and their maps.
        count: Pictures on the page.
        columns: What the columns of a table mean.
        seed: Of the bootstrap.
        offline: Never touch the network.
    """
    source = open_source(images, columns=columns)
    for note in source.notes:
        say(note)
    model = chosen(model)
    encoder = load(model, offline=offline)
    say(f"Patches are the {choose_tokens(encoder, detector.tokens)} ones of the image tower.")
    found = _detect(encoder, source, detector)
    order = [int(place) for place in found.scores.argsort(descending=True)]
    keys = {place: source.without_image(found.rows[place]).key for place in order}
    for place in order:
        print(f"{found.scores[place]:.4f}  {keys[place]}")
    measured = measure_found(found, seed=seed)
    for name, line in _lines(measured):
        say(f"  {name:24} {line}")
    for note in found.skipped:
        say(f"  {note}")
    if out is not None:
        _write(out, found, keys, order)
        say(f"scores.csv and maps are in {out}.")
    if html is not None:
        suspects = [_suspect(found, source, place) for place in order[:count]]
        page = render_anomalies(
            suspects,
            title=f"Anomalies: {source.name}",
            lead=f"{len(order):,} pictures, each patch of which {model} compared with words for a normal and for an abnormal product; the "
            f"{len(suspects)} most abnormal are shown. No picture was learnt from.",
            measured=measured,
            settings=[("model", model), *((name, str(value)) for name, value in vars(detector).items())],
            notes=found.skipped,
        )
        write_text(html, page)
        say(f"The pictures are in {html}.")
    return measured


def _detect(model: DualEncoder, source: AbstractSource, settings: Config) -> Found:
    """Return what is said of every picture, by one detector for each product."""

    @cache
    def of_product(product: str) -> Detector:
        return Adapter(replace(settings, product=product)).fit(model)

    def of_sample(sample: Sample) -> Detector:
        named = settings.product != Config().product
        return of_product(settings.product if named else sample.domain or settings.product)

    with progress("looking for anomalies", len(source)) as advance:
        found = detect(of_sample, source, model.image_policy, advance=advance)
    if not found.rows:
        raise DataError(f"No picture of {source.name} could be read. {' '.join(found.skipped[:1])}")
    return found


def _lines(measured: Mapping[str, Anomaly]) -> list[tuple[str, str]]:
    """Return each class with its numbers in a line, and the means over classes last where there are several."""
    lines = [
        (name or "all", ", ".join(f"{number} {value}" for number, value in one.headline().items()))
        for name, one in measured.items()
    ]
    if len(measured) > 1:
        means = class_means(measured).items()
        lines.append((f"mean of {len(measured)} classes", ", ".join(f"{name} {mean:.3f}" for name, mean in means)))
    return [(name, line) for name, line in lines if line]


def _write(folder: Path, found: Found, keys: Mapping[int, str], order: Sequence[int]) -> None:
    """Write scores.csv and one grey picture for each map, brighter where more abnormal, all on one scale."""
    with atomic_folder(folder) as target:
        (target / "maps").mkdir()
        low, high = (
            edge(float(values.quantile(end)) for values in found.maps) for edge, end in ((min, 0.0), (max, 1.0))
        )
        with (target / "scores.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("key", "score", "map", "highest"))
            for rank, place in enumerate(order):
                values, name = found.maps[place], f"maps/{rank:05}.png"
                grey = ((values - low) / max(high - low, 1e-12) * 255).round().byte().numpy()
                Image.fromarray(grey).save(target / name)
                writer.writerow((keys[place], f"{found.scores[place]:.6f}", name, f"{values.max():.6f}"))


def _suspect(found: Found, source: AbstractSource, place: int) -> Suspect:
    """Return a picture as the page shows it."""
    sample, mask = source[found.rows[place]], found.masks[place]
    assert sample.image is not None  # or it would not have been found
    return Suspect(
        sample.key,
        decode(sample.image),
        found.maps[place].numpy(),
        float(found.scores[place]),
        None if mask is None else mask.numpy(),
        sample.label,
    )
