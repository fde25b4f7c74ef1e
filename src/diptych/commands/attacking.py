"""`attack`: how little it takes to mislead a model, and whether that misleads others too."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from diptych.commands.records import give_json
from diptych.commands.terminal import chosen, progress, say
from diptych.data.bundles import prompts_of
from diptych.data.sources import Columns, open_source
from diptych.evaluation.attack import AttackReport, Rewording, measure_attack, measure_words, reword
from diptych.files import write_text
from diptych.methods import load_method
from diptych.models.perturbation import LEVELS, AbstractPerturbation, check_holds_words
from diptych.models.precision import Precision
from diptych.models.weights import load
from diptych.training.prepare import hold_out
from diptych.use.attacks import render_attack, strike, strike_captions


def attack(
    source: Positional[str],
    *,
    settings: Any,
    method: str = "c_pgc",
    model: str = "auto",
    victims: tuple[str, ...] = (),
    on: tuple[str, ...] = (),
    held_out: float = 0.2,
    perturbation: Path | None = None,
    out: Path | None = None,
    html: Path | None = None,
    count: int = 8,
    columns: Columns = Columns(),
    prompts: str | None = None,
    json_out: Annotated[str | None, arg(name="json")] = None,
    precision: Precision = "auto",
    offline: bool = False,
) -> dict[str, AttackReport]:
    """Learn a change of images that misleads your model, and measure it on images it was not learnt on, beside random noise of the same size.

    A method may learn a word for captions with it, which is measured alone and with the noise, beside a random word in the same places.

    Args:
        source: Samples to learn on, with captions, labels, or both. A share of them is kept for measuring, unless `on` names others.
        settings: Of the method; its seed is also that of the split, the bootstrap and the noise.
        method: An attack; `diptych methods` lists them.
        model: White box, anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        victims: Other models to measure, which were not looked at.
        on: Samples to measure on, all others than those learnt on; a part of the source when absent.
        held_out: Share of the source that is kept for measuring.
        perturbation: File of an earlier attack, or of others (.npy, .safetensors, a picture for a noise), instead of learning one. The whole source
            is then measured on; eps is the file's, and of the settings only the seed counts.
        out: File for what was learnt: .safetensors, and for a noise without a word also .npy or .png.
        html: Page with numbers, pictures and, with a word, captions.
        count: Of each on the page.
        columns: What the columns of a table mean.
        prompts: Prompt file for zero-shot; chosen by the data set when absent.
        json_out: File to write the numbers to as JSON; `-`, or no file, for the output.
        precision: Of the towers while measuring; gradients are always fp32.
        offline: Never touch the network.
    """
    module, spec, seed = load_method(method, verb="attack"), chosen(model), settings.seed
    samples = kept = open_source(source, columns=columns)
    if out is not None and perturbation is None and getattr(settings, "word", False):
        check_holds_words(out)  # before anything is learnt
    encoder = load(spec, offline=offline)
    if perturbation is None:
        if not on:
            samples, kept = hold_out(samples, held_out, seed)
        say(f"Learning from {len(samples):,} samples of {source}: {method} against {spec}.")
        found = module.Attack(settings).fit(encoder, samples)
        known = {"method": method, "model": spec, "learnt on": samples.name, **vars(settings)}
    else:
        found = module.read(perturbation)
        known = {"perturbation": perturbation, "eps": found.eps}
    if out is not None:
        found.save(out)
        say(f"The perturbation is in {out}.")
    sources = [open_source(other, columns=columns) for other in on] or [kept]
    measure = partial(measure_attack, perturbation=found, seed=seed, progress=progress, precision=precision)
    reports: dict[str, AttackReport] = {}
    rewordings: dict[tuple[str, ...], Rewording] = {}
    for victim in dict.fromkeys((spec, *victims)):
        attacked = encoder if victim == spec else load(victim, offline=offline)
        for data in sources:
            title = f"{victim} on {data.name}"
            reports[title] = measure(attacked, data, prompts=prompts or prompts_of(data.name), name=victim)
            captions = reports[title].clean.embedded.captions
            if found.word is not None and captions:
                if captions not in rewordings:
                    rewordings[captions] = reword(encoder, captions, found.word, seed=seed)
                more = measure_words(attacked, reports[title], rewordings[captions])
                reports |= {f"{title}, {what}": one for what, one in more.items()}
    if found.word is not None:
        say(f"The word is {found.word.word!r}." + ("" if rewordings else " There are no captions to put it into."))
    _show(reports)
    if html is not None:
        title, first = next(iter(reports.items()))
        rewording, shown = rewordings.get(first.clean.embedded.captions), {"count": count, "seed": seed}
        text = render_attack(
            list(reports.items()),
            strike(encoder, sources[0], first, found, **shown),
            [] if rewording is None else strike_captions(reports[f"{title}, word"], rewording, **shown),
            title=f"Attack on {spec}",
            lead=_lead(found, worded=bool(rewordings)),
            settings=[(name, str(value)) for name, value in known.items()],
        )
        write_text(html, text)
        say(f"Numbers and pictures are in {html}.")
    give_json({name: report.to_json() for name, report in reports.items()}, json_out)
    return reports


def _show(reports: Mapping[str, AttackReport]) -> None:
    """Say what was measured."""
    for name, report in reports.items():
        say(f"{name}, eps {report.eps:g}/{LEVELS}:")
        for line in report.lines():
            say(f"  {line}")


def _lead(found: AbstractPerturbation, *, worded: bool) -> str:
    """Return the sentences on top of the page; `worded` says whether the word could be put into captions."""
    word = f", and one word of a caption becomes {found.word.word!r}" if worded and found.word is not None else ""
    return (
        f"No channel of a pixel moves by more than {found.eps:g} of {LEVELS} levels{word}. Lost is the share of right answers that are wrong "
        "afterwards; a random change of the same size stands beside it. Intervals are of 95 %."
    )
