import io
import os
import pickle
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.data.images import decode
from diptych.data.loader import Loader, LoaderConfig, Position, TextColumn, choose_workers, draw_order
from diptych.data.sources import AbstractSource, Listed, WithChances
from diptych.data.text_changes import TextChange
from diptych.data.tokenizer import TextPolicy, Tokenizer, hash_strings
from diptych.data.transforms import Augment, ImagePolicy, preprocess
from diptych.errors import ConfigError, DataError, ImageError, TextError
from diptych.types import Batch, Sample, Text

POLICY = ImagePolicy(size=12)
TOKENIZER = Tokenizer.train(["a red circle", "a blue square"], vocabulary=300, length=16)
RANDOM = Augment(crop_scale=(0.3, 1.0), flip_rate=0.5, jitter=0.4, gray_rate=0.2)
CONFIG = LoaderConfig(batch_size=4, views=(RANDOM, Augment()), texts=(TextColumn(),))


@pytest.fixture
def source(drawings) -> Listed:
    """Return ten drawings with three texts each: two batches of four per epoch, two samples over."""
    listed = drawings(10)
    extra = tuple(Text(f"version {i}", "rewrite") for i in range(2))
    return Listed([replace(sample, texts=(*sample.texts, *extra)) for sample in listed], "ten")


def make(source: AbstractSource, config: LoaderConfig = CONFIG, **options) -> Loader:
    return Loader(source, POLICY, TOKENIZER, config, **options)


def take(loader: Loader, count: int) -> list[Batch]:
    return list(islice(loader, count))


def content(batch: Batch) -> bytes:
    """Return everything in a batch as bytes."""
    texts = [(column.ids.tolist(), column.mask.tolist(), column.key.tolist()) for column in batch.texts]
    return pickle.dumps((batch.keys, [view.tolist() for view in batch.images], texts, batch.group.tolist()))


