"""What a user can do: one function per command of the command line, with the same name and the same arguments.

Each is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.commands.adapting import adapt as adapt
    from diptych.commands.attacking import attack as attack
    from diptych.commands.benching import bench as bench
    from diptych.commands.curating import curate as curate
    from diptych.commands.curating import rewrite as rewrite
    from diptych.commands.evaluating import evaluate as evaluate
    from diptych.commands.inspecting import anomaly as anomaly
    from diptych.commands.linking import cluster as cluster
    from diptych.commands.linking import link as link
    from diptych.commands.probing import probe as probe
    from diptych.commands.reproducing import reproduce as reproduce
    from diptych.commands.segmenting import segment as segment
    from diptych.commands.training import TrainedRun as TrainedRun
    from diptych.commands.training import demo as demo
    from diptych.commands.training import doctor as doctor
    from diptych.commands.training import read_recipe as read_recipe
    from diptych.commands.training import train as train
    from diptych.commands.using import convert as convert
    from diptych.commands.using import embed as embed
    from diptych.commands.using import search as search

_HOME = {
    "adapting": ("adapt",),
    "attacking": ("attack",),
    "benching": ("bench",),
    "curating": ("curate", "rewrite"),
    "evaluating": ("evaluate",),
    "inspecting": ("anomaly",),
    "linking": ("cluster", "link"),
    "probing": ("probe",),
    "reproducing": ("reproduce",),
    "segmenting": ("segment",),
    "training": ("TrainedRun", "demo", "doctor", "read_recipe", "train"),
    "using": ("convert", "embed", "search"),
}

__all__ = sorted(name for names in _HOME.values() for name in names)


def __getattr__(name: str) -> Any:
    """Import a command when it is first used."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(import_module(f"diptych.commands.{module}"), name)
    raise AttributeError(f"module 'diptych.commands' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the commands."""
    return __all__
