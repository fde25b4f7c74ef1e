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


@pytest.mark.parametrize("count", [0, -3])
def test_fewer_than_one_of_a_group_is_refused(count):
    with pytest.raises(ConfigError, match=rf"data\.per_group is 1, for a plain shuffle, or more; it is {count}\."):
        LoaderConfig(per_group=count)


def mined(source: Listed, *, neighbours: int = 2, count: int = 3):
    turns = torch.tensor([float(sample.group[1:]) for sample in source])
    embeddings = torch.stack([(turns / 10).cos(), (turns / 10).sin()], 1)
    return hard_negatives(source, embeddings, neighbours=neighbours, count=count)


def test_batches_hold_whole_runs_of_neighbours(grouped, make_model):
    model = make_model()

    def load(source, size, **options):
        return Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=size), **options)

    source = mined(grouped(3, 3, 3, 3))
    for wrap in (lambda one: one, Prompted, lambda one: ShuffledTexts(one, 0.5), lambda one: WithTexts(one, [()] * 12)):
        with pytest.raises(ConfigError, match=r"Batches of 8 cut through runs of 6.*to 6\."):
            load(wrap(source), 8)
    loader = load(source, 12)
    runs = [list(request.indices) for _, request in zip(range(2), loader.requests(), strict=False)]
    for run in np.reshape(runs, (-1, 6)).tolist():
        assert len({source[row].group for row in run}) == 2

    # A source of 24 rows per epoch is shared by three processes: 8 each, of which a run of 6 is taken.
    parts = [load(source, 12, part=(part, 3)) for part in range(3)]
    assert {(part.batch_size, part.batches_per_epoch) for part in parts} == {(6, 1)}
    for part in parts:
        assert len({source[row].group for row in next(part.requests()).indices}) == 2
    with pytest.raises(DataError, match="24 samples per epoch; training needs at least 30, a run of 6 per process"):
        load(source, 12, part=(0, 5))


def test_a_small_source_is_cut_between_runs(grouped, make_model):
    source, model = grouped(2, 2, 2, 2, 2), make_model()
    config = LoaderConfig(batch_size=128, per_group=2)
    loader = Loader(source, model.image_policy, model.tokenizer, config, part=(1, 2))
    assert loader.batch_size == 4  # of 5 for each of two processes
    rows = next(loader.requests()).indices
    assert all(source[a].group == source[b].group for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_an_order_is_not_ordered_again(grouped, make_model):
    source, model = mined(grouped(3, 3, 3)), make_model()
    config = LoaderConfig(batch_size=6, per_group=2)
    with pytest.raises(DataError, match=r"has an order of its own already.*leave data\.per_group at 1"):
        Loader(source, model.image_policy, model.tokenizer, config)


def test_a_part_that_takes_neighbours_apart_says_so(grouped):
    whole = grouped(3, 3, 3, 3)
    rows = {name: [row for row in range(12) if whole[row].group == name] for name in ("g0", "g1", "g2", "g3")}
    first_groups = [*rows["g0"], *rows["g1"]]
    pairs = per_group(whole, 3)
    assert (Subset(pairs, first_groups, "part").run_length, Subset(pairs, first_groups, "part").notes) == (3, ())
    neighbours = mined(whole)
    assert Subset(neighbours, range(12), "all").run_length == 6
    for source, taken in ((pairs, first_groups[:4]), (neighbours, rows["g0"]), (neighbours, [*range(12), 0])):
        part = Subset(source, taken, "part")
        assert part.run_length == 1
        assert part.notes[-1].startswith(
            f"part takes some of {source.run_length} samples of listed that belong together"
        )


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
