"""Link two lists of printed names that a machine misread, by strings' pictures and by both, before and after training.

Needs `pip install 'diptych[demo,plot]'` for names and typefaces. Takes about a minute on an idle core; writes runs/clippings.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from diptych.claims.names import name_records
from diptych.data.sources import Listed
from diptych.files import atomic_file
from diptych.methods import clippings
from diptych.training.loop import fit
from diptych.training.prepare import make_loader, make_model
from diptych.use.gallery import render
from diptych.use.linkage import cluster_records, embed_records, link_cards, link_records
from diptych.use.page import page


def main(out: Path = Path("runs/clippings"), epochs: int = 6) -> None:
    # Records of 240 entities to train on; each is a picture of a name and what a machine made of it.
    train, test = name_records("train", 0.25).records, name_records("test", 0.25).records
    print(f"{train[0].texts[0].text!r} is what a machine read of a record of {train[0].group}")
    out.mkdir(parents=True, exist_ok=True)

    # Without labels first: a picture and its string belong together. Then with labels: records of one entity do.
    first = replace(clippings.mini(), epochs=epochs)
    alone = Listed([replace(sample, group=sample.key) for sample in train], "names")
    model = make_model(first.model, alone, seed=0)
    second = clippings.supervised(first)
    second = replace(second, optimizer=replace(second.optimizer, lr=first.optimizer.lr / 4))
    for recipe, source in ((first, alone), (second, train)):
        objective = clippings.Objective(model, recipe.objective)
        fit(objective, make_loader(recipe, source, model), recipe, out, console=Console())

    # One list holds the first two records of each unseen entity, the other the rest.
    lists = ([s for s in test if (int(s.key[-1]) < 2) == asked] for asked in (True, False))
    sources = Listed(next(lists), "queries"), Listed(next(lists), "references")
    queries, references = (embed_records(model, source) for source in sources)
    for name, weight in (("texts alone", 0.0), ("images alone", 1.0), ("pooled", None)):
        linked = link_records(queries, references, image_weight=weight)
        assert linked.scores is not None
        print(f"{name}: top-1 {linked.scores.top1}, f1 {linked.scores.f1} at image weight {linked.image_weight}")
    print(f"clusters: {cluster_records(embed_records(model, test)).metrics}")
    with atomic_file(out / "links.html") as file:
        cards = link_cards(linked, queries, references, sources)
        file.write_text(page("Links", f"<h1>Links</h1>{render(cards)}"), encoding="utf-8")


if __name__ == "__main__":
    main()
