import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diptych.data.loader import Loader, LoaderConfig
from diptych.data.order import hard_negatives, nearest_groups, per_group
from diptych.data.parts import Prompted
from diptych.data.sources import Listed, Subset
from diptych.data.texts import ShuffledTexts, WithTexts
from diptych.errors import ConfigError, DataError


@pytest.fixture
def grouped(drawings):
    """Return a function that makes samples of groups of these sizes, in mixed order."""

    def make(*sizes: int) -> Listed:
        groups = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
        order = np.random.default_rng(0).permutation(len(groups))
        samples = [replace(s, group=groups[place]) for s, place in zip(drawings(len(groups)), order, strict=True)]
        return Listed(samples)

    return make


def test_runs_hold_one_group_and_every_paired_row_is_shown(grouped):
    source = grouped(5, 3, 1, 2, 4)
    ordered = per_group(source, 3)
    assert ordered.notes == ("1 samples are alone in their group and left out.",)
    rows = ordered.order(np.random.default_rng(0))
    assert len(rows) == 6 + 3 + 3 + 6 == len(ordered.order(np.random.default_rng(1)))
    for run in rows.reshape(-1, 3).tolist():
        assert len({source[row].group for row in run}) == 1
    alone = {row for row in range(15) if source[row].group == "g2"}
    assert set(rows.tolist()) == set(range(15)) - alone
    assert not np.array_equal(rows, ordered.order(np.random.default_rng(1)))
    assert np.array_equal(pickle.loads(pickle.dumps(ordered)).order(np.random.default_rng(0)), rows)


def test_the_loader_keeps_groups_together_and_resumes(grouped, make_model):
    source, model = grouped(4, 4, 4), make_model()
    config = LoaderConfig(batch_size=4, per_group=2)

    def batches(count, **options):
        loader = Loader(source, model.image_policy, model.tokenizer, config, **options)
        return loader, [batch for _, batch in zip(range(count), loader, strict=False)]

    loader, six = batches(6)
    assert loader.batches_per_epoch == 3
    for batch in six:
        assert all(a == b for a, b in batch.group.reshape(-1, 2).tolist())
    assert six[0].keys != six[3].keys
    first, _ = batches(2)
    assert [b.keys for b in batches(4, position=first.position)[1]] == [b.keys for b in six[2:]]


def test_batches_that_cut_runs_and_sources_without_groups_are_refused(grouped, make_model):
    model = make_model()
    with pytest.raises(ConfigError, match=r"Batches of 5 cut through runs of 2.*to 4\."):
        Loader(grouped(4, 4), model.image_policy, model.tokenizer, LoaderConfig(batch_size=5, per_group=2))
    with pytest.raises(DataError, match="No two of the 3 samples"):
        per_group(grouped(1, 1, 1), 2)
    with pytest.raises(ConfigError, match="from 2 per group on, not 1"):
        per_group(grouped(2), 1)


@pytest.mark.data
def test_official_neighbours(data):
    with np.load(data.parent / "golden" / "clippings.npz") as golden:
        labels = golden["hard_negatives/labels"]
        centres = F.normalize(torch.from_numpy(golden["hard_negatives/embeddings"]), dim=-1)
        found = nearest_groups(centres, int(golden["hard_negatives/k"]))
        assert np.array_equal(labels[found], golden["hard_negatives/neighbour_label"])
        m = int(golden["hard_negatives/m"])
        assert np.array_equal(labels[found].flatten().repeat(m), golden["hard_negatives/batch_row_label"])


def test_hard_negatives_stand_beside_their_anchor(grouped):
    source = grouped(3, 2, 4, 3)
    angle = {"g0": 0.0, "g1": 0.1, "g2": 2.0, "g3": 2.2}
    turns = torch.tensor([angle[sample.group] for sample in source])
    ordered = hard_negatives(source, torch.stack([turns.cos(), turns.sin()], 1), neighbours=2, count=3)
    rows = ordered.order(np.random.default_rng(0))
    assert len(rows) == 4 * 2 * 3
    for block in rows.reshape(4, 2, 3).tolist():
        first, second = ({source[row].group for row in run} for run in block)
        assert len(first) == len(second) == 1
        assert first | second in ({"g0", "g1"}, {"g2", "g3"})
    assert pickle.loads(pickle.dumps(ordered)).order(np.random.default_rng(0)).tolist() == rows.tolist()
    with pytest.raises(ConfigError, match="2 to 4 neighbours"):
        hard_negatives(source, torch.ones(12, 2), neighbours=5)


def test_part_of_an_ordered_source_follows_what_is_left_of_the_order(grouped):
    source = grouped(4, 4, 2)
    ordered = per_group(source, 2)
    groups = [[row for row in range(10) if source[row].group == name] for name in ("g0", "g1", "g2")]
    rows = [*groups[2], *groups[0]]  # whole groups, in an order of the subset's own
    part = Subset(ordered, rows, "part")
    for seed in range(3):
        whole, left = (one.order(np.random.default_rng(seed)).tolist() for one in (ordered, part))
        assert [rows[place] for place in left] == [row for row in whole if row in rows]
        assert all(part[a].group == part[b].group for a, b in zip(left[::2], left[1::2], strict=True))
    assert np.array_equal(
        pickle.loads(pickle.dumps(part)).order(np.random.default_rng(0)), part.order(np.random.default_rng(0))
    )

    twice = Subset(ordered, [rows[0], rows[0]], "twice").order(np.random.default_rng(0)).tolist()
    assert len(twice) % 2 == 0 and twice[:2] == [0, 1]  # a sample that is there twice is shown twice
    assert Subset(source, rows, "plain").order is None


def test_part_of_an_order_always_has_as_many_rows(grouped):
    source = grouped(3, 3, 3, 3)
    mined = hard_negatives(
        source,
        F.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), dim=-1),
        neighbours=2,
        count=2,
    )
    half = Subset(mined, range(6), "half")  # cuts through groups, so that what is left differs from epoch to epoch
    left = [[row for row in mined.order(np.random.default_rng(seed)).tolist() if row < 6] for seed in range(20)]
    shown = [half.order(np.random.default_rng(seed)).tolist() for seed in range(20)]
    count = len(left[0])
    assert len({*map(len, left)}) > 1 and {*map(len, shown)} == {count}
    assert all((rows * 9)[:count] == found for rows, found in zip(left, shown, strict=True))


@pytest.mark.parametrize(
    "wrap", [Prompted, lambda source: ShuffledTexts(source, 0.5), lambda source: WithTexts(source, [()] * 4)]
)
def test_other_texts_leave_the_order_as_it_is(grouped, wrap):
    ordered = per_group(grouped(2, 2), 2)
    assert wrap(ordered).order is ordered.order
