"""The command line. `diptych --help` and `diptych methods` load no torch; everything else imports its command when it is called."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from diptych.config import read_json
from diptych.errors import ConfigError, DiptychError, nearest
from diptych.methods import METHODS, Verb, load_method
from diptych.threads import thread_settings, usable_cores

COMMANDS = {
    "train": "train a model on image-text pairs: diptych train ./photos",
    "evaluate": "measure a model, every number with its interval: diptych evaluate ./photos --model runs/photos-clip",
    "embed": "embed images into a folder: diptych embed ./photos --model mini --out index",
    "search": "find images by words or by a picture: diptych search index --text 'a red cat'",
    "link": "link the records of two tables: diptych link a.csv b.csv --out links.csv",
    "cluster": "find records that are one entity: diptych cluster records.csv --out clusters.csv",
    "probe": "measure what a model's layers say, such as of a brain: diptych probe ./images --responses recordings.npz",
    "adapt": "learn a classifier beside a frozen model: diptych adapt ./photos --authorised photo --out fence",
    "attack": "how little misleads a model, and whether it misleads others: diptych attack ./photos --model runs/photos-clip --html attack.html",
    "anomaly": "score pictures of a product and show what is wrong: diptych anomaly ./photos --detector.product bottle --html found.html",
    "segment": "give every pixel one of your words: diptych segment photo.jpg --labels 'cat,dog' --html found.html",
    "doctor": "look for trouble before training: diptych doctor ./photos",
    "curate": "choose what to train on, with a reason for every pair: diptych curate ./raw --out curated",
    "rewrite": "rewrite captions with a language model: diptych rewrite ./photos --out rewritten.parquet",
    "convert": "write a model for open_clip or transformers: diptych convert runs/demo --out clip --to hf",
    "methods": "list all methods and their state",
    "reproduce": "run a paper's claim against a baseline and a control: diptych reproduce SLUG",
    "bench": "measure speed and memory beside other libraries: diptych bench train loss",
    "demo": "train on emoji from scratch in minutes, with a report",
}

_GOES_ON = {
    "train": " The run goes on with --resume.",
    "reproduce": " The same command goes on where it stopped.",
    "curate": " The same command goes on where it stopped.",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit with 0, or 1 if the doctor found errors, or 2 if something could not be used."""
    os.environ.update(thread_settings(usable_cores()))  # before torch is loaded, which reads them once
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = _run(command, rest)
        sys.stdout.flush()  # here, where a broken pipe can still be caught
    except BrokenPipeError:  # whoever read the output has gone, as in `diptych methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        code = 0
    except (DiptychError, OSError) as error:  # OSError: no space, no permission
        print(f"diptych {command}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        more = _GOES_ON.get(command, "")
        print(f"diptych {command}: stopped.{more}", file=sys.stderr)
        code = 130
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Of processes with sharded towers some one in ten was aborted by threads of torch while it ended, its work done. torchrun takes that
        # for a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    if code is not None:
        sys.exit(code)


def _run(command: str, arguments: list[str]) -> int | None:
    """Run one command; return its exit code, None for help and version, which just end."""
    if command in ("-h", "--help", "help"):
        print(usage())
        return None
    if command == "--version":
        from importlib.metadata import version

        print(version("diptych"))
        return None
    if command not in COMMANDS:
        raise ConfigError(f"There is no command {command!r}. {nearest(command, COMMANDS)}")
    run = {
        "methods": _methods,
        "train": _train,
        "doctor": _doctor,
        "evaluate": _evaluate,
        "curate": _curate,
        "probe": _probe,
        "attack": _attack,
        "adapt": _adapt,
    }.get(command)
    return run(arguments) if run else _plain(command, arguments)


def usage() -> str:
    """Return the top-level help: all commands, all methods."""
    commands = "\n".join(f"  {name:10} {help_}" for name, help_ in COMMANDS.items())
    working = ", ".join(m.slug for m in METHODS.values() if m.state != "planned")
    planned = ", ".join(m.slug for m in METHODS.values() if m.state == "planned")
    return (
        "diptych: contrastive vision-language learning, from image-text pairs to a model in use.\n\n"
        f"usage: diptych COMMAND ...   (diptych COMMAND --help explains its arguments)\n\n{commands}\n\n"
        f"methods that work: {working}\nmethods planned: {planned}\n\n"
        "First time here? `diptych demo`, then `diptych train` on a folder of images with captions."
    )


def _methods(arguments: list[str]) -> int:
    if arguments:
        print("usage: diptych methods   (no arguments): slug, verb, state, paper, title")
        return 0 if arguments[0] in ("-h", "--help") else 2
    for m in METHODS.values():
        print(f"{m.slug:24} {m.verb:10} {m.state:15} {m.paper:34} {m.title}")
    return 0


def _plain(command: str, arguments: list[str]) -> int:
    from diptych import commands

    _call(getattr(commands, command), command, arguments)
    return 0


def _probe(arguments: list[str]) -> int:
    return _call_with_settings("probe", lambda module: module.Config(), arguments)


def _attack(arguments: list[str]) -> int:
    return _call_with_settings("attack", lambda module: module.mini(), arguments)


def _adapt(arguments: list[str]) -> int:
    """Run `adapt`; of the adapters, one that learns is the default."""
    method, arguments = _take("--method", arguments)
    arguments = [*arguments, "--method", method or "ip_clip"]
    return _call_with_settings("adapter", lambda module: module.mini(), arguments, command="adapt")


def _call_with_settings(
    verb: Verb, default: Callable[[ModuleType], Any], arguments: list[str], *, command: str | None = None
) -> int:
    """Run the command of a verb; the settings of `--method` are spread over the command line."""
    import tyro

    from diptych import commands

    method, arguments = _take("--method", arguments)
    slugs = [m.slug for m in METHODS.values() if m.verb == verb and m.state != "planned"]
    settings = default(load_method(method or slugs[0], verb=verb))
    spread: Any = Annotated[type(settings), tyro.conf.arg(name="")]
    also = f"--method SLUG chooses the {verb} ({', '.join(slugs)}); these are its settings."
    command = command or verb
    run = _typed(getattr(commands, command), "settings", spread, settings, also)
    _call(run, command, arguments if method is None else [*arguments, "--method", method])
    return 0


def _evaluate(arguments: list[str]) -> int:
    """Run `evaluate`; `--json` alone prints to the output, `--json FILE` writes a file."""
    from diptych import commands

    if "--json" in arguments:
        place = arguments.index("--json")
        if place + 1 == len(arguments) or arguments[place + 1].startswith("--"):
            arguments = [*arguments[: place + 1], "-", *arguments[place + 1 :]]
    _call(commands.evaluate, "evaluate", arguments)
    return 0


def _train(arguments: list[str]) -> int:
    from diptych import commands

    _call_with_recipe(commands.train, "train", arguments)
    return 0


def _doctor(arguments: list[str]) -> int:
    from diptych import commands

    return 0 if _call_with_recipe(commands.doctor, "doctor", arguments).healthy else 1


def _curate(arguments: list[str]) -> int:
    """Run `curate`; `--config FILE` changes the steps that flags start from, and may be the curation.json of an earlier run."""
    import tyro

    from diptych import commands
    from diptych.config import override
    from diptych.curate.pipeline import CurateConfig

    path, arguments = _take("--config", arguments)
    record = read_config(Path(path)) if path else {}
    steps = override(CurateConfig(), record.get("config", record), where="steps")
    spread: Any = Annotated[CurateConfig, tyro.conf.arg(name="")]
    also = "--config FILE.json (such as the curation.json of a run) changes the defaults shown here."
    _call(_typed(commands.curate, "steps", spread, steps, also), "curate", arguments)
    return 0


def _call(function: Callable[..., Any], command: str, arguments: list[str]) -> Any:
    """Call a function with arguments from the command line."""
    import tyro

    return tyro.cli(function, prog=f"diptych {command}", args=arguments)


def _call_with_recipe(function: Callable[..., Any], command: str, arguments: list[str]) -> Any:
    """Call a function whose `recipe` is spread over the command line, with the defaults of `--method` and `--config`."""
    import tyro

    from diptych.commands import read_recipe
    from diptych.training.recipe import Recipe

    config, arguments = _take("--config", arguments)
    method, arguments = _take("--method", arguments)
    record = read_config(Path(config)) if config else {}
    default = read_recipe(record | ({"method": method} if method else {}))
    typed: Any = Recipe.__class_getitem__(load_method(default.method).Config)  # type: ignore[attr-defined]
    # What an architecture is built of is chosen in a file; on the command line its settings are plain flags, not subcommands.
    spread: Any = Annotated[typed, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]

    also = "--method SLUG chooses the method; --config FILE.json (such as the recipe.json of a run) changes the defaults shown here."
    return _call(_typed(function, "recipe", spread, default, also), command, arguments)


def _typed(function: Callable[..., Any], name: str, annotation: Any, default: Any, also: str) -> Callable[..., Any]:
    """Return a function whose parameter `name` has this annotation and default, and whose help has one sentence more."""
    import inspect

    def run(**values: Any) -> Any:
        return function(**values)

    parameters = inspect.signature(function).parameters
    first, _, rest_of_doc = (inspect.getdoc(function) or "").partition("\n\n")
    run.__doc__ = f"{first}\n\n{also}\n\n{rest_of_doc}"
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()} | {name: annotation}
    new = parameters[name].replace(default=default, annotation=annotation)
    rest = [parameter for other, parameter in parameters.items() if other != name]
    run.__signature__ = inspect.Signature([*rest, new])  # type: ignore[attr-defined]
    return run


def _take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of a flag and the arguments without it."""
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2], arguments[:place] + arguments[place + 1 :]
    return None, arguments


def read_config(path: Path) -> dict[str, Any]:
    """Return a JSON file of recipe changes, such as the recipe.json of an earlier run.

    Raises:
        ConfigError: If it is not there or not a JSON object.
    """
    record = read_json(path, "It must hold one JSON object with keys of the recipe.")
    if not isinstance(record, dict):
        raise ConfigError(f"{path} must hold one JSON object with keys of the recipe.")
    return record
