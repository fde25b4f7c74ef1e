"""`probe`: what a model's layers say, beside what something else says."""

from dataclasses import asdict
from typing import Annotated, Any

from tyro.conf import Positional, arg

from diptych.commands.records import give_json
from diptych.commands.terminal import chosen, say
from diptych.data.sources import Columns, open_source
from diptych.methods import load_method
from diptych.models.weights import load
from diptych.types import Report


def probe(
    source: Positional[str],
    *,
    settings: Any,
    method: str = "brain_encoding",
    model: str = "auto",
    columns: Columns = Columns(),
    json_out: Annotated[str | None, arg(name="json")] = None,
    offline: bool = False,
) -> Report:
    """Measure a property of a model's layers, every number with its 95 % interval.

    Args:
        source: Samples, in the order in which they were shown.
        settings: Of the method.
        method: A probe; `diptych methods` lists them.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        columns: What the columns of a table mean.
        json_out: File to write the numbers to as JSON; `-` for the output.
        offline: Never touch the network.
    """
    asks = load_method(method, verb="probe").Probe(settings)
    report: Report = asks.measure(load(chosen(model), offline=offline), open_source(source, columns=columns))
    say(report.title)
    for name, value in report.metrics.items():
        say(f"  {name:44} {value}")
    for note in report.notes:
        say(f"  {note}")
    record = asdict(report)
    give_json(record, json_out)
    return report
