import io
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from diptych import files
from diptych.data.loader import BatchMaker, CacheConfig, Loader, LoaderConfig, Position, TextColumn
from diptych.data.sources import Listed
from diptych.data.text_changes import TextChange
from diptych.data.tokenizer import Tokenizer
from diptych.data.transforms import Augment
from diptych.methods import clip
from diptych.models.embedding import embed_source
from diptych.models.memory import remembered
from diptych.models.modes import set_mode
from diptych.training import features
from diptych.training.features import use_cache, with_outputs
from diptych.training.loop import fit
from diptych.training.optim import OptimizerConfig
from diptych.training.recipe import Recipe
from diptych.types import PairEmbeddings, Sample, Text, TowerOutput, tensors_of
from tiny_run import Killed

RANDOM = Augment(crop_scale=(0.5, 1.0), flip_rate=0.5)
DATA = LoaderConfig(batch_size=4)
OFF = CacheConfig(mode="off")
RECIPE = Recipe(
    "clip",
    clip.Config(),
    data=DATA,
    optimizer=OptimizerConfig(lr=0.01),
    epochs=4,
    save_every=2,
    log_every=1,
    precision="fp32",
)
MANY = 10_000


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Keep what these tests compute out of the user's folder."""
    monkeypatch.setattr(files, "feature_folder", lambda: tmp_path / "features")
    return tmp_path / "features"


@pytest.fixture
def source(drawings) -> Listed:
    listed = drawings(12)
    return Listed([replace(s, texts=(*s.texts, Text(f"another {i} words here"))) for i, s in enumerate(listed.samples)])


class Tokenwise(clip.Objective):
    """CLIP on the mean of patches and tokens, so that pooled vectors do not suffice."""

    def encode(self, batch):
        image, text = self.model.image_output(batch.images[0]), self.model.text_output(batch.texts[0])
        weight = text.mask[..., None].float()
        pooled = (text.tokens * weight).sum(1) / weight.sum(1)
        heads = self.model.image_head.linear(image.tokens.mean(1)), self.model.text_head.linear(pooled)
        images, texts = (torch.nn.functional.normalize(x.float(), dim=-1) for x in heads)
        return PairEmbeddings((images,), (texts,))


class Direct(clip.Objective):
    """CLIP that goes to the towers by itself."""

    def encode(self, batch):
        image = self.model.image_head(self.model.vision(self.model.pixels(batch.images[0])))
        text = self.model.text_head(self.model.text(batch.texts[0].ids, batch.texts[0].mask))
        return PairEmbeddings(*((torch.nn.functional.normalize(x, dim=-1),) for x in (image, text)))


@pytest.fixture
def make(make_model, source):
    def build(kind=clip.Objective, *, modes=("frozen", "frozen"), data=DATA, seed=0, of=None):
        model = make_model(seed, [text.text for s in source.samples for text in s.texts])
        set_mode(model.vision, modes[0])
        set_mode(model.text, modes[1])
        return kind(model, clip.Config()), Loader(of or source, model.image_policy, model.tokenizer, data, seed=0)

    return build


def cached(objective, loader, *, draws=MANY, precision="fp32") -> list[str]:
    said: list[str] = []
    use_cache(objective, loader, precision, draws=draws, say=said.append)
    assert said.pop().startswith("Workers: ")
    return said


def train(objective, loader, recipe, folder, *, resume=False):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(3)
    fit(objective, loader, recipe, folder, console=Console(file=io.StringIO(), width=300), resume=resume)
    return objective.state_dict()


