"""What a user can do: one function per command of the command line, with the same name and the same arguments."""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tyro.conf import Positional, arg

from diptych.claims.ledger import Result, update_readme, write_results
from diptych.claims.plot import plot_results
from diptych.claims.reproduce import reproduce_method
from diptych.config import fingerprint, override, to_json
from diptych.curate.language_model import LanguageModelConfig
from diptych.curate.rewrite import RewriteConfig, rewrite_source
from diptych.data.bundles import BUNDLES
from diptych.data.loader import Loader
from diptych.data.openmoji import glyphs
from diptych.data.sources import AbstractSource, Columns, describe, open_source
from diptych.errors import CheckpointError, ConfigError, DataError, DiptychError, ImageError, MissingExtraError
from diptych.evaluation.languages import evaluate_languages
from diptych.evaluation.run import Evaluation, Task, compare, evaluate_model
from diptych.files import atomic_file
from diptych.methods import METHODS, clip, load_method
from diptych.models.dual import DualEncoder
from diptych.models.embedding import Advance
from diptych.models.weights import CHECKPOINT, load
from diptych.models.weights import convert as convert_model
from diptych.training import distributed
from diptych.training.doctor import Diagnosis, Finding, examine_source, examine_training
from diptych.training.log import read_rows
from diptych.training.loop import fit
from diptych.training.prepare import choose_device, choose_start, hold_out, make_loader, make_model
from diptych.training.recipe import Recipe
from diptych.types import Interval
from diptych.use.gallery import Candidate, Card, render, retrieval_cards
from diptych.use.page import page
from diptych.use.report import RunSummary, write_report
from diptych.use.search import (
    Hit,
    Index,
    approximate_finder,
    build_index,
    check_model,
    embed_query,
    pictures,
    search_index,
)
from diptych.verbs import AbstractObjective

CONSOLE = Console(stderr=True, soft_wrap=True, emoji=False)
"""Progress and remarks go to the error stream, results to the output. No emoji codes: `flickr8k:train:` is a name."""

_PACKAGES = ("diptych", "torch", "torchvision", "timm", "tokenizers", "numpy", "pillow")


@dataclass(frozen=True)
class TrainedRun:
    """What a training run leaves behind.

    Attributes:
        folder: The run directory: checkpoint, recipe.json, metrics.jsonl, metrics.json, report.html.
        model: With its final weights, in eval mode.
        evaluation: On the held-out samples.
    """

    folder: Path
    model: DualEncoder
    evaluation: Evaluation


