"""AnoVL: the official numbers, closed forms, and what it does on towers of several kinds."""

import hashlib
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from by_hand import doubles
from diptych.claims.claim import Trial
from diptych.claims.reproduce import check
from diptych.errors import ConfigError
from diptych.evaluation.zeroshot import anchors_of, mean_anchor
from diptych.methods import anovl, load_method
from diptych.methods.anovl import (
    Adapter,
    Config,
    Detector,
    NoiseAdapter,
    adapt,
    adaptation_loss,
    anomaly_map,
    claim,
    cosines,
    prompts,
    templates,
)
from diptych.models.dense import EmbeddedPatches, embedded_patches, local_output
from diptych.models.tiles import Tiles, upsampled
from diptych.models.weights import convert, load
from diptych.types import Batch

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def batch(images: torch.Tensor) -> Batch:
    n = len(images)
    return Batch(tuple(map(str, range(n))), (images,), (), torch.arange(n))


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# --- prompts ---


@pytest.mark.parametrize("case", ["anchors", "anchors_texture"])
def test_the_official_prompts_and_anchors(golden, case):
    numbers = golden("anovl", case)
    kind = "texture" if case.endswith("texture") else "object"
    said = prompts(Config(product=str(numbers["object_name"]), kind=kind))
    for texts, state in zip(said, ("normal", "abnormal"), strict=True):
        assert len(texts) == len(set(texts)) == 462
        digest = hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()
        assert digest == str(numbers[f"prompts_sha256_sorted_{state}"])
    for anchor, embeddings in zip(numbers["anchors"], numbers["prompt_embeds"], strict=True):
        found = mean_anchor(torch.from_numpy(embeddings).double())
        torch.testing.assert_close(found, torch.from_numpy(anchor), **EXACT)


def test_prompts_of_other_fields_and_bare_ones():
    assert templates("x-ray image")[1] == "a cropped x-ray image of a {}" and len(templates("x-ray image")) == 22
    normal, abnormal = prompts(Config(product="lung", wordings=("x-ray image",)))
    assert len(normal) == 154 and "an x-ray image of the small lung without flaw" not in normal
    assert (
        "a x-ray image of the small lung without flaw" in normal and "a dark x-ray image of a damaged lung" in abnormal
    )
    assert prompts(Config(product="pear", prompts="bare")) == (("pear",), ("broken pear",))


def test_anchors_of_a_model_are_means_over_all_prompts(make_model):
    model = make_model()
    config = Config(product="pear", wordings=("photo",))
    anchors = anchors_of(model, *prompts(config))
    assert anchors.shape == (2, 8) and not anchors.is_inference()
    with torch.no_grad():
        raw = [model.text_head(model.text_output(model.tokenizer([text])))[0] for text in prompts(config)[1]]
    torch.testing.assert_close(anchors[1], F.normalize(torch.stack(raw).mean(0), dim=-1), rtol=1e-4, atol=1e-5)


# --- scores, maps, adaptation ---


def test_the_official_image_score(golden):
    case = doubles(golden("anovl", "score"))
    found = cosines(case["pooled_all_tokens"][:, 0], case["anchors"]).softmax(-1)[:, 1].mean()
    torch.testing.assert_close(found, case["image_score"], **EXACT)


def test_the_official_loss(golden):
    case = doubles(golden("anovl", "loss"))
    probabilities = case["probs"].requires_grad_()
    clean, corrupted = probabilities.log().movedim(-1, 1)
    loss = adaptation_loss(clean, corrupted)
    torch.testing.assert_close(loss, case["loss"], **EXACT)
    (grad,) = torch.autograd.grad(loss, probabilities)
    torch.testing.assert_close(grad, case["grad_probs"], **EXACT)


