"""Sections about the runs themselves: where they come from, and which settings differ."""

import math

from reports.data.comparability import exchanged_contents
from reports.data.runs import Run
from reports.data.study import MISSING, Study, Variant, differing, show
from reports.render.document import Section, Table, Text, code
from reports.render.formatting import DASH, moment
from switti.durations import duration


def runs_section(study: Study) -> Section:
    """Provenance of every run, with what is unfinished or not reproducible flagged."""
    header = ("run", "variant", study.pair_by, "status", "step", "commit", "device", "started", "trained for")
    rows = []
    for run in study.runs:
        record = run.record
        commit = str(record.get("commit") or "unknown")[:10] + (" (dirty)" if record.get("dirty") else "")
        step = f"{record.get('step', DASH)} / {record.get('max_steps', DASH)}"
        world = record.get("world_size") or 1
        device = f"{record.get('device') or 'unknown'}" + (f" × {world}" if world > 1 else "")
        variant = study.variant_of(run).label
        times = (moment(record.get("started")), duration(record.get("train_seconds")))
        pair = show(run.setting(study.pair_by))
        rows.append((run.name, variant, pair, _status(run), step, commit, device, *times))
    table = Table(header, tuple(rows), words=frozenset({0, 1, 3, 5, 6, 7}))
    return Section(
        "runs",
        "Runs",
        [
            *(Text(flag, "warning") for flag in flags(study)),
            table,
            *early_stops(study),
            _provenance(study),
            versions(study),
        ],
    )


def early_stops(study: Study) -> list[Text]:
    """Which finished runs ended before their last step, and why; nothing if none did."""
    stops = [
        (run, run.record["early_stop"]) for run in study.runs if run.finished and "early_stop" in run.record
    ]
    parts = [
        f"{code(run.name)} at step {stop['step']} of {run.record.get('max_steps', DASH)} ({stop['reason']})"
        for run, stop in stops
    ]
    return [Text(f"Stopped early: {'; '.join(parts)}.", "note")] if parts else []


def _provenance(study: Study) -> Table:
    """What is needed to make each run again: the exact code, the command, and where it ran."""
    rows = []
    for run in study.runs:
        record = run.record
        dirty = record.get("dirty")
        state = "unknown" if dirty is None else "uncommitted changes" if dirty else "clean"
        counts = record.get("parameters") or {}
        size = f"{counts['trained'] / 1e6:.3g} M" if counts.get("trained") else DASH
        resumed = ", ".join(map(str, record.get("resumed") or [])) or "never"
        host, command = str(record.get("host") or "unknown"), str(record.get("command") or "not recorded")
        seed, commit = show(record.get("seed")), str(record.get("commit") or "unknown")
        rows.append((run.name, seed, host, size, resumed, _data(run), state, commit, command))
    header = (
        "run",
        "seed",
        "host",
        "trained parameters",
        "resumed at step",
        "data",
        "code",
        "commit",
        "command",
    )
    return Table(
        header, tuple(rows), "Where each run comes from.", frozenset(range(9)) - {1, 3}, frozenset({7, 8})
    )


def _data(run: Run) -> str:
    """ "train 9f2f8c78 (2898), validation …": equal digests mean equal contents; in brackets the samples."""
    parts = [
        f"{split} {'+'.join(digest[:8] for digest in (run.contents(split) or '?').split('+'))}"
        f" ({content.get('samples', '?')})"
        for split, content in (run.record.get("data") or {}).items()
    ]
    return ", ".join(parts) or DASH


def _status(run: Run) -> str:
    status = str(run.record.get("status") or "unknown")
    return status if run.finished else f"⚠ {status}"


def flags(study: Study, ends: bool = True) -> list[str]:
    """What is unfinished, diverged, not reproducible or without a partner. ends: also how runs ended."""
    flags = [f"{code(name)} is skipped: {reason}." for name, reason in study.skipped]
    for run in study.runs:
        if ends and not run.finished:
            status = run.record.get("status") or "of unknown status"
            life = f" (last sign of life {moment(run.record.get('updated'))})" if status == "running" else ""
            reason = f": {run.record['error']}" if run.record.get("error") else ""
            flags.append(f"{code(run.name)} is {status}{life}, not finished{reason}.")
        if diverged := [
            n for n, s in run.series.items() if n.endswith("/loss") and not math.isfinite(s.values[-1])
        ]:
            flags.append(
                f"{code(run.name)} diverged: the last {' and '.join(diverged)} is not a finite number."
            )
    if dirty := [code(run.name) for run in study.runs if run.record.get("dirty")]:
        flags.append(f"Uncommitted changes were in the code of {', '.join(dirty)}.")
    if len({run.record.get("commit") for run in study.runs}) > 1:
        flags.append("The runs come from different commits.")
    flags += [_exchanged(key, groups) for key, groups in exchanged_contents(study.runs)]
    for run in study.runs:
        if changed := [split for split in ("train", "validation") if "+" in (run.contents(split) or "")]:
            flags.append(
                f"The contents of data.{' and data.'.join(changed)} changed while {code(run.name)} lasted."
            )
    if unpaired := [code(run.name) for run in study.unpaired]:
        flags.append(f"Without a partner, hence not in any difference: {', '.join(unpaired)}.")
    return flags


def _exchanged(key: str, groups: list[list[Run]]) -> str:
    """Warning that one setting has meant different data, with the runs of each."""
    parts = [", ".join(code(run.name) for run in runs) for runs in groups]
    return f"{key} is the same setting with other contents (prepared again in between?) in: {'; in: '.join(parts)}."


def versions(study: Study) -> Text:
    """Versions once if all runs agree, otherwise each library's different ones."""
    names = sorted({name for run in study.runs for name in (run.record.get("versions") or {})})
    parts = []
    for name in names:
        used = sorted({str((run.record.get("versions") or {}).get(name, MISSING)) for run in study.runs})
        parts.append(f"{name} {' | '.join(used)}")
    hosts = sorted({str(run.record.get("host")) for run in study.runs if run.record.get("host")})
    return Text(
        "Versions: " + (", ".join(parts) or "not recorded") + f". Hosts: {', '.join(hosts) or 'unknown'}.",
        "note",
    )


def settings_section(study: Study) -> Section:
    """Only the settings that differ, the varied ones first."""
    table = differing(study.runs)
    if not table:
        return Section("settings", "Settings that differ", [Text("None: all runs have one config.", "note")])
    keys = sorted(table, key=lambda key: (key not in study.vary, key != study.pair_by, key))
    rows = tuple((key, *(_values(variant, key) for variant in study.variants)) for key in keys)
    header = ("setting", *(variant.label for variant in study.variants))
    section = Section(
        "settings", "Settings that differ", [Table(header, rows, words=frozenset(range(len(header))))]
    )
    loose = [key for key in keys if key not in (*study.vary, study.pair_by) and _within_variants(study, key)]
    if loose:
        names = ", ".join(code(key) for key in loose)
        section.blocks.insert(0, Text(f"{names} differ within a variant: its mean mixes them.", "warning"))
    return section


def _values(variant: Variant, key: str) -> str:
    """What the runs of a variant have, each value once."""
    return "; ".join(dict.fromkeys(show(run.config.get(key, MISSING)) for run in variant.runs))


def _within_variants(study: Study, key: str) -> bool:
    return any(
        len({show(run.config.get(key, MISSING)) for run in variant.runs}) > 1 for variant in study.variants
    )