def train(
    source: Positional[str],
    *,
    recipe: Recipe[Any] | None = None,
    out: Path | None = None,
    evaluate_on: str | None = None,
    columns: Columns = Columns(),
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
        return _train(source, recipe, out, evaluate_on, columns, resume, overwrite, check, offline)


def _train(
    source: str,
    recipe: Recipe[Any],
    out: Path | None,
    evaluate_on: str | None,
    columns: Columns,
    resume: bool,
    overwrite: bool,
    check: bool,
    offline: bool,
) -> TrainedRun:
    """Train, in each of one or several processes."""
    began = time.perf_counter()
    method = load_method(recipe.method)
    samples = open_source(source, columns=columns)
    for sentence in describe(samples):
        _say(sentence)
    training, held = (
        (samples, open_source(evaluate_on, columns=columns))
        if evaluate_on is not None
        else hold_out(samples, recipe.held_out, recipe.seed)
    )
    _say(f"Training on {len(training):,} samples, evaluating on {len(held):,} that are never trained on ({held.name}).")
    folder = out or Path("runs") / f"{Path(source.rstrip('/')).stem.replace(':', '-')}-{recipe.method}"
    _check_folder(folder, resume, overwrite)

    start, reason = choose_start(recipe.model.start)
    recipe = override(recipe, {"model": {"start": start}})
    _say(reason)
    model = make_model(recipe.model, training, seed=recipe.seed, offline=offline).to(choose_device(recipe.device))
    objective: AbstractObjective[Any] = method.Objective(model, recipe.objective).to(model.device)
    loader = make_loader(recipe, training, model)
    findings: list[Finding] = []
    if check and not resume:
        findings = _diagnose(training, objective, loader)
        if errors := [finding.sentence for finding in findings if finding.level == "error"]:
            raise DataError(
                f"The doctor found errors: {' '.join(errors)} Mend them, or train all the same with --no-check."
            )
    if overwrite and not resume and distributed.is_first():
        _clear(folder)
    distributed.wait()
    folder.mkdir(parents=True, exist_ok=True)
    if resume:
        _check_data(folder, training)
    else:  # what a run was started with is not replaced before it is known to fit
        _write_record(folder, source, training, held, recipe)
    torch.manual_seed(recipe.seed + distributed.part()[0])  # processes draw different dropout
    prepared = time.perf_counter()

    prompts = _prompts_for(held)

    def watch(watched: DualEncoder) -> Mapping[str, float]:
        numbers = evaluate_model(watched, held, prompts=prompts).headline()
        return {name: value.value for name, value in numbers.items() if name.endswith(("@1", "top1"))}

    fit(objective, loader, recipe, folder, console=CONSOLE, evaluate=watch, resume=resume)
    trained = time.perf_counter()
    if resume:
        _write_record(folder, source, training, held, recipe)
    evaluation = evaluate_model(model, held, prompts=prompts, progress=_progress, name=str(folder), seed=recipe.seed)
    done = time.perf_counter()
    seconds = {
        "data": round(prepared - began, 3),
        "train": round(trained - prepared, 3),
        "evaluate": round(done - trained, 3),
        "total": round(done - began, 3),
    }
    evaluation = Evaluation(**{**vars(evaluation), "seconds": seconds})
    _write_json(folder / "metrics.json", evaluation.to_json())
    _write_report(folder, recipe, training, held, model, evaluation, findings)
    _print_metrics(evaluation)
    _say(f"Model, numbers and report are in {folder}. Look at {folder / 'report.html'}, then try:")
    _say(f"  diptych embed {source} --model {folder} --out {folder / 'index'}")
    _say(f"  diptych search {folder / 'index'} --text 'what you look for'")
    return TrainedRun(folder, model, evaluation)


def evaluate(
    source: Positional[str],
    *,
    model: str = "auto",
    against: str | None = None,
    tasks: tuple[Task, ...] | None = None,
    prompts: str | None = None,
    language: str | None = None,
    languages: tuple[str, ...] = (),
    probe_on: str | None = None,
    columns: Columns = Columns(),
    json_out: Annotated[str | None, arg(name="json")] = None,
    batch_size: int = 64,
    seed: int = 0,
    offline: bool = False,
) -> Evaluation:
    """Measure a model on samples, every number with its 95 % interval.

    Args:
        source: Samples with captions (retrieval), labels (zero-shot classification), or both.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        against: A second model, measured on the same samples; the paired differences (model minus against) are printed.
        tasks: What to measure; whatever the samples allow when absent.
        prompts: Prompt file for zero-shot (photo, overhead, style, name); chosen by the data set when absent.
        language: Measure retrieval with texts of this language (ISO 639-1) instead of the captions.
        languages: Also print retrieval in each of these languages, `all` for all that the samples have.
        probe_on: Training samples for a linear probe and nearest neighbours on frozen image embeddings.
        columns: What the columns of a table mean.
        json_out: File to write the numbers to as JSON; `-`, or no file, for the output.
        batch_size: Images per forward pass.
        seed: Of the bootstrap.
        offline: Never touch the network.
    """
    samples = open_source(source, columns=columns)
    for sentence in samples.notes:
        _say(sentence)
    model = _chosen(model)

    def measure(spec: str) -> Evaluation:
        return evaluate_model(
            load(spec, offline=offline),
            samples,
            tasks=tasks,
            probe_source=None if probe_on is None else open_source(probe_on, columns=columns),
            prompts=prompts or _prompts_for(samples),
            language=language,
            batch_size=batch_size,
            seed=seed,
            progress=_progress,
            name=spec,
        )

    found = measure(model)
    _print_metrics(found)
    record = found.to_json()
    if against is not None:
        differences = compare(measure(against), found, seed=seed)
        record["difference"] = {name: vars_of(value) for name, value in differences.items()}
        _say(f"{model} minus {against}, paired over the same items:")
        for name, value in differences.items():
            verdict = "differs" if value.low > 0 or value.high < 0 else "no difference shown"
            _say(f"  {name:32} {value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]  {verdict}")
    if languages:
        table = evaluate_languages(
            load(model, offline=offline), samples, None if languages == ("all",) else languages, seed=seed
        )
        record["languages"] = table.to_json()
        for line in table.lines():
            _say(line)
    if json_out == "-":
        print(json.dumps(record, indent=2))
    elif json_out is not None:
        _write_json(Path(json_out), record)
    return found


def embed(
    source: Positional[str], *, model: str = "auto", out: Path, columns: Columns = Columns(), offline: bool = False
) -> Index:
    """Embed the images of a source into a folder that `search` reads.

    Args:
        source: Images, with or without texts.
        model: Anything `diptych.load` takes; `auto` is lite0-minilm where its packages are installed, else mini.
        out: Folder of the index.
        columns: What the columns of a table mean.
        offline: Never touch the network.
    """
    samples = open_source(source, columns=columns)
    model = _chosen(model)
    index = build_index(
        load(model, offline=offline),
        samples,
        model_spec=_absolute(model),
        source_spec=_absolute(source),
        columns=columns,
        progress=_progress,
    )
    index.save(out)
    skipped = f" ({index.skipped} could not be read)" if index.skipped else ""
    _say(f"{len(index.items):,} images of {index.images.shape[1]} numbers each are in {out}{skipped}.")
    return index


def search(
    index: Positional[Path],
    *,
    text: str | None = None,
    image: Path | None = None,
    count: int = 10,
    approximate: bool = False,
    html: Path | None = None,
    offline: bool = False,
) -> tuple[Hit, ...]:
    """Find the images nearest to a text, to an image, or to both together.

    Args:
        index: Folder that `embed` wrote.
        text: What to look for in words.
        image: What to look for as a picture.
        count: How many at most.
        approximate: Search a graph instead of all images (extra `search`); faster on millions, may miss some.
        html: Also write a page with the pictures.
        offline: Never touch the network.
    """
    found = Index.read(index)
    if image is not None and not image.is_file():
        raise ImageError(f"There is no image file {image} to search with.")
    model = load(found.model, offline=offline)
    check_model(found, model)
    query = embed_query(model, text=text, image=None if image is None else image.read_bytes())
    hits = search_index(found, query, count=count, finder=approximate_finder(found.images) if approximate else None)
    for hit in hits:
        print(f"{hit.rank:3}  {hit.score:.3f}  {hit.item.key}  {hit.item.texts[0] if hit.item.texts else ''}")
    if html is not None:
        shown = pictures(open_source(found.source, columns=found.columns), hits)
        title = " + ".join(part for part in (text, None if image is None else image.name) if part)
        candidates = tuple(
            Candidate(h.score, h.item.texts[0] if h.item.texts else h.item.key, shown.get(h.item.key)) for h in hits
        )
        with atomic_file(html) as file:
            file.write_text(page(title, f"<h1>Search</h1>{render([Card(title, None, candidates)])}"), encoding="utf-8")
        _say(f"The pictures are in {html}.")
    return hits


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
    samples = open_source(source, columns=columns)
    for sentence in describe(samples):
        _say(sentence)
    start, reason = choose_start(recipe.model.start)
    _say(reason)
    recipe = override(recipe, {"model": {"start": start}})
    model = make_model(recipe.model, samples, seed=recipe.seed, offline=offline)
    objective: AbstractObjective[Any] = load_method(recipe.method).Objective(model, recipe.objective)
    loader = make_loader(recipe, samples, model)
    return Diagnosis(tuple(_diagnose(samples, objective, loader)))


def convert(
    model: Positional[str], *, out: Path, to: Literal["open_clip", "hf", "diptych"] = "diptych", offline: bool = False
) -> Path:
    """Write a model for another library, with its tokenizer and its preprocessing.

    Args:
        model: Anything `diptych.load` takes.
        out: Folder to write.
        to: `open_clip` (load with `local-dir:FOLDER`), `hf` (transformers), or `diptych`.
        offline: Never touch the network.
    """
    convert_model(load(model, offline=offline), out, to)
    _say(f"{model} is in {out}, for {to}.")
    return out


def demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> TrainedRun:
    """Train a dual encoder from scratch on OpenMoji, evaluate it on 500 unseen emoji, and write a report.

    Args:
        out: Run directory; an earlier demo there is replaced.
        seed: Of weights, order and augmentation.
    """
    size = clip.mini().model.architecture.image_policy.size
    with _progress("drawing emoji", 0) as advance:
        glyphs(size, progress=lambda drawings: _advancing(drawings, advance))
    recipe = override(clip.mini(), {"seed": seed})
    return train("openmoji:train", recipe=recipe, out=out, evaluate_on="openmoji:test", overwrite=True)


def reproduce(
    slug: Positional[str | None] = None,
    *,
    seeds: int | None = None,
    profile: Literal["mini", "full"] = "mini",
    all: bool = False,
    out: Path = Path("results"),
    log: Path = Path("runs/claims"),
) -> tuple[Result, ...]:
    """Run a method's claim against a baseline and a control over seeds, and say whether it holds here.

    Trials that are done are in a log: called again, the command goes on where it stopped. The result is `out`/<slug>.json with a plot beside
    it, and a row in the ledger of the README.md beside `out`, if it has one.

    Args:
        slug: Method whose claim is run; `diptych methods` lists them.
        seeds: How many, at least three; as many as the claim says when absent.
        profile: `mini` is what claims are stated for, some ten minutes on two cores; `full` says what the paper's own setting needs.
        all: Run the claims of all methods that have one.
        out: Folder of results.
        log: Folder with one file per method and one line per finished trial; remove a file to run its trials again.

    Raises:
        PlannedMethodError: If there is no code for the method yet.
        ConfigError: If the method states no claim, or has none of that profile.
        TrainingError: If a trial breaks down.
    """
    if (slug is None) != all:
        raise ConfigError("Name one method, as in `diptych reproduce SLUG`, or say --all.")
    if slug is not None:
        return _reproduce(slug, seeds, profile, out, log)
    results, failures = list[Result](), list[str]()
    for each in _with_claim():
        try:
            results += _reproduce(each, seeds, profile, out, log)
        except DiptychError as error:  # the other methods need not wait for this one
            _say(f"{each}: {error}")
            failures.append(each)
    if failures:
        raise ConfigError(
            f"Could not be run: {', '.join(failures)}. Each says why above; the results of others are in {out}."
        )
    return tuple(results)


def rewrite(
    source: Positional[str],
    *,
    out: Path,
    rewriting: RewriteConfig = RewriteConfig(),
    model: LanguageModelConfig = LanguageModelConfig(),
    rules: bool = False,
    limit: int | None = None,
    columns: Columns = Columns(),
    offline: bool = False,
) -> Path:
    """Rewrite captions with a language model, each with a reason why it was kept or not; the same command goes on where it was stopped.

    Args:
        source: Samples with captions.
        out: A .parquet or .jsonl file, with the columns of the source and the columns `rewrite` and `reason`.
        rewriting: What is rewritten, and how.
        model: Language model; SmolLM2-135M-Instruct from its pip package (extra `llm`) unless said otherwise.
        rules: Rewrite by rules instead, without a language model; styles are then `framed`, `reordered` and `both`.
        limit: Only the first rows.
        columns: What the columns of a table mean.
        offline: Never touch the network.
    """
    samples = open_source(source, columns=columns)
    with _progress("rewriting captions", 0) as advance:
        table = rewrite_source(
            samples,
            out,
            config=rewriting,
            model=None if rules else model,
            limit=limit,
            offline=offline,
            advance=advance,
        )
    kept = sum(len(texts or ()) for texts in table["rewrite"].to_pylist())
    _say(
        f"{kept:,} rewrites of {table.num_rows:,} rows are in {out}. Train with them: diptych train {out} --method laclip"
    )
    return out


def read_recipe(record: Mapping[str, Any]) -> Recipe[Any]:
    """Return the recipe that a mapping describes: the method's default with these keys changed.

    Raises:
        ConfigError: If a key is unknown; names the nearest.
    """
    module = load_method(record.get("method", "clip"))
    return override(module.recipe(), record)


def vars_of(interval: Interval) -> dict[str, float]:
    """Return an interval as JSON."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _say(sentence: str) -> None:
    CONSOLE.print(sentence, highlight=False, markup=False)


def _chosen(model: str) -> str:
    """Return which model `auto` is here, and say so."""
    chosen, reason = choose_start(model)
    if chosen != model:
        _say(reason)
    return chosen


def _reproduce(
    slug: str, seeds: int | None, profile: Literal["mini", "full"], out: Path, log: Path
) -> tuple[Result, ...]:
    """Run the claims of one method, write what they found, and print it."""
    module = load_method(slug)
    if not hasattr(module, "claim"):
        raise ConfigError(
            f"{slug} states no claim that could be run. Methods that do: {', '.join(_with_claim()) or 'none'}."
        )
    if profile == "full":
        full = module.recipe()
        raise ConfigError(
            f"The claim of {slug} is stated for profile mini only. The paper's setting needs the paper's data and its hours of GPU: train "
            f"the recipe of {slug} ({full.epochs} epochs, batches of {full.data.batch_size * full.accumulate}, model {full.model.start}) with "
            f"`diptych train DATA --method {slug}`, the baseline likewise, over several seeds, and compare with `diptych evaluate --against`."
        )
    results = reproduce_method(
        slug,
        load_method,
        log=log / f"{slug}.jsonl",
        command=f"diptych reproduce {slug}" + (f" --seeds {seeds}" if seeds is not None else ""),
        versions=versions(),
        console=CONSOLE,
        seeds=seeds,
    )
    place = write_results(results, out)
    try:
        plot_results(results, place.with_suffix(".png"))
        _say(f"Results are in {place}, the plot beside it.")
    except MissingExtraError as error:
        _say(f"Results are in {place}. There is no plot: {error}")
    update_readme(out.parent / "README.md", out)
    for result in results:
        _print_result(result)
    return results


def _with_claim() -> list[str]:
    """Return the methods that state a claim."""
    return [m.slug for m in METHODS.values() if m.state != "planned" and hasattr(load_method(m.slug), "claim")]


def _print_result(result: Result) -> None:
    _say(f"{result.slug}, {result.name}: {result.verdict}")
    _say(f"  the paper says: {result.claim}")
    for key, values in result.arms.items():
        part = key if key in ("baseline", "method", "control") else "further"
        seeds = ", ".join(f"{value:.3f}" for value in values)
        shown = f"  {result.samples[key]:,} samples shown" if result.samples[key] else ""
        _say(f"  {part:9} {result.names[key]:32} {sum(values) / len(values):.3f}  ({seeds}){shown}")
    direction = "higher" if result.higher_is_better else "lower"
    _say(
        f"  method minus baseline, paired over {len(result.seeds)} seeds: {result.difference} {result.metric} ({direction} is better)"
    )
    _say(f"  control {'as' if result.control_check.passed else 'NOT as'} expected: {result.control_check.expected}")


def _absolute(spec: str) -> str:
    """Return a path that means the same from any folder; names of models and sources stay as they are."""
    return str(Path(spec).absolute()) if Path(spec).exists() else spec


def _advancing(items: Any, advance: Advance) -> Iterator[Any]:
    for item in items:
        yield item
        advance(1)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Advance]:
    """Show a bar on a terminal, nothing in a file."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=CONSOLE, disable=not CONSOLE.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda done: bar.advance(task, done)


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
    for name in (CHECKPOINT, f"{CHECKPOINT}.old", "index", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("recipe.json", "run.json", "metrics.json", "metrics.jsonl", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _diagnose(source: AbstractSource, objective: AbstractObjective[Any], loader: Loader) -> list[Finding]:
    findings = examine_source(source, objective.model.tokenizer, loader.batch_size)
    if Diagnosis(tuple(findings)).healthy:
        findings += examine_training(objective, loader)
    for finding in findings:
        mark = {"good": "ok     ", "warning": "warning", "error": "ERROR  "}[finding.level]
        _say(f"  {mark}  {finding.sentence}")
    return findings


def _prompts_for(source: AbstractSource) -> str:
    name = source.name.partition(":")[0]
    return BUNDLES[name].prompts if name in BUNDLES else "photo"


def _write_record(
    folder: Path, source: str, training: AbstractSource, held: AbstractSource, recipe: Recipe[Any]
) -> None:
    _write_json(folder / "recipe.json", to_json(recipe))
    _write_json(folder / "run.json", _record(source, training, held, recipe))


def _record(source: str, training: AbstractSource, held: AbstractSource, recipe: Recipe[Any]) -> dict[str, Any]:
    return {
        "source": source,
        "training": {"name": training.name, "samples": len(training), "fingerprint": training.fingerprint},
        "held_out": {"name": held.name, "samples": len(held), "fingerprint": held.fingerprint},
        "recipe": fingerprint(recipe),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter to a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _write_json(path: Path, record: Any) -> None:
    if not distributed.is_first():
        return
    with atomic_file(path) as file:
        file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _print_metrics(evaluation: Evaluation) -> None:
    for name, value in evaluation.headline().items():
        _say(f"  {name:32} {value}")
    for note in evaluation.notes:
        _say(f"  {note}")


def _skipped(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on the training samples that could not be used, if there were any."""
    count = steps[-1]["skipped"] if steps else 0
    return [f"In training, unreadable samples were skipped {count:,} times."] if count else []


def _write_report(
    folder: Path,
    recipe: Recipe[Any],
    training: AbstractSource,
    held: AbstractSource,
    model: DualEncoder,
    evaluation: Evaluation,
    findings: Sequence[Finding],
) -> None:
    if not distributed.is_first():
        return
    forward, backward = retrieval_cards(evaluation.embedded, held) if evaluation.retrieval is not None else ([], [])
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = evaluation.seconds
    rows = read_rows(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    data, compute = (sum(row[name] for row in steps) for name in ("seconds_data", "seconds_compute"))
    facts = {
        "What was trained on what": [
            ("training samples", f"{len(training):,} ({training.name})"),
            ("held-out samples, never trained on", f"{len(held):,} ({held.name})"),
            ("method", f"{recipe.method}, model {recipe.model.start}"),
            ("parameters", f"{parameters:,}, of which {trained:,} trained"),
            ("images", f"{model.image_policy.size} pixels, {model.image_policy.resize}"),
            ("epochs, batch, seed", f"{recipe.epochs}, {recipe.data.batch_size}, {recipe.seed}"),
        ],
        "Time": [
            *((name, f"{value:.1f} s") for name, value in seconds.items()),
            ("in steps", f"{compute:.1f} s computing, {data:.1f} s waiting for data"),
            ("processor", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}"),
        ],
        "Versions": list(versions().items()),
    }
    lead = (
        f"{len(training):,} training samples, {recipe.epochs} epochs, {seconds['train']:.0f} s of training. "
        f"All numbers are on {len(held):,} samples that were never trained on, with 95 % bootstrap intervals."
    )
    write_report(
        folder / "report.html",
        RunSummary(
            f"{training.name}: {recipe.method}",
            lead,
            [(name, value, evaluation.chance(name)) for name, value in evaluation.headline().items()],
            rows,
            forward,
            backward,
            facts,
            [*(finding.sentence for finding in findings), *_skipped(steps), *evaluation.notes],
        ),
    )
