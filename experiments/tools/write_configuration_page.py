"""python -m experiments.tools.write_configuration_page > docs/configuration.md

The reference of all settings as a Markdown page, from the docstrings under the fields of the dataclasses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields

from configs.field_docs import field_docs
from configs.loading import SETTINGS
from configs.reference import default_of, docs, groups, in_one_line, settings_of
from configs.settings import walk
from experiments.cli import argument_parser, run
from sweeps.search_space import Axis, Search
from sweeps.study import KEYS, Study

_HEAD = """\
# Configuration

<!-- Written by `python -m experiments.tools.write_configuration_page > docs/configuration.md`. -->

A run's settings are a YAML file that holds only what differs from the defaults below; `base: other.yaml` (or a list)
names what it starts from, and `key=value` on the command line comes last:

```
python -m experiments.train generator/demo optimizer.learning_rate=1e-3 data.workers=4
```

`train CONFIG --show` prints all settings of a run with their meaning, `train CONFIG --explain SETTING` one setting or
one group. `${other.setting}` refers to another setting, `${oc.env:NAME}` to an environment variable, which is read when
the run starts and never saved.
"""
_STUDIES = """
## Studies

`experiments.sweep` reads a YAML file of `configs/studies/` with these keys. On the command line `base=…`, `pair_by=…`,
`vary.SETTING=[…]` and `search.KEY=…` say the same.
"""


def main(argv: list[str]) -> int:
    argument_parser(__doc__).parse_args(argv)
    print(page(), end="")
    return 0


def page() -> str:
    """The Markdown text."""
    parts = [_HEAD, "## Run\n", _settings("")]
    for group, text in groups().items():
        parts += [f"\n## {group}\n\n{text}\n", _settings(group)]
    # Keys of the file that the dataclass calls otherwise.
    fields_of_keys = {"runs": "points", "overrides": "shared"}
    meanings = field_docs(Study)
    keys = ((f"`{key}`", meanings[fields_of_keys.get(key, key)]) for key in KEYS)
    parts += [_STUDIES, _table(("key", "meaning"), keys)]
    parts += ["\n### search\n", _keys(Search, "search."), "\n### Ranges of search.space\n", _keys(Axis, "")]
    return "\n".join(parts) + "\n"


def _settings(group: str) -> str:
    rows = (
        (f"`{name}`", SETTINGS[name].words, f"`{in_one_line(default_of(name))}`", docs()[name])
        for name in settings_of(group)
    )
    return _table(("setting", "type", "default", "meaning"), rows)


def _keys(kind: type, prefix: str) -> str:
    """A table of the fields of a dataclass with plain defaults."""
    words, meanings = {setting.name: setting.words for setting in walk(kind)}, field_docs(kind)
    rows = (
        (
            f"`{prefix}{item.name}`",
            words[item.name],
            "" if item.default is MISSING else f"`{in_one_line(item.default)}`",
            meanings[item.name],
        )
        for item in fields(kind)
    )
    return _table(("key", "type", "default", "meaning"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    run(main)
