"""`attack`: how little it takes to mislead a model, and whether that misleads others too."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from diptych.commands.records import give_json
from diptych.commands.terminal import chosen, progress, say
from diptych.data.bundles import prompts_of
from diptych.data.sources import Columns, open_source
from diptych.evaluation.attack import AttackReport, measure_attack
from diptych.files import write_text
from diptych.methods import load_method
from diptych.models.perturbation import LEVELS
from diptych.models.precision import Precision
from diptych.models.weights import load
from diptych.training.prepare import hold_out
from diptych.use.attacks import render_attack, strike


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
        out: File for what was learnt: .safetensors, and for a noise also .npy or .png.
        html: Page with numbers and pictures.
        count: Pictures on the page.
        columns: What the columns of a table mean.
        prompts: Prompt file for zero-shot; chosen by the data set when absent.
        json_out: File to write the numbers to as JSON; `-`, or no file, for the output.
        precision: Of the towers while measuring; gradients are always fp32.
        offline: Never touch the network.
    """
    module, spec, seed = load_method(method, verb="attack"), chosen(model), settings.seed
    samples = kept = open_source(source, columns=columns)
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
    measured = [open_source(other, columns=columns) for other in on] or [kept]
    reports = {
        f"{victim} on {data.name}": measure_attack(
            encoder if victim == spec else load(victim, offline=offline),
            data,
            found,
            prompts=prompts or prompts_of(data.name),
            seed=seed,
            progress=progress,
            name=victim,
            precision=precision,
        )
        for victim in dict.fromkeys((spec, *victims))
        for data in measured
    }
    for name, report in reports.items():
        say(f"{name}, eps {report.eps:g}/{LEVELS}:")
        for line in report.lines():
            say(f"  {line}")
    if html is not None:
        first = next(iter(reports.values()))
        text = render_attack(
            list(reports.items()),
            strike(encoder, measured[0], first, found, count=count, seed=seed),
            title=f"Attack on {spec}",
            lead=f"No channel of a pixel moves by more than {found.eps:g} of {LEVELS} levels. Lost is the share of right answers that are wrong "
            "afterwards; random noise of the same size stands beside it. Intervals are of 95 %.",
            settings=[(name, str(value)) for name, value in known.items()],
        )
        write_text(html, text)
        say(f"Numbers and pictures are in {html}.")
    record = {name: report.to_json() for name, report in reports.items()}
    give_json(record, json_out)
    return reports
