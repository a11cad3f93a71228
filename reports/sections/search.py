"""Report of a search: the best trial first, with the command that repeats it; no verdicts between trials."""

import shlex
from dataclasses import replace
from datetime import datetime
from typing import Any

from reports.data.comparison import Comparison, compare_variants
from reports.data.importance import Importance, importance
from reports.data.search import STATES, Search, Trial
from reports.data.study import RECORD_COLUMNS, Study, Variant, differing, show
from reports.render.document import Block, Document, Section, Table, Text, code
from reports.render.formatting import DASH, moment, number, plural
from reports.render.search_figures import history_figure, importance_figure, parameters_figure, values_figure
from reports.sections.images import conventions_section, first_images, samples_section
from reports.sections.runs import flags, versions
from reports.sections.summary import learning
from switti.durations import duration
from switti.run_folder import CONFIG

_PRUNED = "Of a pruned trial the last value that it reached, which a longer training would have changed."
# Of the ranking.
_ROWS = 100


def search_document(search: Search, trials: Comparison) -> Document:
    """Content of a search's report, independent of its format. trials: from `compare_trials`."""
    best = search.best
    lead: list[Block] = [
        *(learning(compare_variants(_alone(best))) if best else []),
        *_best(search),
        *_command(search),
    ]
    if unfinished := search.of("running", "interrupted"):
        lead.append(
            Text(f"{plural(len(unfinished), 'trial')} not finished yet: the best may change.", "warning")
        )
    if search.skipped:
        text = f"{plural(len(search.skipped), 'run folder')} could not be read (see Trials)."
        lead.append(Text(text, "warning"))
    lead.append(history_figure(search))
    if best and best.run.config.get("seed") is not None:
        images = first_images(samples_section(_alone(best)))
        lead += [replace(block, title="First images of the best trial") for block in images]
    lead.append(Text(_subject(search), "note"))
    sections = [
        _parameters(search),
        _curves(search),
        _ranking(search),
        _trials(search, trials.study),
        _settings(search),
        conventions_section(trials),
    ]
    return Document(
        f"{search.name}: search over {plural(len(search.parameters), 'parameter')}", lead, sections
    )


