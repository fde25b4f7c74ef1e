"""`train`, `doctor`, `demo`: from samples to a run directory."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tyro.conf import Positional

from diptych.claims.arms import compare
from diptych.claims.ledger import read_results
from diptych.commands.evaluating import print_metrics
from diptych.commands.guarding import MIX, conclude, guarding, look
from diptych.commands.records import versions, write_json
from diptych.commands.reporting import report, summarise
from diptych.commands.terminal import CONSOLE, advancing, progress, say
from diptych.config import fingerprint, override, to_json
from diptych.data.bundles import prompts_of
from diptych.data.loader import Loader
from diptych.data.openmoji import glyphs
from diptych.data.sources import AbstractSource, Columns, describe, open_source
from diptych.errors import CheckpointError, ConfigError, DataError
from diptych.evaluation.run import Evaluation, evaluate_model
from diptych.methods import clip, load_method
from diptych.models.dual import DualEncoder
from diptych.models.memory import remembered
from diptych.models.weights import CHECKPOINT
from diptych.training import distributed
from diptych.training.doctor import Diagnosis, Finding, examine_source, examine_training
from diptych.training.loop import fit
from diptych.training.prepare import choose_device, choose_start, hold_out, make_loader, make_model
from diptych.training.recipe import Recipe
from diptych.use.report import RunSummary
from diptych.verbs import AbstractObjective


@dataclass(frozen=True)
class TrainedRun:
    """What a training run leaves behind.

    Attributes:
        folder: The run directory: checkpoint, recipe.json, metrics.jsonl, metrics.json, report.html.
        model: With its final weights, in eval mode.
        evaluation: On the held-out samples.
        summary: What report.html shows.
    """

    folder: Path
    model: DualEncoder
    evaluation: Evaluation
    summary: RunSummary


def train(
    source: Positional[str],
    *,
    recipe: Recipe[Any] | None = None,
    out: Path | None = None,
    evaluate_on: str | None = None,
    columns: Columns = Columns(),
    guard: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    check: bool = True,
    offline: bool = False,
) -> TrainedRun:
    """Train a model on image-text pairs, evaluate it on held-out ones, and write a run directory with a report.

    Args:
        source: Training samples: a folder, a csv, tsv, jsonl, parquet or tar file, or a name (see the page on data formats).
        recipe: All settings; the default recipe of CLIP when absent.
        out: Run directory; `runs/<source>-<method>` when absent.
        evaluate_on: Samples for evaluation; when absent a share of `source` is held out and never trained on.
        columns: What the columns of a table mean, where names and content do not tell.
        guard: Samples of what a pretrained model knows already, to warn when training makes it forget; `auto` takes emoji where the extra
            `demo` is installed and drawn shapes otherwise, `none` switches it off. Nothing is ever trained on them.
        resume: Go on from the checkpoint in `out`, with the same batches as if it had never stopped.
        overwrite: Replace a run that is in `out` already.
        check: Run the doctor first.
        offline: Never touch the network.

    Raises:
        ConfigError: If `out` holds a run and neither `resume` nor `overwrite` is set.
        DataError: If the doctor finds that the samples cannot be trained on.
    """
    recipe = recipe or clip.recipe()
    with distributed.processes(choose_device(recipe.device)):
        CONSOLE.quiet = not distributed.is_first()
        return _train(source, recipe, out, evaluate_on, columns, guard, resume, overwrite, check, offline)


def _train(
    source: str,
    recipe: Recipe[Any],
    out: Path | None,
    evaluate_on: str | None,
    columns: Columns,
    guard: str,
    resume: bool,
    overwrite: bool,
    check: bool,
    offline: bool,
) -> TrainedRun:
    """Train, in each of one or several processes."""
    began = time.perf_counter()
    load_method(recipe.method, verb="objective")  # a method that is only planned ends here, before anything is read
    samples = _opened(source, columns)
    training, held = (
        (samples, open_source(evaluate_on, columns=columns))
        if evaluate_on is not None
        else hold_out(samples, recipe.held_out, recipe.seed)
    )
    say(f"Training on {len(training):,} samples, evaluating on {len(held):,} that are never trained on ({held.name}).")
    folder = out or Path("runs") / f"{Path(source.rstrip('/')).stem.replace(':', '-')}-{recipe.method}"
    _check_folder(folder, resume, overwrite)

    recipe, objective, loader = _made(recipe, training, offline)
    model = objective.model
    findings = _healthy(training, objective, loader) if check and not resume else []
    if overwrite and not resume and distributed.is_first():
        _clear(folder)
    distributed.wait()
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        _check_data(folder, training)
    else:  # what a run was started with is not replaced before it is known to fit
        _write_record(folder, source, training, held, recipe)
    prompts, limit = prompts_of(held.name), recipe.data.cache.limit
    with (
        remembered(model, held, gigabytes=limit) as memory,
        guarding(model, guard, recipe.model.start, (training, held), gigabytes=limit) as guarded,
    ):
        torch.manual_seed(recipe.seed + distributed.part()[0])  # processes draw different dropout
        prepared = time.perf_counter()

        def watch(watched: DualEncoder) -> Mapping[str, float]:
            numbers = evaluate_model(watched, held, prompts=prompts, memory=memory).headline()
            found = {name: value.value for name, value in numbers.items() if name.endswith(("@1", "top1"))}
            return found if guarded is None else found | look(guarded, watched)

        fit(objective, loader, recipe, folder, console=CONSOLE, evaluate=watch, resume=resume)
        trained = time.perf_counter()
        if resume:
            _write_record(folder, source, training, held, recipe)
        evaluation = evaluate_model(
            model, held, prompts=prompts, progress=progress, name=str(folder), seed=recipe.seed, memory=memory
        )
        curve = None if guarded is None else conclude(guarded, model, held, folder, choose=evaluate_on is None)
    evaluation = replace(evaluation, seconds=_seconds(began, prepared, trained, time.perf_counter()))
    write_json(folder / "metrics.json", evaluation.to_json())
    summary = summarise(folder, recipe, training, held, model, evaluation, findings, curve)
    report(folder, summary)
    print_metrics(evaluation)
    _say_what_next(source, folder)
    return TrainedRun(folder, model, evaluation, summary)


def doctor(
    source: Positional[str], *, recipe: Recipe[Any] | None = None, columns: Columns = Columns(), offline: bool = False
) -> Diagnosis:
    """Look at samples, and at a model's first steps on them, before a training run is paid for.

    Args:
        source: Training samples.
        recipe: Which model and settings; the default recipe of CLIP when absent.
        columns: What the columns of a table mean.
        offline: Never touch the network.
    """
    recipe = recipe or clip.recipe()
    samples = _opened(source, columns)
    _, objective, loader = _made(recipe, samples, offline)
    return Diagnosis(tuple(_diagnose(samples, objective, loader)))


def demo(*, out: Path = Path("runs/demo"), seed: int = 0, results: Path = Path("results")) -> TrainedRun:
    """Train a dual encoder from scratch on OpenMoji, evaluate it on 500 unseen emoji, and write a report.

    Args:
        out: Run directory; an earlier demo there is replaced.
        seed: Of weights, order and augmentation.
        results: Folder of `diptych reproduce`. Where it holds a result of CLIP, the report says which parts of the recipe help.
    """
    size = clip.demo().model.architecture.image_policy.size
    with progress("drawing emoji", 0) as advance:
        glyphs(size, progress=lambda drawings: advancing(drawings, advance))
    recipe = override(clip.demo(), {"seed": seed})
    run = train("openmoji:train", recipe=recipe, out=out, evaluate_on="openmoji:test", overwrite=True)
    known = results / f"{recipe.method}.json"
    if not known.is_file():
        say(f"Which parts of this recipe help is not in {known}: `diptych reproduce {recipe.method}` measures it.")
        return run
    comparison = replace(compare(read_results(known)[0]), title="Which parts of the recipe help")
    run = replace(run, summary=replace(run.summary, comparison=comparison))
    report(out, run.summary)
    return run


def read_recipe(record: Mapping[str, Any]) -> Recipe[Any]:
    """Return the recipe that a mapping describes: the method's default with these keys changed.

    Raises:
        ConfigError: If a key is unknown; names the nearest.
    """
    module = load_method(record.get("method", "clip"), verb="objective")
    return override(module.recipe(), record)


def _opened(source: str, columns: Columns) -> AbstractSource:
    """Return samples, and say how they were understood."""
    samples = open_source(source, columns=columns)
    for sentence in describe(samples):
        say(sentence)
    return samples


def _made(
    recipe: Recipe[Any], training: AbstractSource, offline: bool
) -> tuple[Recipe[Any], AbstractObjective[Any], Loader]:
    """Return the recipe with its model chosen, what is trained on its device, and the batches."""
    start, reason = choose_start(recipe.model.start)
    say(reason)
    recipe = override(recipe, {"model": {"start": start}})
    model = make_model(recipe.model, training, seed=recipe.seed, offline=offline).to(choose_device(recipe.device))
    objective: AbstractObjective[Any] = load_method(recipe.method).Objective(model, recipe.objective).to(model.device)
    return recipe, objective, make_loader(recipe, training, model)


def _check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    if (folder / "recipe.json").exists() and not resume and not overwrite:
        raise ConfigError(
            f"{folder} holds a run already. Go on with --resume, replace it with --overwrite, or name another --out."
        )
    if resume and not (folder / "recipe.json").exists():
        raise CheckpointError(f"{folder} holds no run to resume.")


def _check_data(folder: Path, training: AbstractSource) -> None:
    """Raise if a run to be resumed was started on other samples, which would silently give other batches."""
    began_on = json.loads((folder / "run.json").read_text(encoding="utf-8"))["training"]
    if began_on["fingerprint"] != training.fingerprint:
        raise ConfigError(
            f"{folder} was started on {began_on['samples']:,} samples of {began_on['name']}; these are {len(training):,} of "
            f"{training.name}, or their texts have changed. Resume with the same samples, or start a new run with another --out."
        )


def _clear(folder: Path) -> None:
    """Remove what a run leaves in a folder, and the index that it suggests; nothing else that may lie there."""
    for name in (CHECKPOINT, f"{CHECKPOINT}.old", MIX, "index", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("recipe.json", "run.json", "metrics.json", "metrics.jsonl", "report.html", "guard.json", "guard.png"):
        (folder / name).unlink(missing_ok=True)


def _diagnose(source: AbstractSource, objective: AbstractObjective[Any], loader: Loader) -> list[Finding]:
    findings = examine_source(source, objective.model.tokenizer, loader.batch_size)
    if Diagnosis(tuple(findings)).healthy:
        findings += examine_training(objective, loader)
    for finding in findings:
        mark = {"good": "ok     ", "warning": "warning", "error": "ERROR  "}[finding.level]
        say(f"  {mark}  {finding.sentence}")
    return findings


def _healthy(source: AbstractSource, objective: AbstractObjective[Any], loader: Loader) -> list[Finding]:
    """Return what the doctor finds.

    Raises:
        DataError: If there is an error in it.
    """
    findings = _diagnose(source, objective, loader)
    if errors := [finding.sentence for finding in findings if finding.level == "error"]:
        raise DataError(
            f"The doctor found errors: {' '.join(errors)} Mend them, or train all the same with --no-check."
        )
    return findings


def _seconds(began: float, prepared: float, trained: float, done: float) -> dict[str, float]:
    """Return how long each part of a run took, from the times at their ends."""
    parts = {"data": prepared - began, "train": trained - prepared, "evaluate": done - trained, "total": done - began}
    return {name: round(value, 3) for name, value in parts.items()}


def _say_what_next(source: str, folder: Path) -> None:
    say(f"Model, numbers and report are in {folder}. Look at {folder / 'report.html'}, then try:")
    say(f"  diptych embed {source} --model {folder} --out {folder / 'index'}")
    say(f"  diptych search {folder / 'index'} --text 'what you look for'")


def _write_record(
    folder: Path, source: str, training: AbstractSource, held: AbstractSource, recipe: Recipe[Any]
) -> None:
    write_json(folder / "recipe.json", to_json(recipe))
    write_json(folder / "run.json", _record(source, training, held, recipe))


def _record(source: str, training: AbstractSource, held: AbstractSource, recipe: Recipe[Any]) -> dict[str, Any]:
    return {
        "source": source,
        "training": {"name": training.name, "samples": len(training), "fingerprint": training.fingerprint},
        "held_out": {"name": held.name, "samples": len(held), "fingerprint": held.fingerprint},
        "recipe": fingerprint(recipe),
        "versions": versions(),
    }
