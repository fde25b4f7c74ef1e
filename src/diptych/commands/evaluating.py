"""`evaluate`: what a model can do, with intervals."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from diptych.commands.records import give_json
from diptych.commands.terminal import chosen, progress, say
from diptych.data.bundles import prompts_of
from diptych.data.sources import Columns, open_source
from diptych.errors import ConfigError
from diptych.evaluation.languages import evaluate_languages
from diptych.evaluation.robustness import Audit, RobustnessConfig, audit, compare_audits
from diptych.evaluation.run import Evaluation, Task, compare, compare_details, evaluate_model
from diptych.files import write_text
from diptych.models.memory import remembered
from diptych.models.precision import Precision
from diptych.models.weights import load
from diptych.types import Interval
from diptych.use.audit import audit_markdown, audit_page


def evaluate(
    source: Positional[str],
    *,
    model: str = "auto",
    against: str | None = None,
    tasks: tuple[Task | Literal["robustness"], ...] | None = None,
    prompts: str | None = None,
    language: str | None = None,
    languages: tuple[str, ...] = (),
    probe_on: str | None = None,
    robustness: RobustnessConfig = RobustnessConfig(),
    card: Path | None = None,
    columns: Columns = Columns(),
    json_out: Annotated[str | None, arg(name="json")] = None,
    batch_size: int = 64,
    precision: Precision = "auto",
    seed: int = 0,
    offline: bool = False,
) -> Evaluation:
    """Measure a model on samples, every number with its 95 % interval.

    Args:
        source: Samples with captions (retrieval), labels (zero-shot classification), or both.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        against: A second model, measured on the same samples; the paired differences (model minus against) are printed, and stand on the card.
        tasks: What to measure; retrieval and zero-shot as far as the samples allow when absent. `robustness` also measures them on changed images.
        prompts: Prompt file for zero-shot (photo, overhead, style, name); chosen by the data set when absent.
        language: Measure retrieval with texts of this language (ISO 639-1) instead of the captions.
        languages: Also print retrieval in each of these languages, `all` for all that the samples have.
        probe_on: Training samples for a linear probe and nearest neighbours on frozen image embeddings.
        robustness: What is done to the images for the task `robustness`.
        card: File for the audit card of the task `robustness`: .html with pictures, or .md.
        columns: What the columns of a table mean.
        json_out: File to write the numbers to as JSON; `-`, or no file, for the output.
        batch_size: Images per forward pass.
        precision: Of the towers; `auto` takes bf16 where the processor has it. The record says which it was.
        seed: Of the bootstrap.
        offline: Never touch the network.
    """
    audited, measured = _split_tasks(tasks)
    _check_card(card, audited)
    samples = open_source(source, columns=columns)
    for sentence in samples.notes:
        say(sentence)
    prompts = prompts or prompts_of(samples.name)
    measure = partial(
        evaluate_model,
        source=samples,
        tasks=measured,
        probe_source=None if probe_on is None else open_source(probe_on, columns=columns),
        prompts=prompts,
        language=language,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        precision=precision,
    )
    withstand = partial(
        audit,
        source=samples,
        config=robustness,
        tasks=measured,
        prompts=prompts,
        language=language,
        batch_size=batch_size,
        progress=progress,
    )
    model = chosen(model)
    encoder = load(model, offline=offline).requires_grad_(False)  # nothing is trained, so both measurements may share
    with remembered(encoder, samples) as memory:
        found = measure(encoder, name=model, memory=memory if languages else None)
        print_metrics(found)
        named = None if languages == ("all",) else languages
        table = languages and evaluate_languages(
            encoder, samples, named, batch_size=batch_size, seed=seed, memory=memory, precision=precision
        )
    record = found.to_json()
    withstood = withstand(encoder, name=model) if audited else None
    other = None
    if against is not None:
        rival = load(against, offline=offline).requires_grad_(False)
        rivals = measure(rival, name=against)
        differences = compare(rivals, found, seed=seed) | compare_details(rivals, found, seed=seed)
        record["difference"] = _plain(differences)
        _show_differences(differences, f"{model} minus {against}, paired over the same items:")
        other = withstand(rival, name=against) if audited else None
    if withstood is not None:
        record["robustness"] = _show_audit(withstood, other, card)
    if table:
        record["languages"] = table.to_json()
        for line in table.lines():
            say(line)
    give_json(record, json_out)
    return found


def _split_tasks(tasks: tuple[Task | Literal["robustness"], ...] | None) -> tuple[bool, tuple[Task, ...] | None]:
    """Return whether robustness is asked for, and the other tasks; None of those lets the samples decide."""
    return "robustness" in (tasks or ()), tuple(task for task in tasks or () if task != "robustness") or None


def _check_card(card: Path | None, audited: bool) -> None:
    if card is not None and (not audited or card.suffix not in (".html", ".md")):
        raise ConfigError(
            f"The card is an .html or .md file of --tasks robustness, not {card}. Name such a file, and that task."
        )


def _show_audit(found: Audit, against: Audit | None, card: Path | None) -> dict[str, Any]:
    """Say what an audit found, beside that of another model if there is one, write its card if one is asked for, and return its record."""
    record = found.to_json()
    for line in found.lines():
        say(line)
    if against is not None:
        names, differences = (
            f"{found.settings['model']} minus {against.settings['model']}",
            compare_audits(against, found),
        )
        for metric, values in differences.items():
            _show_differences(values, f"{names}, {metric}, each attacked for itself, paired over the same items:")
        record["difference"] = {metric: _plain(values) for metric, values in differences.items()}
    if card is not None:
        write_text(card, (audit_page if card.suffix == ".html" else audit_markdown)(found, against))
        say(f"The audit card is {card}.")
    return record


def _plain(differences: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: value.to_json() for name, value in differences.items()}


def _show_differences(differences: Mapping[str, Interval], title: str) -> None:
    """Say how two models differ, and where that is more than chance."""
    say(title)
    for name, value in differences.items():
        verdict = "differs" if value.low > 0 or value.high < 0 else "no difference shown"
        say(f"  {name:32} {value.signed()}  {verdict}")


def print_metrics(evaluation: Evaluation) -> None:
    """Say every number beside what it would be by guessing, and what the reader must know about them."""
    for name, value in (evaluation.headline() | evaluation.details()).items():
        say(f"  {name:32} {value}  by guessing {evaluation.chance(name):.3f}")
    for note in evaluation.notes:
        say(f"  {note}")