def search_rows(search: Search, trials: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Header and one row a trial: number, rank, state, objective, parameters, record, final metrics."""
    names = trials.names
    ranks = {trial.number: rank for rank, trial in enumerate(search.ranked, 1)}
    header = ["trial", "rank", "state", search.metric.name, *(p.name for p in search.parameters)]
    header += [
        "run",
        *RECORD_COLUMNS,
        *(f"final {name}" if name == search.metric.name else name for name in names),
    ]
    table = []
    for trial in search.trials:
        row: list[Any] = [trial.number, ranks.get(trial.number), trial.state, trial.value]
        row += [_plain(trial.parameters[p.name]) for p in search.parameters]
        row += [trial.run.path.as_posix(), *(trial.run.record.get(key) for key in RECORD_COLUMNS)]
        table.append([*row, *(trials.final(trial.run, name) for name in names)])
    return header, table


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else show(value)


def _alone(trial: Trial) -> Study:
    """A study of this trial's run alone, for sections about runs."""
    variant = Variant(f"trial {trial.number}", (trial.run,))
    return Study(trial.run.name, variant.runs, (variant,), (), "seed")


def compare_trials(search: Search) -> Comparison:
    """The numbers of all trials as runs of one variant: nothing is paired."""
    runs = tuple(trial.run for trial in search.trials)
    return compare_variants(
        Study(search.name, runs, (Variant("all trials", runs),), (), "seed", search.skipped)
    )


def _best(search: Search) -> list[Text]:
    best = search.best
    if best is None:
        text = f"None of {plural(len(search.trials), 'trial')} has finished with a value of {search.metric.title}."
        return [Text(text, "summary")]
    settings = ", ".join(f"{p.label}={_shown(best.parameters[p.name])}" for p in search.parameters)
    counts = plural(len(search.of("finished")), "finished trial")
    text = f"Best of {counts}: trial {best.number} with {search.metric.title} {number(best.value, 5)} ({settings})."
    return [Text(text, "summary")]


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else show(value)


def _command(search: Search) -> list[Text]:
    best = search.best
    if best is None:
        return []
    commit = str(best.run.record.get("commit") or "unknown")[:10]
    dirty = " with uncommitted changes" if best.run.record.get("dirty") else ""
    text = f"The best trial again, with all its settings, in a study of its own (code: commit {code(commit)}{dirty}):"
    return [Text(text), Text(repeat_command(search, best), "command")]


def repeat_command(search: Search, trial: Trial) -> str:
    """The command that trains a trial once more, from the settings in its run folder, into a new one."""
    run = trial.run
    ranks, nodes = (_count(run.config.get(f"trainer.{key}")) for key in ("devices", "num_nodes"))
    words = ["python"]
    if ranks * nodes > 1:
        words = ["torchrun", *([f"--nnodes={nodes}"] if nodes > 1 else []), f"--nproc-per-node={ranks}"]
    words += ["-m", "experiments.train", (run.path / CONFIG).as_posix()]
    words += [f"study={search.name}_repeated", f"name=trial_{trial.number:04d}"]
    if run.config.get("callbacks.prunable"):
        words.append("callbacks.prunable=false")
    return shlex.join(words)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1


def _subject(search: Search) -> str:
    counts = ", ".join(f"{len(found)} {state}" for state in STATES if (found := search.of(state)))
    space = ", ".join(code(parameter.name) for parameter in search.parameters)
    planned = (
        f" of {search.planned} planned" if search.planned and search.planned > len(search.trials) else ""
    )
    aim = "lowest" if search.minimize else "highest"
    text = (
        f"Search for the {aim} {code(search.metric.name)} over {space}: {plural(len(search.trials), 'trial')}"
    )
    text += f"{planned} ({counts}); sampler {search.sampler}, pruner {search.pruner}. "
    return f"{text}Made {datetime.now():%Y-%m-%d %H:%M} from the run folders alone."


def _ranking(search: Search) -> Section:
    """Finished trials by objective, then the others; a trial is one run, so that small gaps mean little."""
    ranked = search.ranked
    rest = sorted(
        (trial for trial in search.trials if trial.state != "finished"),
        key=lambda trial: (STATES.index(trial.state), search.badness(trial), trial.number),
    )
    rows = []
    for rank, trial in enumerate([*ranked, *rest], 1):
        values = [_shown(trial.parameters[p.name]) for p in search.parameters]
        place, value = (str(rank) if rank <= len(ranked) else DASH), number(trial.value, 5)
        rows.append((str(trial.number), place, value, *values, trial.state, str(trial.step)))
    header = ("trial", "rank", search.metric.heading, *(p.label for p in search.parameters), "state", "step")
    words = frozenset(
        {len(header) - 2, *(3 + i for i, p in enumerate(search.parameters) if p.choices is not None)}
    )
    caption = _PRUNED if search.of("pruned") else ""
    if len(rows) > _ROWS:
        caption += f" The first {_ROWS} of {len(rows)}; all are in rows.csv."
    caption = caption.strip()
    blocks: list[Block] = [Table(header, tuple(rows[:_ROWS]), caption, words)]
    note = "A trial is one run with one seed: the order of close trials may be chance. Train the best few with several "
    note += "seeds (a study with `vary: {seed: [0, 1, 2]}`) before one is preferred."
    return Section("ranking", "Ranking", [*blocks, Text(note, "note")])


def _parameters(search: Search) -> Section:
    section = Section("parameters", "Parameters")
    figure = parameters_figure(search)
    section.blocks.append(
        figure or Text("No parameter has two values among the trials with a value.", "missing")
    )
    shares = importance(search)
    if isinstance(shares, Importance):
        section.blocks.append(importance_figure(shares, search))
    else:
        section.blocks.append(Text(f"No importance of the parameters: {shares}.", "missing"))
    return section


def _curves(search: Search) -> Section:
    figure = values_figure(search)
    missing = Text(f"No trial has logged {code(search.metric.name)}.", "missing")
    return Section("curves", "Objective in training", [figure or missing])


def _trials(search: Search, study: Study) -> Section:
    """Where each trial comes from and how it ended."""
    rows = []
    for trial in search.trials:
        record = trial.run.record
        commit = str(record.get("commit") or "unknown")[:10] + (" (dirty)" if record.get("dirty") else "")
        step = f"{record.get('step', DASH)} / {record.get('max_steps', DASH)}"
        times = (moment(record.get("started")), duration(record.get("train_seconds")))
        error = str(record.get("error") or "")
        rows.append((str(trial.number), trial.state, step, *times, commit, trial.run.name, error))
    header = ("trial", "state", "step", "started", "trained for", "commit", "run", "error")
    table = Table(header, tuple(rows), words=frozenset({0, 1, 3, 5, 6, 7}), code=frozenset({6}))
    warnings = [Text(text, "warning") for text in flags(study, ends=False)]
    if missing := _missing_numbers(search):
        text = f"Numbers without a run of their own (settings that do not go together, second attempts): {missing}."
        warnings.append(Text(text, "note"))
    if search.others:
        names = ", ".join(map(code, search.others))
        warnings.append(Text(f"Not trials of the search, hence not in this report: {names}.", "warning"))
    return Section("trials", "Trials", [*warnings, table, versions(study)])


def _missing_numbers(search: Search) -> str:
    known = {trial.number for trial in search.trials}
    missing = [n for n in range(min(max(known) + 1, 10_000)) if n not in known]
    return ", ".join(map(str, missing[:20])) + (" …" if len(missing) > 20 else "")


def _settings(search: Search) -> Section:
    """Settings that differ between trials although the search does not vary them."""
    space = {parameter.name for parameter in search.parameters}
    last = {name.rpartition(".")[2] for name in space}
    table = differing([trial.run for trial in search.trials])
    loose = [key for key in table if key not in space and key.rpartition(".")[2] not in last]
    section = Section("settings", "Other settings that differ")
    if not loose:
        section.blocks.append(Text("None: the trials differ in the searched parameters alone.", "note"))
        return section
    rows = tuple((key, "; ".join(dict.fromkeys(map(show, table[key])))) for key in loose)
    text = "Trials differ in more than what was searched; their order mixes both."
    section.blocks += [Text(text, "warning"), Table(("setting", "values"), rows, words=frozenset({0, 1}))]
    return section
