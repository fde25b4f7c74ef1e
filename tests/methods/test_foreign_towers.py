"""Adapters, attacks, the audit, hardening and pooling on models of several kinds: ours, and folders that open_clip and transformers wrote.

What the other library itself says of the same pixels and texts stands beside ours wherever a method shows what it saw.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.claims.train import train_quietly
from diptych.config import override
from diptych.data.sources import Listed
from diptych.data.tokenizer import Tokenizer
from diptych.evaluation.attack import measure_attack
from diptych.evaluation.robustness import RobustnessConfig, audit
from diptych.evaluation.segmentation import Vocabulary
from diptych.methods import METHODS, anovl, clip, ip_clip, load_method, trident
from diptych.models.checkpoint import save_model
from diptych.models.dense_features import load_self_supervised
from diptych.models.dual import DualEncoder
from diptych.models.embedding import evaluation_view
from diptych.models.pgd import PGDConfig
from diptych.models.sam import load_sam
from diptych.models.weights import load
from diptych.training.hardening import harden
from diptych.types import Batch, Text, Tokens
from diptych.use.linkage import embed_records
from other_libraries import (
    hf_clip,
    hf_siglip,
    openclip_folder,
    randomise,
    save_dino,
    save_hf,
    save_sam,
    vit_b_32_like,
)
from tiny_run import TINY

KINDS = ("ours", "open_clip", "hf clip", "hf siglip")
COVERED = {"anovl", "trident", "ip_clip", "c_pgc", "gama"}
PAIRS = ("a cat and a dog", "a dog and a bus", "a bus and a cat")


@dataclass(frozen=True)
class Foreign:
    """A model on the disk.

    Attributes:
        spec: As a user names it.
        model: As diptych reads it.
        images: What the library that wrote it makes of normalised pixels.
        texts: And of tokens.
    """

    spec: str
    model: DualEncoder
    images: Callable[[Tensor], Tensor]
    texts: Callable[[Tokens], Tensor]

    def embeddings(self, source: Listed) -> tuple[Tensor, Tensor]:
        """Return what the other library makes of the images and the first texts of samples, L2-normalised."""
        pixels = torch.stack([evaluation_view(self.model, sample) for sample in source])
        return self.seen(pixels), self.said([sample.texts[0].text for sample in source])

    @torch.no_grad()
    def seen(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.images(self.model.pixels(pixels)), dim=-1)

    @torch.no_grad()
    def said(self, texts: list[str]) -> Tensor:
        return F.normalize(self.texts(self.model.tokenizer(texts)), dim=-1)


@pytest.fixture(scope="module", params=KINDS)
def foreign(request, tmp_path_factory, make_model) -> Foreign:
    folder = tmp_path_factory.mktemp("models") / "model"
    tokenizer = Tokenizer.train([*PAIRS, "a photo of a red circle", "broken pear"] * 3, vocabulary=300, length=16)
    if request.param == "ours":
        save_model(make_model(), folder)
        ours = make_model()
        return Foreign(
            str(folder),
            load(folder),
            lambda pixels: ours.image_head(ours.vision(pixels)),
            lambda tokens: ours.text_head(ours.text(tokens.ids, tokens.mask)),
        )
    if request.param == "open_clip":
        open_clip = pytest.importorskip("open_clip", reason="models of open_clip need the extra openclip")
        openclip_folder(folder, vit_b_32_like(quick_gelu=True), tokenizer)
        theirs = open_clip.create_model(f"local-dir:{folder}", load_weights=True).eval()
        return Foreign(
            f"open_clip:{folder}",
            load(f"open_clip:{folder}", offline=True),
            theirs.encode_image,
            lambda tokens: theirs.encode_text(F.pad(tokens.ids, (0, 16 - tokens.ids.shape[1]))),
        )
    pytest.importorskip("transformers", reason="models of transformers need the extra hf")
    torch.manual_seed(0)
    siglip = request.param == "hf siglip"
    theirs = hf_siglip() if siglip else hf_clip("quick_gelu")
    randomise(theirs)
    save_hf(theirs, folder, tokenizer)

    def images(pixels: Tensor) -> Tensor:
        found = theirs.get_image_features(pixel_values=pixels)
        return getattr(found, "pooler_output", found)

    def texts(tokens: Tokens) -> Tensor:
        found = theirs.get_text_features(input_ids=tokens.ids, attention_mask=None if siglip else tokens.mask.long())
        return getattr(found, "pooler_output", found)

    return Foreign(f"hf:{folder}", load(f"hf:{folder}", offline=True), images, texts)


@pytest.fixture
def model(foreign) -> Iterator[DualEncoder]:
    """Return the model, which must stay as it was."""
    before = {name: value.clone() for name, value in foreign.model.state_dict().items()}
    yield foreign.model
    assert all(torch.equal(value, before[name]) for name, value in foreign.model.state_dict().items())
    assert all(parameter.grad is None for parameter in foreign.model.parameters())
    foreign.model.requires_grad_(True)


@pytest.fixture
def source(drawings) -> Listed:
    """Return drawn samples with two things in their captions, a label and a domain."""
    return Listed(
        [
            replace(s, texts=(Text(f"{PAIRS[n % 3]} {n}"),), label=("cat", "bus")[n % 2], domain=("day", "night")[n // 6])
            for n, s in enumerate(drawings(12))
        ],
        "pairs",
    )  # fmt: skip


def picture(height: int, width: int) -> Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def alone(image: Tensor) -> Batch:
    return Batch(("one",), (image[None],), (), torch.zeros(1, dtype=torch.int64))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_every_adapter_and_attack_is_covered():
    assert {slug for slug, m in METHODS.items() if m.verb in ("adapter", "attack") and m.state != "planned"} == COVERED


def test_anovl(foreign, model):
    side = model.image_policy.size
    image, config = picture(side, side), anovl.Config("pear", prompts="bare", scale=5.0, steps=0)
    plain = anovl.Adapter(config).fit(model)(alone(image))
    cosines = foreign.seen(image[None]) @ foreign.said(["pear", "broken pear"]).T
    assert_same(plain.scores, (5.0 * cosines).softmax(-1)[:, 1])
    wide = picture(side, side + side // 2)
    fixed, learnt = (
        anovl.Adapter(replace(config, steps=steps, tokens="local")).fit(model)(alone(wide)).maps for steps in (0, 2)
    )
    assert fixed.shape == learnt.shape == (1, side, side + side // 2) and not torch.equal(fixed, learnt)
    assert bool(((learnt > 0) & (learnt < 1)).all())


def test_trident(foreign, model):
    words = Vocabulary(("a cat", "a bus"), ("sky", "a dog"))
    labeller = trident.Adapter(trident.Config(prompts="name", least_area=4), words).fit(model)
    assert labeller.tokens == "values"
    assert_same(labeller.texts, foreign.said(list(words.words)))
    found = labeller.label(picture(40, 56))
    assert found.labels.shape == (40, 56) and found.probabilities.shape == (3, 40, 56)
    assert found.probabilities.isfinite().all() and (found.probabilities.sum(0) <= 1 + 1e-5).all()


def test_trident_with_dino_and_sam(foreign, model, tmp_path):
    """All three models from folders of other libraries: what each of them says gets into the labels."""
    pytest.importorskip("transformers", reason="DINO and SAM need the extra hf")
    for name in ("dino", "sam"):
        (tmp_path / name).mkdir()
    save_dino(tmp_path / "dino", "dinov2")
    features, segmenter = load_self_supervised(tmp_path / "dino"), load_sam(save_sam(tmp_path / "sam"))
    words = Vocabulary(("a cat", "a bus", "a dog"))
    config = trident.Config(prompts="name", least_area=4, least_quality=0.0, scale=1.0)
    kinds = ((features, segmenter), (features, None), (None, segmenter))
    found = [
        trident.Adapter(config, words, features=f, segmenter=s).fit(model).label(picture(40, 56)) for f, s in kinds
    ]
    assert all(one.labels.shape == (40, 56) and one.probabilities.isfinite().all() for one in found)
    assert not any(torch.equal(one.probabilities, found[0].probabilities) for one in found[1:])


def test_ip_clip(foreign, model, source, tmp_path):
    config = replace(ip_clip.mini(), authorised="day", batch_size=2, epochs=1, precision="fp32")
    predictor = ip_clip.Adapter(config).fit(model, source)
    pixels = torch.stack([evaluation_view(model, sample) for sample in source])
    batch = Batch(tuple(s.key for s in source), (pixels,), (), torch.arange(12))
    logits = predictor(batch)
    assert logits.shape == (12, 2) and logits.isfinite().all() and predictor.classes == ("bus", "cat")
    predictor.save(tmp_path / "learnt")
    again = ip_clip.read_predictor(tmp_path / "learnt", load(foreign.spec, offline=True))
    assert torch.equal(again(batch), logits)
    new = ip_clip.Adapter(replace(config, optimizer=replace(config.optimizer, lr=0.0))).fit(model, source)
    moved = [not torch.equal(a, b) for a, b in zip(*(p.projector.parameters() for p in (new, predictor)), strict=True)]
    assert all(moved)


SMALL = {
    "c_pgc": {"steps": 2, "batch_size": 3, "captions": 2, "filters": [[32], [8]], "z_dim": 4, "scales": [0.5]},
    "gama": {"steps": 2, "batch_size": 3, "width": 2, "blocks": 1, "middle": 0},
}


@pytest.mark.parametrize("slug", SMALL)
def test_attacks(foreign, model, source, slug):
    method = load_method(slug)
    change = method.Attack(override(method.mini(), SMALL[slug])).fit(model, source)
    pixels = torch.stack([evaluation_view(model, sample) for sample in source]) / 255
    moved = change.apply(pixels)
    assert 0 < (moved - pixels).abs().max() <= change.eps / 255 + 1e-6
    report = measure_attack(model, source, change, precision="fp32")
    assert_same(report.clean.embedded.images, foreign.seen(pixels))
    assert_same(report.attacked.embedded.images, foreign.seen(moved))


def test_the_audit(foreign, model, source):
    config = RobustnessConfig(eps=(0.0, 8.0), steps=2, step_size=0.5, corruptions=("jpeg",))
    found = audit(model, source, config)
    rows = {row.name: row for row in found.summary()}
    assert list(rows)[:7] == [
        "clean", "noise, eps 0", "PGD, eps 0", "noise, eps 8", "PGD, eps 8", "empty box", "wrong words",
    ]  # fmt: skip
    assert set(found.metrics) == {"image_to_text/recall@1", "text_to_image/recall@1", "zeroshot/top1"}
    assert rows["clean"].scores == rows["noise, eps 0"].scores == rows["PGD, eps 0"].scores
    for one in found.pictures:
        clean, attacked = (one.shown[name].astype(np.int64) for name in ("clean", "PGD, eps 8"))
        assert clean.shape == (model.image_policy.size,) * 2 + (3,) and 0 < np.abs(attacked - clean).max() <= 8


def test_hardening(foreign, model, source):
    objective = clip.Objective(model, clip.Config())
    pixels = torch.stack([evaluation_view(model, sample) for sample in source])
    texts = [sample.texts[0].text for sample in source]
    batch = Batch(tuple(s.key for s in source), (pixels,), (model.tokenizer(texts),), torch.arange(12))
    made = harden(objective, batch, PGDConfig(8.0, 2, 0.5), nullcontext(), seed="0").images[0]
    assert 0 < (made - pixels / 255).abs().max() <= 8 / 255 + 1e-6
    with torch.no_grad():
        loss = objective(replace(batch, images=(made,))).total
        logits = model.scale * foreign.seen(made) @ foreign.said(texts).T
    sides = [F.cross_entropy(side, torch.arange(12)) for side in (logits, logits.T)]
    torch.testing.assert_close(loss, sum(sides) / 2, rtol=1e-3, atol=1e-3)


def test_a_hardened_run_starts_from_them(foreign, source):
    plain = override(TINY, {"epochs": 1, "device": "cpu", "precision": "fp32", "model": {"start": foreign.spec}})
    hard = override(plain, {"harden": {"eps": 8.0, "steps": 1, "step_size": 1.0}})
    start = load(foreign.spec, offline=True)
    trained = [train_quietly(recipe, source, clip, seed=0)[0] for recipe in (plain, hard)]
    for one, other, before in zip(*(m.vision.parameters() for m in (*trained, start)), strict=True):
        assert one.isfinite().all() and other.isfinite().all()
        assert not torch.equal(one, before) and not torch.equal(one, other)


def test_clippings(foreign, model, source):
    images, texts = foreign.embeddings(source)
    records = embed_records(model, source)
    assert_same(records.pooled(0.5), F.normalize(images + texts, dim=-1))
    assert_same(records.pooled(0.2), F.normalize(0.2 * images + 0.8 * texts, dim=-1))
    assert_same(records.pooled(1.0), images)
