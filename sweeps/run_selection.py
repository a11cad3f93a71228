"""Checks of a study's folder before a sweep starts: states of the runs, same settings, same study."""

from typing import Any

from configs.loading import from_run
from configs.resume_rules import check_resumable
from sweeps.run_lock import study_lock
from sweeps.run_state import State, read_study
from sweeps.study import FORMAT, Study, StudyRun
from switti.errors import UserError
from switti.files import write_json
from switti.run_folder import CONFIG, STUDY, read_record
from switti.tables import aligned

ACTIONS: dict[State, str] = {
    "new": "start",
    "failed": "retry",
    "interrupted": "resume",
    "killed": "resume",
    "finished": "skip",
    "running": "skip",
    "queued": "skip",
    "pruned": "skip",
}
# Keys of study.json that must agree.
_SAME = ("base", "pair_by")
_REMEDY = "give this study another name (study=…) or remove the folder"


def print_preflight(study: Study, states: dict[str, State]) -> None:
    """One line a run: its state and what happens to it."""
    rows = [(run.name, states[run.name], ACTIONS[states[run.name]]) for run in study.runs]
    print(f"study {study.name}: {len(study.runs)} runs in {study.folder}")
    print("\n".join(f"  {line}" for line in aligned(rows, left=3)), flush=True)


def check_same(run: StudyRun, state: State) -> None:
    """UserError if the run's folder holds a run with other settings, which must not be taken for this one."""
    folder = run.config.run_dir
    try:
        read_record(folder)
    except UserError as error:
        raise UserError(f"run {run.name}: {error}") from error
    if not (folder / CONFIG).is_file():
        return
    try:
        saved = from_run(folder)
    except UserError as error:
        raise UserError(f"{folder} was made by another version ({error}): {_REMEDY}") from error
    check_resumable(run.config, folder, remedy="another study=…")
    before, now = saved.trainer.max_steps, run.config.trainer.max_steps
    if state == "finished" and before != now:
        raise UserError(f"{folder} is finished with trainer.max_steps={before}, not {now}: {_REMEDY}")


def check_study(study: Study) -> None:
    """UserError if the folder holds another study."""
    if saved := read_study(study.folder):
        _check_definition(study, saved, study.as_dict())


def save_study(study: Study) -> None:
    """Write study.json, or add new values and runs to it."""
    path, now = study.folder / STUDY, study.as_dict()
    with study_lock(study.folder):
        saved = read_study(study.folder)
        if saved:
            _check_definition(study, saved, now)
            old = saved["vary"]
            now["vary"] = {name: _union(old.get(name, []), values) for name, values in now["vary"].items()}
            names = {entry["name"] for entry in now["runs"]}
            now["runs"] = [entry for entry in saved["runs"] if entry["name"] not in names] + now["runs"]
            now["points"] = saved.get("points", {}) | now["points"]
        if saved != now:
            write_json(path, now)


def _check_definition(study: Study, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved.get("format", FORMAT) != FORMAT:
        raise UserError(
            f"{study.folder} was made by another version (its study.json has format {saved['format']}): {_REMEDY}"
        )
    pairs = {key: (saved.get(key), now[key]) for key in _SAME}
    pairs["vary"] = (", ".join(saved["vary"]), ", ".join(now["vary"]))
    for label, point in saved.get("points", {}).items():
        if label in now["points"]:
            pairs[f"runs.{label}"] = (point, now["points"][label])
    if (before := saved.get("search")) or now["search"]:
        after = now["search"] or {}
        for key in ("space", "metric", "direction", "sampler", "storage"):
            pairs[f"search.{key}"] = ((before or {}).get(key), after.get(key))
    changed = [f"{key} is {old!r}, not {new!r}" for key, (old, new) in pairs.items() if old != new]
    if changed:
        raise UserError(f"{study.folder} holds another study: its {'; its '.join(changed)}; {_REMEDY}")


def _union(old: list[Any], new: list[Any]) -> list[Any]:
    return [*old, *(value for value in new if value not in old)]
