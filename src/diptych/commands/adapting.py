"""`adapt`: a classifier that is learnt beside a trained model, whose towers stay as they are."""

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from diptych.commands.terminal import chosen, progress, say
from diptych.data.bundles import prompts_of
from diptych.data.sources import Columns, open_source
from diptych.errors import ConfigError
from diptych.evaluation.classifier import Classifier, measure_classifier
from diptych.methods import load_method
from diptych.models.weights import load
from diptych.training.prepare import hold_out
from diptych.types import Report


def adapt(
    source: Positional[str],
    *,
    settings: Any,
    method: str = "ip_clip",
    model: str = "auto",
    out: Path,
    evaluate_on: str | None = None,
    held_out: float = 0.2,
    columns: Columns = Columns(),
    offline: bool = False,
) -> Report:
    """Learn a classifier beside a trained model, save it, and measure it beside the model's own zero-shot prompts, with 95 % intervals.

    Args:
        source: Labelled samples; domains where the method asks for them.
        settings: Of the method.
        method: An adapter that learns; `diptych methods` lists adapters.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        out: Folder for what was learnt, without the model.
        evaluate_on: Samples for measuring; a share of `source` that is not learnt on when absent.
        held_out: That share.
        columns: What the columns of a table mean.
        offline: Never touch the network.

    Raises:
        ConfigError: If the method makes no classifier that could be saved.
    """
    adapter = load_method(method, verb="adapter").Adapter(settings)
    samples = open_source(source, columns=columns)
    for note in samples.notes:
        say(note)
    training, held = (
        hold_out(samples, held_out, seed=0)
        if evaluate_on is None
        else (samples, open_source(evaluate_on, columns=columns))
    )
    encoder = load(chosen(model), offline=offline)
    say(f"Learning from {len(training):,} samples of {source} with {method}.")
    predictor = adapter.fit(encoder, training)
    if not isinstance(predictor, Classifier):
        raise ConfigError(
            f"What {method} makes is no classifier that could be saved and measured. See the page of the method for its own command."
        )
    predictor.save(out)
    say(f"What was learnt is in {out}; it is read with `diptych.methods.{method}.read_predictor`.")
    with progress("measuring", len(held)) as advance:
        report = measure_classifier(predictor, encoder, held, prompts=prompts_of(held.name), advance=advance)
    say(f"{report.title}, {report.settings['samples']:,} samples that were not learnt on:")
    for name, value in report.metrics.items():
        say(f"  {name:40} {value}")
    for note in report.notes:
        say(f"  {note}")
    return report