def order(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(source, workers):
    alone = take(make(source), 5)
    helped = make(source, replace(CONFIG, workers=workers))
    for i, batch in enumerate(islice(helped, 5)):
        assert content(batch) == content(alone[i])
        assert helped.position == Position(*divmod(i + 1, 2))  # not where the workers are already


@pytest.mark.parametrize("taken", range(5))
def test_going_on_from_any_position_gives_the_same_batches(source, taken):
    whole = [content(batch) for batch in take(make(source, seed=3), 6)]
    first = make(source, seed=3)
    take(first, taken)
    again = make(source, seed=3, position=Position(first.position.epoch, first.position.cursor))
    assert [content(batch) for batch in take(again, 6 - taken)] == whole[taken:]
    first.position = Position(0, 1)
    assert content(next(iter(first))) == whole[1]


def test_another_seed_or_epoch_is_another_order(source):
    one, other = take(make(source, seed=0), 4), take(make(source, seed=1), 4)
    first, second = order(one[:2]), order(one[2:])
    assert len(set(first)) == len(set(second)) == 8
    assert first != second and first != order(other[:2])


def test_an_epoch_shows_another_crop_and_another_text(drawings):
    sample = replace(drawings(1)[0], texts=tuple(Text(f"word {i}") for i in range(50)))
    config = LoaderConfig(batch_size=1, views=(RANDOM, Augment()))
    one, two = take(make(Listed([sample]), config), 2)
    assert not torch.equal(one.images[0], two.images[0])
    assert torch.equal(one.images[1], two.images[1])
    assert one.texts[0].key != two.texts[0].key


def test_two_random_views_differ(source):
    batch = next(iter(make(source, replace(CONFIG, views=(RANDOM, RANDOM)))))
    assert not torch.equal(batch.images[0], batch.images[1])


def test_a_batch_holds_what_its_keys_say(source):
    batch = next(iter(make(source)))
    by_key = {sample.key: sample for sample in source}
    assert [view.dtype for view in batch.images] == [torch.uint8] * 2
    assert [tuple(view.shape) for view in batch.images] == [(4, 3, 12, 12)] * 2
    for row, key in enumerate(batch.keys):
        assert torch.equal(batch.images[1][row], preprocess(decode(by_key[key].image), POLICY))
        known = hash_strings(text.text for text in by_key[key].texts)
        assert batch.texts[0].key[row] in known
    assert torch.equal(batch.group, hash_strings(batch.keys))
    assert batch.skipped == () and len(batch) == 4


def test_texts_go_to_their_columns(drawings):
    texts = (Text("a cat"), Text("a dog", "hard_negative"), Text("eine Katze", "translation", "de"))
    listed = Listed([replace(sample, texts=texts) for sample in drawings(3)])
    columns = (TextColumn(), TextColumn(("translation",)), TextColumn(("hard_negative",)))
    batch = next(iter(make(listed, LoaderConfig(batch_size=3, texts=columns))))
    for column, word in zip(batch.texts, ("a cat", "eine Katze", "a dog"), strict=True):
        assert torch.equal(column.key, hash_strings([word] * 3))


def test_roles_are_drawn_by_weight_and_texts_of_a_role_evenly():
    texts = (Text("c"), Text("t0", "translation"), Text("t1", "translation"), Text("h", "hard_negative"))
    sample = Sample("x", None, texts, "x")
    column = TextColumn(("caption", "translation", "label"), (0.7, 0.2, 5.0))  # there is no label: 7 to 2 remain
    rng = np.random.default_rng(0)
    found = Counter(column.draw(sample, rng) for _ in range(9000))
    assert found["c"] == pytest.approx(7000, abs=160)  # four standard deviations
    assert found["t0"] == pytest.approx(1000, abs=120) and found["t1"] == pytest.approx(1000, abs=120)
    assert found["h"] == 0
    even = Counter(TextColumn(("caption", "translation")).draw(sample, rng) for _ in range(9000))
    assert even["c"] == pytest.approx(4500, abs=190)


def test_languages_are_drawn_evenly_whatever_their_number_of_texts():
    texts = (
        *(Text(f"e{i}", "caption", "en") for i in range(3)),
        Text("d", "translation", "de"),
        Text("?", "translation"),
    )
    sample, rng = Sample("x", None, (*texts, Text("h", "hard_negative", "fr")), "x"), np.random.default_rng(0)
    column = TextColumn(("caption", "translation"), by="language")
    found = Counter(column.draw(sample, rng) for _ in range(9000))
    assert found["d"] == pytest.approx(3000, abs=180) and found["?"] == pytest.approx(3000, abs=180)  # 4 deviations
    assert all(found[f"e{i}"] == pytest.approx(1000, abs=120) for i in range(3)) and found["h"] == 0
    alone = replace(sample, texts=texts[3:4])
    assert {column.draw(alone, rng) for _ in range(50)} == {"d"}  # one language never gives an empty string
    with pytest.raises(ConfigError, match="weights"):
        TextColumn(("caption", "translation"), (0.5, 0.5), by="language")
    for weights in ((1.0,), (1.0, 0.0), (1.0, 1.0, 1.0)):
        with pytest.raises(
            ConfigError, match=r"one weight above 0 for each of its roles, caption, translation; the weights are \(1"
        ):
            TextColumn(("caption", "translation"), weights)


def test_a_sample_without_the_roles_asked_for():
    sample = Sample("x", None, (Text("h", "hard_negative"),), "x")
    with pytest.raises(TextError, match=r"'x' has no text with a role in caption, label; its roles: hard_negative"):
        TextColumn(("caption", "label")).draw(sample, np.random.default_rng(0))


BAD = {
    "corrupt": lambda sample: replace(sample, image=b"no image"),
    "no image": lambda sample: replace(sample, image=None),
    "no text": lambda sample: replace(sample, texts=()),
    "empty text": lambda sample: replace(sample, texts=(Text(" \t"),)),
}


def with_bad(source: Listed, kinds: dict[int, str]) -> Listed:
    return Listed([BAD[kinds[i]](s) if i in kinds else s for i, s in enumerate(source.samples)], "ten")


def test_bad_samples_are_skipped_counted_and_change_no_other(source):
    config = replace(CONFIG, batch_size=10)
    whole = next(iter(make(source, config)))
    kinds = dict(zip((1, 4, 6, 9), BAD, strict=True))
    found = next(iter(make(with_bad(source, kinds), config)))
    kept = [row for row, key in enumerate(whole.keys) if int(key[1:]) not in kinds]
    assert found.keys == tuple(whole.keys[row] for row in kept) and len(found) == 6
    for view, view_of_all in zip(found.images, whole.images, strict=True):
        assert torch.equal(view, view_of_all[kept])
    assert torch.equal(found.texts[0].key, whole.texts[0].key[kept])
    assert torch.equal(found.group, whole.group[kept])
    said = {int(line.split(":")[0]): line for line in found.skipped}
    assert set(said) == set(kinds) and len(found.skipped) == 4
    for index, word in ((1, "8 bytes"), (4, "'s4' has no image"), (6, "roles: none"), (9, "'s9' has an empty text")):
        assert word in said[index]


def test_each_text_column_has_its_own_changes(source):
    columns = (TextColumn(("caption",)), TextColumn(("caption",), change=TextChange(stop_word_rate=1.0)))
    batch = next(iter(make(source, replace(CONFIG, texts=columns))))
    captions = {sample.key: sample.texts[0].text for sample in source}
    plain = [captions[key] for key in batch.keys]
    assert torch.equal(batch.texts[0].key, hash_strings(plain))
    assert torch.equal(batch.texts[1].key, hash_strings(text.removeprefix("a ") for text in plain))


def test_a_language_without_the_words_that_a_change_needs_stops_even_a_lenient_run(source):
    spoken = Listed([replace(s, texts=(Text("赤い 丸", "caption", "ja"),)) for s in source], "ja")
    change = TextColumn(change=TextChange(stop_word_rate=0.1))
    with pytest.raises(ConfigError, match="no stop words for the language 'ja'"):
        next(iter(make(spoken, replace(CONFIG, texts=(change,)))))


def test_a_text_of_punctuation_is_empty_where_punctuation_is_dropped(source):
    source.samples[2] = replace(source.samples[2], texts=(Text("?!"),))
    tokenizer = Tokenizer(TOKENIZER.engine, TextPolicy(length=16, clean="canonicalize"))
    batch = next(iter(Loader(source, POLICY, tokenizer, replace(CONFIG, batch_size=10))))
    assert len(batch) == 9 and len(batch.skipped) == 1 and batch.skipped[0].startswith("2: ")
    assert not next(iter(make(source, replace(CONFIG, batch_size=10)))).skipped


@pytest.mark.parametrize(("kind", "error"), [("corrupt", ImageError), ("empty text", TextError)])
def test_strict_stops_at_the_first_bad_sample(source, kind, error):
    config = replace(CONFIG, batch_size=10, bad_samples="strict")
    with pytest.raises(error, match="Sample 7 of ten: "):
        next(iter(make(with_bad(source, {7: kind}), config)))


@pytest.mark.slow  # torch waits five seconds for the worker that failed
def test_an_error_in_a_worker_stops_the_run_as_well(source):
    config = replace(CONFIG, batch_size=10, bad_samples="strict", workers=1)
    with pytest.raises(ImageError, match="Sample 7 of ten: "):
        next(iter(make(with_bad(source, {7: "corrupt"}), config)))


def test_a_batch_of_bad_samples_only_stops_even_a_lenient_run(source):
    bad = with_bad(source, dict.fromkeys(range(10), "corrupt"))
    with pytest.raises(DataError, match=r"None of the 4 samples .* First: \d: 8 bytes"):
        next(iter(make(bad)))


def test_sizes_that_cannot_be(source):
    with pytest.raises(DataError, match="nothing has no samples"):
        make(Listed([], "nothing"))
    for config in (LoaderConfig(batch_size=0), LoaderConfig(workers=-1)):
        with pytest.raises(ConfigError, match="batch_size must be >= 1 and workers >= 0"):
            make(source, config)


def test_a_batch_is_never_larger_than_the_source(source):
    loader = make(source, LoaderConfig(batch_size=64))
    assert loader.batches_per_epoch == 1
    assert [len(batch) for batch in take(loader, 3)] == [10] * 3 and loader.position == Position(3, 0)


def test_torch_s_own_generator_is_left_alone(source):
    before = torch.get_rng_state()
    take(make(source), 3)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 30), size=st.integers(1, 40), start=st.integers(0, 12), late=st.booleans())