def stores(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


@pytest.mark.parametrize("kind", [clip.Objective, Tokenwise])
def test_training_with_the_cache_is_training_without_it(make, tmp_path, kind):
    """To 1e-5 relative after 12 steps, or 1e-6: batches of another size may round differently in the last bit."""
    objective, loader = make(kind)
    whole = train(*make(kind, data=replace(DATA, cache=OFF)), RECIPE, tmp_path / "off")
    found = train(objective, loader, RECIPE, tmp_path / "on")
    assert all(loader.maker.cached.views) and all(loader.maker.cached.texts)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_second_run_is_the_first_to_the_last_bit(make, tmp_path):
    first = train(*make(), RECIPE, tmp_path / "one")
    second = train(*make(), RECIPE, tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batches_of_one_kernel_are_equal_to_the_last_bit(make, monkeypatch):
    """With the tower asked for the very rows of a batch, in its order and padded alike, nothing is left to rounding."""
    objective, loader = make(of=None, data=replace(DATA, batch_size=12))
    plain = next(iter(make(data=replace(DATA, batch_size=12, cache=OFF))[1]))
    cached(objective, loader)
    batch = next(iter(loader))
    assert batch.keys == plain.keys and torch.equal(batch.texts[0].ids, plain.texts[0].ids)
    assert isinstance(batch.images[0], TowerOutput)
    with torch.no_grad():
        inverse = torch.tensor([int(key[1:]) for key in batch.keys]).argsort()
        expected = objective.model.image_output(
            plain.images[0][inverse]
        ).pooled  # as it was filled: in order of the source
    assert torch.equal(batch.images[0].pooled[inverse], expected)


def test_the_cache_changes_neither_order_nor_texts(make):
    for views in ((Augment(),), (RANDOM, Augment()), (Augment(), RANDOM)):
        data = replace(DATA, views=views)
        objective, loader = make(data=data)
        cached(objective, loader)
        plain = make(data=data)[1]
        for one, other in zip(islice(loader, 7), islice(plain, 7), strict=True):
            assert one.keys == other.keys and torch.equal(one.texts[0].key, other.texts[0].key)
            for view, raw in zip(one.images, other.images, strict=True):
                assert isinstance(view, TowerOutput) or torch.equal(view, raw)


def test_only_what_is_read_is_kept(make, folder):
    said = cached(*make())
    assert len(said) == 2 and all("pooled of" in line and "MB in" in line for line in said)
    said = cached(*make(Tokenwise))
    assert all("pooled and tokens of" in line for line in said)


def test_random_views_are_not_cached_and_the_reason_is_said(make):
    objective, loader = make(data=replace(DATA, views=(RANDOM,)))
    said = cached(objective, loader)
    assert loader.maker.cached.views == (None,) and loader.maker.cached.texts[0] is not None
    assert sum("it is random, so it differs in every epoch" in line for line in said) == 1


def test_texts_changed_at_random_are_not_cached(make):
    data = replace(DATA, texts=(TextColumn(change=TextChange(delete_weight=1.0)),))
    objective, loader = make(data=data)
    assert any("changed at random" in line for line in cached(objective, loader))
    assert loader.maker.cached.texts == (None,)


@pytest.mark.parametrize("versions", [4, 9])
def test_as_many_versions_as_epochs_are_no_approximation(make, versions):
    data = replace(DATA, views=(RANDOM,), cache=CacheConfig("approximate", versions=versions))
    objective, loader = make(data=data)
    cached(objective, loader)
    plain = make(data=replace(data, cache=OFF))
    for one, other in zip(islice(loader, 12), islice(plain[1], 12), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(one.images[0].pooled, plain[0].model.image_output(other.images[0]).pooled)


def test_random_versions_of_another_seed_are_others(make, folder):
    data = replace(DATA, views=(RANDOM,), cache=CacheConfig("approximate", versions=2))
    objective, loader = make(data=data)
    cached(objective, loader)
    before = stores(folder)
    objective, loader = make(data=data)
    loader.maker.seed = 1
    cached(objective, loader)
    assert len(stores(folder) - before) == 1  # of images; texts are the same


def test_fewer_versions_come_round_again(make):
    data = replace(DATA, batch_size=12, views=(RANDOM,), cache=CacheConfig("approximate", versions=2))
    objective, loader = make(data=data)
    cached(objective, loader)
    by_key = [dict(zip(b.keys, b.images[0].pooled, strict=True)) for b in islice(loader, 4)]
    for key in by_key[0]:
        assert torch.equal(by_key[0][key], by_key[2][key]) and torch.equal(by_key[1][key], by_key[3][key])
    assert not all(torch.equal(by_key[0][key], by_key[1][key]) for key in by_key[0])


@pytest.mark.parametrize("modes", [("full", "frozen"), ("frozen", "full"), ("full", "full"), ("lora", "frozen")])
def test_towers_that_train_are_never_cached(make, modes):
    objective, loader = make(modes=modes)
    cached(objective, loader)
    assert [loader.maker.cached.views[0] is not None, loader.maker.cached.texts[0] is not None] == [
        mode == "frozen" for mode in modes
    ]


def test_a_method_that_goes_to_the_towers_itself_gets_its_inputs(make, folder):
    objective, loader = make(Direct)
    said = cached(objective, loader)
    assert loader.maker.cached.views == (None,) and loader.maker.cached.texts == (None,) and not stores(folder)
    assert len(said) == 2 and all("does not take it through the frozen tower alone" in line for line in said)


def test_a_second_tower_is_never_given_the_outputs_of_the_first(make, make_model, folder):
    class Taught(clip.Objective):
        def encode(self, batch):
            found = super().encode(batch)
            return PairEmbeddings((found.images[0], other.encode_image(batch.images[0])), found.texts)

    other = make_model(5)
    objective, loader = make(Taught)
    cached(objective, loader)
    assert loader.maker.cached.views == (None,) and loader.maker.cached.texts[0] is not None


def test_finding_out_leaves_no_trace(make):
    objective, loader = make()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    generator, position = torch.get_rng_state(), loader.position
    cached(objective, loader)
    assert torch.equal(torch.get_rng_state(), generator) and loader.position == position
    assert all(torch.equal(before[name], value) for name, value in objective.state_dict().items())


def test_an_objective_that_counts_its_calls_is_asked_as_if_for_the_first_time(make):
    class Counting(clip.Objective):
        def __init__(self, *given):
            super().__init__(*given)
            self.register_buffer("calls", torch.zeros(()))

        def encode(self, batch):
            self.calls += 1
            found = super().encode(batch)
            return PairEmbeddings((found.images[0] * self.calls,), found.texts)

    objective, loader = make(Counting)
    cached(objective, loader)
    assert all(loader.maker.cached.views) and all(loader.maker.cached.texts) and objective.calls == 0


def test_every_change_gives_another_key(make, source, folder, monkeypatch):
    """Weights, preprocessing, augmentation, number format and packages name another store; images and texts another row."""
    cached(*make())
    first = stores(folder)
    assert len(first) == 2

    def new(change, **given) -> int:
        objective, loader = make(**given)
        change(objective, loader)
        before = stores(folder)
        cached(objective, loader)
        return len(stores(folder) - before)

    def nudge(tower):
        with torch.no_grad():
            next(getattr(tower, name) for name in ("class_token", "position") if hasattr(tower, name))[0] += 1e-6

    def another_policy(objective, _):
        config = objective.model.config
        objective.model.config = replace(config, image_policy=replace(config.image_policy, mean=(0.1, 0.2, 0.3)))

    def another_preprocessing(_, loader):
        loader.maker.image_policy = replace(loader.maker.image_policy, resize="squash")

    def another_cleaning(_, loader):
        tokenizer = loader.maker.tokenizer
        loader.maker.tokenizer = Tokenizer(tokenizer.engine, replace(tokenizer.policy, clean="lower"))

    def another_vocabulary(_, loader):
        policy = loader.maker.tokenizer.policy
        loader.maker.tokenizer = Tokenizer(Tokenizer.train(["zzz xyz"], vocabulary=280).engine, policy)

    assert new(lambda *_: None) == 0
    assert new(lambda objective, _: nudge(objective.model.vision)) == 1
    assert new(lambda objective, _: nudge(objective.model.text)) == 1
    for change in (another_policy, another_preprocessing, another_cleaning, another_vocabulary):
        assert new(change) == 1, change.__name__
    assert new(lambda *_: None, data=replace(DATA, views=(Augment(crop_ratio=(0.9, 1.1)),))) == 1
    objective, loader = make()
    before = stores(folder)
    cached(objective, loader, precision="bf16")
    assert len(stores(folder) - before) == 2
    monkeypatch.setattr(features, "_version", lambda package: "another")
    assert new(lambda *_: None) == 2


def rows(loader) -> tuple[int, int]:
    return len(loader.maker.cached.views[0].store), len(loader.maker.cached.texts[0].store)


def test_a_changed_image_or_text_is_encoded_anew_and_nothing_else(make, source, monkeypatch):
    objective, loader = make()
    cached(objective, loader)
    images, texts = rows(loader)
    image = Image.open(io.BytesIO(source.samples[3].image)).convert("RGB")
    image.putpixel((0, 0), (254, 255, 255))
    image.save(file := io.BytesIO(), "PNG")
    changed = list(source.samples)
    changed[3] = replace(changed[3], image=file.getvalue())
    changed[5] = replace(changed[5], texts=(Text("a caption nobody has seen"), changed[5].texts[1]))
    objective, loader = make(of=Listed(changed))
    cached(objective, loader)
    assert rows(loader) == (images + 1, texts + 1)


def test_unreadable_images_are_skipped_as_without_a_cache(make, source):
    samples = list(source.samples)
    samples[2], samples[7] = replace(samples[2], image=b"no image"), replace(samples[7], image=None)
    data = replace(DATA, batch_size=12)
    objective, loader = make(of=Listed(samples), data=data)
    cached(objective, loader)
    assert loader.maker.cached.views[0] is not None
    found, plain = next(iter(loader)), next(iter(make(of=Listed(samples), data=data)[1]))
    assert found.keys == plain.keys and found.skipped == plain.skipped and len(found.skipped) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_look_up_the_same(make, workers):
    objective, loader = make()
    cached(objective, loader)
    other, helped = make(data=replace(DATA, workers=workers))
    cached(other, helped)
    for one, two in zip(islice(loader, 4), islice(helped, 4), strict=True):
        assert one.keys == two.keys and torch.equal(one.images[0].pooled, two.images[0].pooled)
        assert torch.equal(one.texts[0].output.pooled, two.texts[0].output.pooled)


def test_a_killed_run_goes_on_to_the_same_weights(make, tmp_path):
    whole = train(*make(), RECIPE, tmp_path / "whole")

    class Mortal(clip.Objective):
        def after_step(self, step):
            if step == 5:
                raise Killed

    with pytest.raises(Killed):
        train(*make(Mortal), RECIPE, tmp_path / "killed")
    again = train(*make(), RECIPE, tmp_path / "killed", resume=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_killed_build_loses_one_shard_at_most(make, monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 1)
    monkeypatch.setattr(features, "_AT_ONCE", 4)
    add, done = features._add, []

    def dying(*given):
        if len(done) == 2:
            raise Killed
        done.append(add(*given))

    monkeypatch.setattr(features, "_add", dying)
    with pytest.raises(Killed):
        cached(*make())
    monkeypatch.setattr(features, "_add", add)
    said = cached(*make())
    assert "(4 of them now" in said[0]


def test_a_full_disk_and_the_limit_end_in_training_without(make, folder, monkeypatch):
    objective, loader = make(data=replace(DATA, cache=CacheConfig(gigabytes=1e-9)))
    said = cached(objective, loader)
    assert loader.maker.cached.views == (None,) and all("data.cache.gigabytes is 1e-09" in line for line in said)

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_add", full)
    objective, loader = make()
    said = cached(objective, loader)
    assert loader.maker.cached.texts == (None,) and all("No space left on device" in line for line in said)
    assert next(iter(loader)).images[0].dtype == torch.uint8


def test_nothing_is_encoded_that_costs_more_than_it_saves(make, folder):
    objective, loader = make()
    said = cached(objective, loader, draws=13)  # 12 images, 24 texts
    assert loader.maker.cached.views[0] is not None and loader.maker.cached.texts == (None,)
    assert any("24 outputs would be computed to save 13" in line for line in said)


def test_off_is_silent(make, folder):
    assert cached(*make(data=replace(DATA, cache=OFF))) == [] and not stores(folder)


def test_pixels_are_kept_for_a_tower_that_trains_and_are_exact(make):
    data = replace(DATA, cache=CacheConfig(pixels=True))
    objective, loader = make(modes=("full", "full"), data=data)
    said = cached(objective, loader)
    assert loader.maker.cached.views[0] is not None and "pixels of" in said[0]
    plain = make(modes=("full", "full"), data=replace(DATA, cache=OFF))[1]
    for one, other in zip(islice(loader, 4), islice(plain, 4), strict=True):
        assert one.images[0].dtype == torch.uint8 and torch.equal(one.images[0], other.images[0])


@pytest.fixture
def photos() -> Listed:
    """Return twelve images of many kinds and sizes; number 3 is damaged, 7 has none, 8 is 0 once more."""
    noise = [Image.effect_noise((90 + 7 * n, 200 - 9 * n), 60) for n in range(12)]
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    images = []
    for n, one in enumerate(noise):
        kind = ("JPEG", {"exif": exif}) if n % 2 else ("PNG", {})
        (one.convert("RGB") if n % 4 else one.convert("LA")).save(file := io.BytesIO(), kind[0], **kind[1])
        images.append(file.getvalue())
    images[3], images[8], images[5] = images[3][:900], images[0], np.array(noise[5].convert("RGB"))
    listed = [Sample(f"p{n}", image, (Text(f"photo {n}"),), f"p{n}") for n, image in enumerate(images)]
    listed[7] = replace(listed[7], image=None)
    return Listed(listed, "photos")


@pytest.mark.parametrize("decode", ["exact", "scaled"])
@pytest.mark.parametrize("second", [Augment(), replace(RANDOM, jitter=0.4, size=24)])
def test_images_that_are_cropped_at_random_are_decoded_once_and_stay_exact(make, photos, monkeypatch, decode, second):
    data = replace(DATA, views=(RANDOM, second), decode=decode, batch_size=6)
    plain = make(modes=("full", "full"), data=replace(data, cache=OFF), of=photos)[1]
    expected = list(islice(plain, 6))
    objective, loader = make(modes=("full", "full"), data=replace(data, cache=CacheConfig(pixels=True)), of=photos)
    said = cached(objective, loader)
    assert any(line.startswith("The decoding of images is computed once: pixels of 11 (9 of them now") for line in said)
    monkeypatch.setattr(BatchMaker, "_decode", lambda *_: pytest.fail("an image was decoded"))
    for workers in (0, 2):
        loader.maker.config, loader.position = replace(loader.maker.config, workers=workers), Position()
        for one, other in zip(islice(loader, 6), expected, strict=True):
            assert one.keys == other.keys and one.skipped == other.skipped
            assert all(map(torch.equal, tensors_of(one), tensors_of(other)))
    assert sum(len(batch.skipped) for batch in expected) == 6  # two samples, three epochs


def test_decoded_images_are_found_again_and_stay_within_bounds(make, photos, folder):
    def say(**changes) -> str:
        options = {"views": (RANDOM,), "cache": CacheConfig(pixels=True), **changes}
        return cached(*make(modes=("full", "full"), data=replace(DATA, **options), of=photos))[-1]

    assert "(9 of them now" in say() and "(0 of them now" in say()
    assert "(0 of them now" in say(views=(replace(RANDOM, jitter=0.1),))  # one store for all crops
    assert "(9 of them now" in say(decode="scaled")  # but not for other pixels
    assert len(stores(folder)) == 2
    photos.samples[1] = replace(photos.samples[1], image=photos.samples[11].image)
    photos.samples[11] = replace(photos.samples[11], image=np.zeros((9, 9, 3), np.uint8))
    assert "(1 of them now" in say()
    small = CacheConfig(pixels=True, gigabytes=1e-6)
    photos.samples[0] = replace(photos.samples[0], image=np.zeros((200, 200, 3), np.uint8))
    assert "The decoding of images is not cached: it would take 0.0 GB and data.cache.gigabytes is 1e-06" in say(
        cache=small
    )


def test_evaluations_while_a_run_is_on_ask_frozen_towers_once(make, source, tmp_path):
    """The numbers are those of evaluations without a memory, averaged weights included."""
    objective, loader = make()
    recipe = replace(RECIPE, optimizer=replace(RECIPE.optimizer, ema_decay=0.9), epochs=3)
    asked, seen = [], []
    with remembered(objective.model, source) as memory:

        def evaluate(model):
            hook = model.vision.register_forward_hook(lambda *_: asked.append(len(seen)))
            with_memory = embed_source(model, source, memory=memory)
            hook.remove()
            without = embed_source(model, source)
            assert torch.equal(with_memory.images, without.images) and torch.equal(with_memory.texts, without.texts)
            seen.append(with_memory.images)
            return {}

        console = Console(file=io.StringIO(), width=300)
        fit(objective, loader, recipe, tmp_path, console=console, evaluate=evaluate)
    assert len(seen) == 3 and asked == [0] and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(("kind", "given"), [(clip.Objective, True), (Tokenwise, True), (Direct, False)])
def test_many_steps_on_one_batch_ask_frozen_towers_once(make, kind, given):
    objective, loader = make(kind)
    batch = next(iter(loader))
    expected = objective.encode(batch)
    found = with_outputs(objective, batch, "fp32")
    assert isinstance(found.images[0], TowerOutput) == given and (found.texts[0].output is not None) == given
    assert all(map(torch.equal, tensors_of(objective.encode(found)), tensors_of(expected)))
    objective, loader = make(kind, modes=("full", "frozen"))
    assert with_outputs(objective, batch, "fp32").images[0] is batch.images[0]
