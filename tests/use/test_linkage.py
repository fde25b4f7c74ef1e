from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.data.sources import Listed
from diptych.errors import ConfigError, InputError
from diptych.evaluation.linkage import adjusted_rand_index
from diptych.models.embedding import embed_images, embed_texts
from diptych.models.pooling import pool
from diptych.use.linkage import (
    Records,
    cluster_cards,
    cluster_records,
    embed_records,
    link_cards,
    link_records,
    read_missing_texts,
)


def records(
    entities: np.ndarray, *, image_noise: float, text_noise: float, seed: int, known: bool = True, entity_seed: int = 0
) -> Records:
    """Return records whose vectors are those of their entities and noise."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, int(entities.max()) + 1, 16, generator=torch.Generator().manual_seed(entity_seed))
    image, text = (
        F.normalize(centre[torch.from_numpy(entities)] + noise * torch.randn(len(entities), 16, generator=rng), dim=-1)
        for centre, noise in zip(centres, (image_noise, text_noise), strict=True)
    )
    names = tuple(f"{seed}-{row}" for row in range(len(entities)))
    groups = tuple(f"e{entity}" for entity in entities.tolist()) if known else None
    return Records(names, tuple(range(len(entities))), names, groups, image, text)


def test_links_threshold_and_weight_are_chosen_on_one_half_and_judged_on_the_other():
    queries = records(np.arange(0, 60), image_noise=0.1, text_noise=2.0, seed=1)
    references = records(np.arange(20, 80), image_noise=0.1, text_noise=2.0, seed=2, entity_seed=0)
    # Entities need one set of centres: those of the larger list.
    queries = replace(queries, images=records(np.arange(80), image_noise=0.1, text_noise=2.0, seed=1).images[:60])
    found = link_records(queries, references, count=2)
    assert found.image_weight > 0.5  # the texts say nothing
    assert found.scores is not None and found.judged is not None and len(found.judged) == 30
    assert found.scores.f1.value > 0.95 and found.scores.precision.value > 0.9
    linked = np.where(found.kept, found.nearest[:, 0] + 20, -1)
    assert (linked[20:] == np.arange(20, 60)).mean() > 0.95 and (linked[:20] == -1).mean() > 0.9


def test_without_groups_all_are_linked_or_those_above_the_threshold():
    queries = records(np.arange(5), image_noise=0, text_noise=0, seed=1, known=False)
    found = link_records(queries, queries)
    assert found.kept.all() and found.scores is None and found.image_weight == 0.5
    assert found.nearest[:, 0].tolist() == list(range(5))
    assert not link_records(queries, queries, threshold=1.5).kept.any()


def test_clusters_are_chosen_on_one_half_of_the_entities():
    entities = np.repeat(np.arange(40), 4)
    found = cluster_records(records(entities, image_noise=2.0, text_noise=0.15, seed=3))
    assert found.image_weight < 0.5
    assert found.metrics["adjusted_rand_index"] > 0.95 and found.metrics["f1"] > 0.95
    assert adjusted_rand_index(found.cluster, entities) > 0.95
    shuffled = np.random.default_rng(0).permutation(entities)
    noise = cluster_records(
        replace(records(entities, image_noise=2.0, text_noise=0.15, seed=3), groups=tuple(map(str, shuffled)))
    )
    assert noise.metrics["adjusted_rand_index"] < 0.1


def test_too_few_labels_or_none_are_refused_where_something_is_chosen():
    with pytest.raises(ConfigError, match="With 5 labelled"):
        link_records(*[records(np.arange(5), image_noise=0, text_noise=0, seed=1)] * 2)
    with pytest.raises(ConfigError, match="--threshold"):
        cluster_records(records(np.arange(5), image_noise=0, text_noise=0, seed=1, known=False))


def test_records_have_what_they_have(make_model, drawings):
    model, source = make_model(), list(drawings(5))
    source[1] = replace(source[1], image=None)
    source[2] = replace(source[2], texts=())
    source[3] = replace(source[3], image=None, texts=())
    source[4] = replace(source[4], image=b"no picture")
    found = embed_records(model, Listed(source))
    assert found.keys == ("s0", "s1", "s2", "s4") and found.rows == (0, 1, 2, 4) and found.groups is None
    images, texts = (
        embed_images(model, [source[0], source[2]]),
        embed_texts(model, [source[i].texts[0].text for i in (0, 1, 4)]),
    )
    expected = torch.cat([pool(images[:1], texts[:1], 0.3), texts[1:2], images[1:], texts[2:]])
    torch.testing.assert_close(found.pooled(0.3), expected)
    assert torch.equal(found.pooled(1.0)[0], found.images[0]) and torch.equal(
        found.pooled(0.0)[0], found.text_embeddings[0]
    )
    grouped = Listed([replace(sample, group="same") for sample in source])
    assert embed_records(model, grouped).groups == ("same",) * 4
    only_texts = embed_records(model, Listed([source[1]]))
    assert torch.equal(only_texts.pooled(0.5), only_texts.text_embeddings)
    with pytest.raises(InputError, match="None of the 1 records"):
        embed_records(model, Listed([source[3]]))


def test_missing_texts_are_read_from_the_images(drawings):
    source = list(drawings(3))
    source[1] = replace(source[1], texts=())
    found = read_missing_texts(Listed(source), lambda image: f"{image.width} wide")
    assert [sample.texts[0].text for sample in found] == [source[0].texts[0].text, "24 wide", source[2].texts[0].text]
    assert found.without_image(1).texts == found.texts(1) == found[1].texts and found.read == {1: "24 wide"}
    assert read_missing_texts(Listed(source), lambda image: "")[1].texts == ()
    source[1] = replace(source[1], image=b"no picture")
    assert read_missing_texts(Listed(source), lambda image: "never").read == {}


def test_cards_show_the_least_sure_links_and_the_largest_clusters(make_model, drawings):
    source = Listed([replace(s, group=f"g{i % 6}") for i, s in enumerate(drawings(24))])
    found = embed_records(make_model(), source)
    linked = link_records(found, found, threshold=0.9)
    cards = link_cards(linked, found, found, (source, source), count=4)
    assert len(cards) == 4 and all(len(card.candidates) == 3 and card.image is not None for card in cards)
    edges = np.abs(linked.score[linked.judged, 0] - 0.9)
    assert abs(cards[0].candidates[0].score - 0.9) == pytest.approx(edges.min(), abs=1e-6)
    assert all(card.right == card.candidates[0].right for card in link_cards(linked, found, found, (source, source)))
    # Linked to nothing is right where there is nothing to link to.
    nothing = link_records(found, found, threshold=2.0)
    assert not any(card.right for card in link_cards(nothing, found, found, (source, source)))
    others = replace(found, groups=("nobody",) * 24)
    assert all(card.right for card in link_cards(nothing, found, others, (source, source)))
    assert all(card.right is None for card in link_cards(nothing, replace(found, groups=None), found, (source, source)))
    clustered = cluster_records(replace(found, groups=None), threshold=2.0)
    (card,) = cluster_cards(clustered, found, source)
    assert card.text.endswith("(24 records)") and len(card.candidates) == 10
    assert card.right is False  # six entities in one cluster
    assert [c.right for c in card.candidates] == [found.groups[row] == "g0" for row in range(1, 11)]
