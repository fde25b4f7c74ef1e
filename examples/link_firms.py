"""Link firms of two Japanese directories whose texts were read by machine, with all its real mistakes: by letters, and by what texts mean.

Needs `DIPTYCH_DATA` with the bundle firm-linkage (research use) and `pip install 'diptych[pretrained]'`. Takes some ten seconds. The bundle has no
pictures, so this is the text side of CLIPPINGS alone: each firm has some candidates in the other directory, and people said which is the same.
"""

import csv
from collections.abc import Callable, Sequence

import numpy as np

import diptych
from diptych.claims.names import edit_similarity
from diptych.data.bundles import bundle_file
from diptych.evaluation.linkage import link_scores, tune_threshold
from diptych.models.embedding import embed_texts

FIELDS = ("firm_title", "address", "product")


def main(model: str = "lite0-minilm") -> None:
    with bundle_file("firm-linkage", "japanese_firms.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["truth"] != "unsure"]
    firms: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        firms.setdefault(row["query"], []).append(row)
    encoder = diptych.load(model)

    def by_letters(query: str, candidates: Sequence[str]) -> np.ndarray:
        return edit_similarity(query, candidates)

    def by_meaning(query: str, candidates: Sequence[str]) -> np.ndarray:
        first, *others = embed_texts(encoder, [query, *candidates])
        return np.array([float(first @ other) for other in others])

    for name, compare in (("letters", by_letters), ("meaning", by_meaning)):
        for fields in (FIELDS[:1], FIELDS):
            print(f"{name:8} of {', '.join(fields):30} {measure(list(firms.values()), compare, fields)}")


def measure(
    firms: Sequence[Sequence[dict[str, str]]],
    compare: Callable[[str, Sequence[str]], np.ndarray],
    fields: Sequence[str],
) -> str:
    """Return how well the nearest candidate is the same firm: every other firm chooses the threshold, the others are measured."""
    scores, right, matched = [], [], []
    for rows in firms:
        query = text_of(rows[0], "query", fields)
        found = compare(query, [text_of(row, "candidate", fields) for row in rows])
        scores.append(found.max())
        right.append(rows[int(found.argmax())]["truth"] == "match")
        matched.append(any(row["truth"] == "match" for row in rows))
    score, hit, known = np.array(scores), np.array(right), np.array(matched)
    threshold, _ = tune_threshold(score[::2], hit[::2], known[::2])
    measured = link_scores(score[1::2], hit[1::2], known[1::2], threshold)
    return f"F1 {measured.f1}  precision {measured.precision}  recall {measured.recall}  top-1 {measured.top1}"


def text_of(row: dict[str, str], side: str, fields: Sequence[str]) -> str:
    return " ".join(row[f"{side}_{field}"] for field in fields)


if __name__ == "__main__":
    main()
