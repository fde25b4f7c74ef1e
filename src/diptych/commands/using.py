"""`embed`, `search`, `convert`: a trained model in use."""

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from diptych.commands.terminal import chosen, progress, say
from diptych.data.sources import Columns, open_source
from diptych.errors import ImageError
from diptych.files import write_text
from diptych.models.precision import Precision
from diptych.models.weights import convert as convert_model
from diptych.models.weights import load
from diptych.use.gallery import Candidate, Card, render
from diptych.use.page import page
from diptych.use.search import (
    Hit,
    Index,
    approximate_finder,
    build_index,
    check_model,
    embed_query,
    pictures,
    search_index,
)


def embed(
    source: Positional[str],
    *,
    model: str = "auto",
    out: Path,
    columns: Columns = Columns(),
    precision: Precision = "auto",
    offline: bool = False,
) -> Index:
    """Embed the images of a source into a folder that `search` reads.

    Args:
        source: Images, with or without texts.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        out: Folder of the index.
        columns: What the columns of a table mean.
        precision: Of the towers; `auto` takes bf16 where the processor has it. The index says which it was.
        offline: Never touch the network.
    """
    samples = open_source(source, columns=columns)
    model = chosen(model)
    index = build_index(
        load(model, offline=offline),
        samples,
        model_spec=_absolute(model),
        source_spec=_absolute(source),
        columns=columns,
        progress=progress,
        precision=precision,
    )
    index.save(out)
    skipped = f" ({index.skipped} could not be read)" if index.skipped else ""
    say(
        f"{len(index.items):,} images of {index.images.shape[1]} numbers each, computed in {index.precision}, are in {out}{skipped}."
    )
    return index


def search(
    index: Positional[Path],
    *,
    text: str | None = None,
    image: Path | None = None,
    count: int = 10,
    approximate: bool = False,
    html: Path | None = None,
    offline: bool = False,
) -> tuple[Hit, ...]:
    """Find the images nearest to a text, to an image, or to both together.

    Args:
        index: Folder that `embed` wrote.
        text: What to look for in words.
        image: What to look for as a picture.
        count: How many at most.
        approximate: Search a graph instead of all images (extra `search`); faster on millions, may miss some.
        html: Also write a page with the pictures.
        offline: Never touch the network.
    """
    found = Index.read(index)
    if image is not None and not image.is_file():
        raise ImageError(f"There is no image file {image} to search with.")
    model = load(found.model, offline=offline)
    check_model(found, model)
    query = embed_query(model, text=text, image=None if image is None else image.read_bytes())
    hits = search_index(found, query, count=count, finder=approximate_finder(found.images) if approximate else None)
    for hit in hits:
        print(f"{hit.rank:3}  {hit.score:.3f}  {hit.item.key}  {hit.item.texts[0] if hit.item.texts else ''}")
    if html is not None:
        shown = pictures(open_source(found.source, columns=found.columns), hits)
        title = " + ".join(part for part in (text, None if image is None else image.name) if part)
        candidates = tuple(
            Candidate(h.score, h.item.texts[0] if h.item.texts else h.item.key, shown.get(h.item.key)) for h in hits
        )
        write_text(html, page(title, f"<h1>Search</h1>{render([Card(title, None, candidates)])}"))
        say(f"The pictures are in {html}.")
    return hits


def convert(
    model: Positional[str], *, out: Path, to: Literal["open_clip", "hf", "diptych"] = "diptych", offline: bool = False
) -> Path:
    """Write a model for another library, with its tokenizer and its preprocessing.

    Args:
        model: Anything `diptych.load` takes.
        out: Folder to write.
        to: `open_clip` (load with `local-dir:FOLDER`), `hf` (transformers), or `diptych`.
        offline: Never touch the network.
    """
    convert_model(load(model, offline=offline), out, to)
    say(f"{model} is in {out}, for {to}.")
    return out


def _absolute(spec: str) -> str:
    """Return a path that means the same from any folder; names of models and sources stay as they are."""
    return str(Path(spec).absolute()) if Path(spec).exists() else spec