def test_positions_count_batches(samples, size, start, late):
    listed = Listed([Sample(str(i), None, (), str(i)) for i in range(samples)])
    config = LoaderConfig(batch_size=size)
    loader = make(listed, config, seed=samples)
    per_epoch, own = loader.batches_per_epoch, loader.batch_size
    assert (own, per_epoch) == (min(size, samples), samples // min(size, samples))
    whole = list(islice(loader.requests(), start + 2 * per_epoch))
    for number, request in enumerate(whole):
        assert request.epoch == number // per_epoch and len(request.indices) == own
        assert request.after == Position(*divmod(number + 1, per_epoch))
    for epoch in range(len(whole) // per_epoch):
        seen = [i for request in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for i in request.indices]
        assert len(set(seen)) == len(seen) == per_epoch * own and set(seen) <= set(range(samples))
    epoch, cursor = divmod(start, per_epoch)
    if late and cursor == 0 and epoch > 0:
        epoch, cursor = epoch - 1, per_epoch  # the end of an epoch is the start of the next
    again = make(listed, config, seed=samples, position=Position(epoch, cursor))
    assert list(islice(again.requests(), 2 * per_epoch)) == whole[start:]


@pytest.mark.parametrize(
    ("cores", "samples", "expected"), [(2, 5000, 0), (4, 1999, 0), (4, 2000, 2), (16, 5000, 8), (64, 5000, 8)]
)
def test_the_number_of_workers_follows_from_cores_and_samples(monkeypatch, cores, samples, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    listed = Listed([Sample(str(i), None, (), str(i)) for i in range(samples)])
    count, reason = choose_workers(make(listed).maker)
    assert count == expected and reason.startswith(f"Workers: {count}")
    assert choose_workers(make(listed, replace(CONFIG, workers=3)).maker)[0] == 3


def test_each_distinct_text_is_tokenised_once(source, monkeypatch):
    loader, seen = make(source), []
    plain = [content(batch) for batch in take(make(source), 6)]
    sequences = loader.maker.tokenizer.sequences
    monkeypatch.setattr(loader.maker.tokenizer, "sequences", lambda texts: seen.extend(texts) or sequences(texts))
    assert [content(batch) for batch in take(loader, 6)] == plain
    assert len(seen) == len(set(seen)) > 4


def test_a_full_memory_of_texts_starts_anew(source, monkeypatch):
    plain = [content(batch) for batch in take(make(source), 6)]
    monkeypatch.setattr("diptych.data.loader.REMEMBERED_TEXTS", 5)
    assert [content(batch) for batch in take(make(source), 6)] == plain


def test_scaled_decoding_is_for_random_crops_of_large_jpegs_only():
    Image.effect_noise((640, 480), 60).convert("RGB").save(file := io.BytesIO(), "JPEG")
    listed = Listed([Sample("a", file.getvalue(), (Text("noise"),), "a")])
    crop = Augment(crop_scale=(0.6, 1.0))

    def first(decode, *views):
        return next(iter(make(listed, LoaderConfig(batch_size=1, views=views, decode=decode)))).images[0].float()

    exact, scaled = first("exact", crop), first("scaled", crop)
    assert (
        not torch.equal(exact, scaled) and (exact - scaled).abs().mean() < 12
    )  # the same crop: another one differs by 30
    for views in (
        (Augment(),),
        (crop, Augment()),
        (replace(crop, size=400),),
    ):  # exact; exact because of the second; not large
        assert torch.equal(first("exact", *views), first("scaled", *views))


class Noting(Listed):
    """Notes which samples are read, and in which process with how many threads."""

    def __getitem__(self, index: int) -> Sample:
        self.read.append(index)
        threads = f"{torch.get_num_threads()} {os.environ['TOKENIZERS_PARALLELISM']}"
        return replace(self.samples[index], key=f"{os.getpid()} {threads}")


def noting(samples: list[Sample]) -> Noting:
    source = Noting(samples, "noting")
    source.read = []
    return source


def test_workers_have_one_thread_each_and_training_keeps_its_own(source, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # where it stays so, a forked tokenizer waits forever
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        batches = take(make(noting(source.samples), replace(CONFIG, workers=2)), 4)
        assert (torch.get_num_threads(), os.environ["TOKENIZERS_PARALLELISM"]) == (3, "true")
    finally:
        torch.set_num_threads(before)
    seen = {key.split(" ", 1)[0]: key.split(" ", 1)[1] for batch in batches for key in batch.keys}
    assert len(seen) == 2 and set(seen.values()) == {"1 false"} and str(os.getpid()) not in seen


def test_going_on_after_ten_thousand_samples_reads_none_of_them(source, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    many = [replace(source.samples[i % 10], group=str(i)) for i in range(12_000)]
    config = LoaderConfig(batch_size=8)
    (expected,) = list(islice(make(Listed(many), config).requests(), 1_250, 1_251))
    noted = noting(many)
    batch = next(iter(make(noted, config, position=Position(0, 1_250))))
    assert sorted(noted.read) == sorted(expected.indices)
    assert torch.equal(batch.group, hash_strings(map(str, expected.indices)))


def test_neighbours_are_read_one_after_another(source, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    noted = noting(source.samples)
    take(make(noted, replace(CONFIG, batch_size=10)), 2)
    assert noted.read == [*range(10), *range(10)]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("samples", [3, 10, 11, 25, 29])
def test_parts_of_an_uneven_source_have_equally_many_equal_batches(samples, parts):
    listed = Listed([Sample(str(i), None, (), str(i)) for i in range(samples)])
    loaders = [make(listed, seed=5, part=(part, parts)) for part in range(parts)]
    (count,), (size,) = {one.batches_per_epoch for one in loaders}, {one.batch_size for one in loaders}
    assert count == max(1, samples // (4 * parts)) and size == min(4, samples // parts)
    together = make(listed, LoaderConfig(batch_size=size * parts), seed=5)
    whole = islice(together.requests(), 2 * count + 1)
    for *requests, of_all in zip(*(one.requests() for one in loaders), whole):  # noqa: B905 - some go on forever
        assert all(len(request.indices) == size for request in requests)
        assert {(request.epoch, request.after) for request in requests} == {(of_all.epoch, of_all.after)}
        assert [index for request in requests for index in request.indices] == list(of_all.indices)


class TestChances:
    def test_certain_samples_are_in_every_epoch_and_excluded_ones_in_none(self, source):
        chances = np.array([1.0, 0, 1, 1, 0, 1, 1, 0, 1, 1])
        for epoch in range(5):
            drawn = draw_order(10, chances, np.random.default_rng(epoch))
            assert sorted(drawn.tolist()) == [0, 2, 3, 5, 6, 8, 9]

    def test_without_chances_the_order_is_what_it_was(self):
        found = draw_order(10, None, np.random.default_rng([3, 1]))
        assert found.tolist() == np.random.default_rng([3, 1]).permutation(10).tolist()
        certain = draw_order(10, np.ones(10), np.random.default_rng([3, 1]))
        assert certain.tolist() == found.tolist()

    def test_each_is_drawn_as_often_as_its_chance_says_and_their_number_stays(self):
        chances, epochs = np.random.default_rng(0).random(40) ** 3, 20_000
        rng = np.random.default_rng(1)
        epochs_drawn = [draw_order(40, chances, rng) for _ in range(epochs)]
        assert {len(drawn) for drawn in epochs_drawn} == {int(chances.sum()), int(chances.sum()) + 1}
        assert all(len(set(drawn.tolist())) == len(drawn) for drawn in epochs_drawn[:100])
        share = np.bincount(np.concatenate(epochs_drawn), minlength=40) / epochs
        assert (np.abs(share - chances) < 4.5 * np.sqrt(chances * (1 - chances) / epochs)).all()
        first = np.bincount([drawn[0] for drawn in epochs_drawn], minlength=40) / epochs  # the order is random, too
        assert np.abs(first - chances / chances.sum()).max() < 4.5 * np.sqrt(0.25 / epochs)

    def test_epochs_are_as_long_as_the_sum_of_chances_and_resume(self, source):
        drawn = WithChances(source, np.full(10, 0.87))
        loader = make(drawn, seed=3)
        assert (loader.batch_size, loader.batches_per_epoch) == (4, 2)
        whole = [content(batch) for batch in take(loader, 6)]
        for taken in range(6):
            again = make(drawn, seed=3, position=Position(*divmod(taken, 2)))
            assert [content(batch) for batch in take(again, 6 - taken)] == whole[taken:]
        halves = [take(make(drawn, replace(CONFIG, batch_size=2), seed=3, part=(part, 2)), 4) for part in range(2)]
        both = [a.keys + b.keys for a, b in zip(*halves, strict=True)]
        assert both == [batch.keys for batch in take(make(drawn, seed=3), 4)]

    def test_too_few_to_train_on(self, source):
        with pytest.raises(DataError, match="no samples per epoch; training needs at least 1"):
            make(WithChances(source, np.full(10, 0.05)))