def test_the_official_adaptation_of_two_images(golden):
    """The optimiser goes on from the first image to the second, as it does officially."""
    shared = doubles(golden("anovl", "tta"))
    tiles, grid, anchors = Tiles(12, 15), (4, 4), shared["anchors"]
    adapter = NoiseAdapter(8, 0.5).double()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3, weight_decay=0.01)
    for name in ("tta.image0", "tta.image1"):
        case = doubles(golden("anovl", name))
        with torch.no_grad():
            adapter.linear.weight.copy_(case["weight_init"])
            adapter.linear.bias.copy_(case["bias_init"])
        plain = cosines(case["tokens"], anchors).softmax(-1)[..., 1]
        torch.testing.assert_close(plain, case["grid_no_adapter"].flatten(1), **EXACT)
        torch.testing.assert_close(anomaly_map(plain, grid, tiles), case["map_no_adapter"][0, 0], **EXACT)
        losses = []
        for step, noise in enumerate(case["noise"].flatten(2, 3)):
            losses += adapt(
                adapter, optimizer, case["tokens"], [noise], lambda p: upsampled(cosines(p, anchors), grid, tiles)
            )
            torch.testing.assert_close(adapter.linear.weight.grad, case["weight_grad"][step], **EXACT)
            torch.testing.assert_close(adapter.linear.weight.detach(), case["weight_after"][step], **EXACT)
            torch.testing.assert_close(adapter.linear.bias.detach(), case["bias_after"][step], **EXACT)
        torch.testing.assert_close(torch.tensor(losses).double(), case["losses"], rtol=1e-6, atol=1e-6)
        with torch.no_grad():
            adapted = cosines(adapter(case["tokens"]), anchors).softmax(-1)[..., 1]
        torch.testing.assert_close(adapted, case["grid_adapted"].flatten(1), **EXACT)
        torch.testing.assert_close(anomaly_map(adapted, grid, tiles), case["map_adapted"][0, 0], **EXACT)


def test_equal_anchors_say_nothing():
    even = torch.full((2, 3, 4), 0.5).log()
    assert float(adaptation_loss(even, even)) == pytest.approx(2 * math.log(2))
    assert float(adaptation_loss(even, even, hard_weight=0)) == pytest.approx(math.log(2))
    same = F.normalize(torch.ones(2, 8), dim=-1)
    found = Detector(fixed(torch.randn(1, 4, 8), (2, 2)), same, Config(steps=0), 1.0)(batch(pictures(1, 3, 6, 6)))
    assert torch.allclose(found.maps, torch.full((1, 6, 6), 0.5)) and float(found.scores) == pytest.approx(0.5)


def test_an_adapter_of_zeros_changes_no_cosine():
    adapter, patches, anchors = NoiseAdapter(8, 0.5), torch.randn(2, 4, 8), F.normalize(torch.randn(2, 8), dim=-1)
    for parameter in adapter.parameters():
        torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(adapter(patches), 0.5 * patches)
    torch.testing.assert_close(cosines(adapter(patches), anchors), cosines(patches, anchors))


def test_maps_are_smoothed_then_resized_between_the_corners():
    grid = torch.tensor([[[0.0, 0.0, 0.9], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]).flatten(1)
    found = anomaly_map(grid, (3, 3), Tiles(5, 5))
    assert float(found[0, 4]) == pytest.approx(0.9 * 4 / 9)  # its corner is repeated: four of nine
    assert float(found[2, 2]) == pytest.approx(0.1) and float(found[4, 0]) == 0
    assert float(found[1, 4]) == pytest.approx((found[0, 4] + found[2, 4]) / 2)


def fixed(patches: torch.Tensor, grid: tuple[int, int]):
    """Return a tower that sees the same patches whatever it looks at."""
    return lambda images: EmbeddedPatches(
        patches.expand(len(images), -1, -1), patches.mean(1).expand(len(images), -1), grid
    )


def test_swapped_anchors_turn_maps_round():
    anchors, patches = F.normalize(torch.randn(2, 8), dim=-1), torch.randn(1, 9, 8)
    found = [
        Detector(fixed(patches, (3, 3)), a, Config(steps=0), 1.0)(batch(pictures(1, 3, 6, 6)))
        for a in (anchors, anchors.flip(0))
    ]
    torch.testing.assert_close(found[0].maps, 1 - found[1].maps)
    torch.testing.assert_close(found[0].scores, 1 - found[1].scores)


def test_adaptation_lowers_the_loss_and_depends_on_nothing_but_the_image(make_model):
    model, images = make_model(), pictures(2, 3, 16, 16)

    def told(steps: int, **changes) -> Detector:  # those of a random text tower hardly differ
        anchors = F.normalize(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
        return Detector(
            lambda x: embedded_patches(model, x, "local"), anchors, Config(steps=steps, lr=0.05, **changes), 1.0
        )

    detector = told(5)
    both, second = detector(batch(images)), detector(batch(images[1:]))
    assert torch.equal(both.maps[1], second.maps[0])  # adapter, noise and moments begin anew
    plain = told(0)(batch(images))
    assert not torch.allclose(both.maps, plain.maps)
    torch.testing.assert_close(both.scores, plain.scores)  # the pooled vector is not adapted
    carried = told(5, carry_optimizer_state=True)
    assert not torch.equal(carried(batch(images)).maps[1], second.maps[0])
    anchors, patches = detector.anchors, embedded_patches(model, images[:1], "local").patches
    adapter = NoiseAdapter(8, 0.5)
    adapter.reset(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.05)
    losses = adapt(
        adapter,
        optimizer,
        patches,
        [torch.zeros_like(patches)] * 20,
        lambda p: upsampled(cosines(p, anchors), (2, 2), Tiles(16, 16)),
    )
    assert losses[-1] < losses[0]


def test_an_adapter_that_is_zero_and_never_learns_gives_the_map_without(make_model, monkeypatch):
    monkeypatch.setattr(
        NoiseAdapter, "reset", lambda self, generator: [torch.nn.init.zeros_(p) for p in self.parameters()]
    )
    model, images = make_model(), pictures(1, 3, 16, 16)
    plain, idle = (
        Adapter(Config(product="pear", steps=steps, lr=0.0)).fit(model)(batch(images)).maps for steps in (0, 5)
    )
    torch.testing.assert_close(plain, idle)


def test_ordinary_tokens_are_those_of_the_tower(make_model):
    """The second stream off: the map is that of the tower's own attention."""
    model, images = make_model(), pictures(2, 3, 16, 16)
    found = Adapter(Config(product="pear", tokens="ordinary", steps=0)).fit(model)(batch(images))
    with torch.no_grad():
        output = model.vision(model.pixels(images))
        patches = model.image_head.linear(output.tokens)
        own = cosines(patches, anchors_of(model, *prompts(Config(product="pear")))).softmax(-1)[..., 1]
        expected = torch.stack([anomaly_map(q[None], (2, 2), Tiles(16, 16)) for q in own])
    torch.testing.assert_close(found.maps, expected)
    local = embedded_patches(model, images, "local")
    torch.testing.assert_close(local.pooled, embedded_patches(model, images, "ordinary").pooled)
    assert not torch.allclose(local.patches, patches)
    with torch.no_grad():
        torch.testing.assert_close(
            local.patches, model.image_head.linear(local_output(model.vision, model.pixels(images)).tokens)
        )


def test_wide_and_upright_images(make_model):
    detector = Adapter(Config(product="pear", steps=2)).fit(make_model())
    wide, upright = pictures(1, 3, 16, 25), pictures(1, 3, 40, 16)
    assert detector(batch(wide)).maps.shape == (1, 16, 25) and detector(batch(upright)).maps.shape == (1, 40, 16)
    plain = Adapter(Config(product="pear", steps=0)).fit(make_model())
    left, right = (plain(batch(wide[..., x : x + 16])) for x in (0, 9))
    torch.testing.assert_close(plain(batch(wide)).scores, (left.scores + right.scores) / 2)
    torch.testing.assert_close(plain(batch(wide)).maps[..., :9], left.maps[..., :9])


@pytest.mark.parametrize("kind", ["siglip", "efficientnet"])
def test_other_kinds_of_towers(make_model, kind):
    from diptych.models.foreign import TimmConfig, TimmTower
    from diptych.models.heads import LinearHead, LinearHeadConfig
    from diptych.models.vision import VisionConfig, VisionTransformer

    model, images = make_model(), pictures(1, 3, 64, 64)
    torch.manual_seed(0)
    if kind == "siglip":
        model.vision = VisionTransformer(
            VisionConfig(
                image_size=64,
                patch_size=16,
                width=16,
                depth=2,
                heads=2,
                mlp_width=24,
                pool="attention",
                norm_before=False,
            )
        )
    else:
        model.vision = TimmTower(TimmConfig("tf_efficientnet_lite0"))
        model.image_head = LinearHead(model.vision.width, LinearHeadConfig(8))
        with pytest.raises(ConfigError, match="needs the attention of a vision transformer"):
            Adapter(Config(product="pear", tokens="local")).fit(model)(batch(images))
    found = Adapter(Config(product="pear")).fit(model)(batch(images))
    tokens = "local" if kind == "siglip" else "ordinary"
    assert torch.equal(found.maps, Adapter(Config(product="pear", tokens=tokens)).fit(model)(batch(images)).maps)
    assert found.maps.shape == (1, 64, 64) and bool(((found.maps > 0) & (found.maps < 1)).all())


@pytest.mark.parametrize(("to", "prefix"), [("open_clip", "open_clip"), ("hf", "hf")])
def test_models_of_other_libraries_give_the_same_maps(make_model, tmp_path, to, prefix):
    """A model that went through the files of another library, attention and all."""
    model, images = make_model(), pictures(1, 3, 16, 24)
    convert(model, tmp_path / "theirs", to)
    theirs = load(f"{prefix}:{tmp_path / 'theirs'}", offline=True)
    maps = [Adapter(Config(product="pear", steps=2, scale=1e4)).fit(one)(batch(images)).maps for one in (model, theirs)]
    torch.testing.assert_close(maps[0].logit(), maps[1].logit(), rtol=1e-2, atol=1e-2)


def test_scale_spreads_probabilities(make_model):
    patches, anchors = torch.randn(1, 4, 8), F.normalize(torch.randn(2, 8), dim=-1)
    narrow, wide = (
        Detector(fixed(patches, (2, 2)), anchors, Config(steps=0), scale)(batch(pictures(1, 3, 6, 6))).scores
        for scale in (1.0, 5.0)
    )
    torch.testing.assert_close(wide.logit(), 5 * narrow.logit())
    model = make_model()
    assert Adapter(Config(product="pear", scale=None)).fit(model).scale == pytest.approx(float(model.scale.detach()))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"product": " "}, "one of them is empty"),
        ({"wordings": ()}, "one of them is empty"),
        ({"noise": math.nan}, "steps and noise must be >= 0"),
        ({"mix": 1.5}, "mix in \\[0, 1\\]"),
        ({"scale": 0.0}, "scale must be > 0"),
    ],
)
def test_bad_settings(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        replace(Config(), **changes)


def test_the_papers_values_are_the_defaults():
    config = Config()
    assert (
        config.steps,
        config.lr,
        config.weight_decay,
        config.noise,
        config.mix,
        config.hard_weight,
        config.scale,
    ) == (5, 1e-3, 0.01, 0.055, 0.5, 0.5, 1.0)


class TestClaims:
    def test_they_are_well_formed(self):
        found = claim()
        assert [one.name for one in found] == ["stream", "pooled", "prompts", "adaptation"]
        check(found, "anovl")

    def test_controls_are_judged(self):
        stream, _, prompted, _ = (one.control.passed for one in claim())
        numbers = {"baseline": [0.5, 0.5, 0.5], "method": [0.7, 0.7, 0.7], "control": [0.51, 0.49, 0.5]}
        assert stream(numbers) and prompted(numbers)
        other = numbers | {"control": [0.65, 0.65, 0.65]}
        assert not stream(other) and not prompted(other)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["stream", "pooled", "prompts", "adaptation"])
    def test_every_arm_runs(self, name, monkeypatch):
        monkeypatch.setattr("diptych.methods.anovl._COUNT", 96)
        monkeypatch.setattr("diptych.methods.anovl._TESTED", 48)
        for drawn in (anovl._drawings, anovl._tested):
            drawn.cache_clear()
        (one,) = (one for one in claim() if one.name == name)
        trained, noted = [], []

        def train(settings, source, *, shared):
            from diptych.claims.train import train_quietly

            assert shared
            settings = replace(settings, epochs=1, data=replace(settings.data, batch_size=48))
            if not trained:
                trained.append((settings, source, train_quietly(settings, source, load_method("clip"), seed=0)[0]))
            assert (settings, source) == trained[0][:2]  # so all arms can share one model
            return trained[0][2]

        values = {}
        for arm in one.arms:
            trial = Trial(0, "test", {}, lambda slug: load_method(slug).mini(), train, note=lambda *n: noted.append(n))
            values[arm.name] = arm.run(trial)
        assert all(0 <= value <= 1 for value in values.values()) and len(set(values.values())) == len(values)
        assert {name for name, _ in noted} == {"image_auroc", "image_ap", "pixel_auroc", "aupro"}
        if name == "stream":  # exchanged anchors turn every comparison round
            plain, exchanged = values["tokens of the second stream"], one.arms[3].name
            assert values[exchanged] == pytest.approx(1 - plain, abs=1e-3)
        for drawn in (anovl._drawings, anovl._tested):
            drawn.cache_clear()


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "anovl.py"), run_name="__main__")
    assert "local tokens: image_auroc" in capsys.readouterr().out
    assert (tmp_path / "runs" / "anovl.html").read_text().count("data:image/webp") == 48
