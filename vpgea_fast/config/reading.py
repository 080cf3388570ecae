"""From a file and words of the command line to a `Config`, and back to YAML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vpgea_fast import strict_yaml
from vpgea_fast.config.errors import ConfigError, Origin, explain, show
from vpgea_fast.config.records import Config
from vpgea_fast.config.renamed import refuse_old, renewed
from vpgea_fast.config.schema import (
    VARIANTS,
    fields_of,
    item_of,
    members_of,
    records_at,
    records_of,
)
from vpgea_fast.objectives import with_preset

SHIPPED = Path(__file__).parents[1] / "configs"
"""The configurations of the project: `configs/` in the tree, a package of files in a wheel."""
ROWS = Path(__file__).parents[1] / "results"
"""The committed rows that come with them."""
MAX_BYTES = 1_000_000
"""Of a configuration: what is larger is another file."""


def load(
    path: str | Path,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    *,
    record: bool = False,
) -> Config:
    """Read the configuration of a YAML file, with `--section.key value` (or `--section.key=value`)
    laid over it. `say` hears which of the file's keys another objective or engine leaves out.

    `load("configs/tiny.yaml", ["--run.dir", "runs/b", "--optim.lr=1e-5"])` is what `vpgea train`
    makes of the same words. `record`: the file is a run's own, so keys of an older version are read
    as what they are now. Errors: ConfigError, which names the key and the nearest known one.
    """
    # The command line is read on its own, so that its errors name its words.
    tree, top = _by_name(read_sections(path)), parse_overrides(overrides, say)
    if record:
        tree = renewed(tree, say=lambda text: say(f"{path}: {text}"))
    # Another variant on the command line makes the file's keys of the old one unknown: they
    # are left out, and said.
    merged, lost = _merge(tree, top)
    cfg = _resolve(merged, Origin(str(path), tree, top))
    for place, name, keys in lost:
        left = ", ".join(f"{place}.{key}" for key in keys)
        say(f"{path}: {place}.name {name!r} leaves out the file's {left}")
    return cfg


def _by_name(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a variant that is given as text by what it names: `engine: vllm`, and within a
    section `length_reward: kimi`."""
    named = {
        section: {"name": keys} if section in VARIANTS and isinstance(keys, str) else keys
        for section, keys in tree.items()
    }
    return {
        section: {k: _record(section, k, value) for k, value in keys.items()}
        if isinstance(keys, Mapping)
        else keys
        for section, keys in named.items()
    }


def _record(section: str, key: str, value: Any) -> Any:
    """Replace text by the variant that it names, in a key that is a record."""
    return {"name": value} if isinstance(value, str) and records_at(section, key) else value


def find(word: str, folder: Path = SHIPPED, suffix: str = ".yaml") -> str:
    """Find the file of a path, else the shipped file of that name.

    `tiny` is configs/tiny.yaml, wherever the project is installed. A word that is neither comes
    back as it is.
    """
    known = {file.stem: str(file) for file in folder.glob(f"*{suffix}")}
    # A folder `tiny`, which `make-tiny` may have made, does not hide the configuration.
    is_file = Path(word).exists() and not Path(word).is_dir()
    return word if is_file else known.get(word, word)


def read_sections(path: str | Path) -> dict[str, Any]:
    """Read the sections of a YAML file as they are. ConfigError with the file and its line."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_BYTES + 1)  # one byte too many tells, without reading the rest
    except OSError as error:
        # The likeliest slip is a name that is not shipped.
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise ConfigError(
            f"cannot read the configuration {path}: {error.strerror}; give the path of a YAML file "
            f"or one of the names {names}"
        ) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: more than {MAX_BYTES} bytes; expected a configuration in YAML")
    try:
        # Windows editors put a byte order mark first.
        tree = strict_yaml.parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise ConfigError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as "
            "UTF-8"
        ) from error
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{path}, line {error.line}: {error}") from error
    if not isinstance(tree, dict):
        # An empty file could mean the defaults; it more often means that a write failed.
        got = "an empty file" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(
            f"{path}: got {got}, expected sections (run:, model:, ...); for the defaults write one "
            "key, e.g. run: {seed: 0}"
        )
    return tree


def resolve(tree: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate a tree of sections, of values that JSON has; presets fill the keys of their
    objective that the tree leaves open. A single value is a list of one where a list is wanted.

    It makes a Config in Python; what the tree leaves out has its default. The records are frozen:
    `dataclasses.replace` makes another one, validated anew. Errors: ConfigError.

    >>> cfg = resolve({"model": {"path": "base"}, "data": {"train": "questions.jsonl"}})
    >>> cfg.model.path, cfg.data.train[0].path, cfg.objective.name
    ('base', 'questions.jsonl', 'vpgea')
    >>> from dataclasses import replace
    >>> replace(cfg, train=replace(cfg.train, steps=10)).train.steps
    10
    """
    return _resolve(tree, Origin(source))


def _resolve(tree: Mapping[str, Any], origin: Origin) -> Config:
    tree = _by_name(tree)
    refuse_old(tree, origin)
    try:
        # Through JSON: pydantic's strict mode takes lists for tuples there, and from Python not.
        text = json.dumps(_with_preset(_with_lists(tree)))
        return TypeAdapter(Config).validate_json(text, strict=True)
    except ValidationError as error:
        raise origin.error(explain(error.errors())) from error
    # A date, a set or NaN from a caller in Python: no YAML holds them.
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{origin.source}: expected what YAML can hold, got {error}") from error


def dump(config: Config) -> str:
    """Write every key as YAML, which `load` reads as the same configuration."""
    return strict_yaml.dump(as_dict(config))


def as_dict(config: Config) -> dict[str, Any]:
    """Return sections of keys, with values that JSON has; `resolve` makes the same of it again."""
    return TypeAdapter(Config).dump_python(config, mode="json")


def changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Map `section.key` to (old value, new value) for every key that differs, run.dir aside; of
    another variant the keys that both have."""
    a, b = as_dict(old), as_dict(new)
    keys = [
        (section, key)
        for section in b
        for key in {**a[section], **b[section]}
        # A key that one variant lacks was not changed but came or went with `name`.
        if section not in VARIANTS or {key in a[section], key in b[section]} == {True}
    ]
    pairs = {f"{s}.{k}": (a[s].get(k), b[s].get(k)) for s, k in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1] and key != "run.dir"}


def parse_overrides(
    words: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """`["--optim.lr", "1e-5", "--run.seed=3"]` -> `{"optim": {"lr": 1e-5}, "run": {"seed": 3}}`;
    `--engine vllm` is short for `--engine.name vllm`, as of any variant.

    Text fields take their value as it stands; others read it as YAML. `null` unsets either. The
    last of two values is taken (a launcher adds to a command line), and `say` hears of it.
    """
    tree: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        key, equals, value = word.partition("=")
        section, dot, name = key.removeprefix("--").partition(".")
        # `--engine vllm`, as `engine: vllm` in a file.
        if section in VARIANTS and not dot:
            dot, name = ".", "name"
        if not key.startswith("--") or not dot:
            raise ConfigError(f"expected --section.key value, got {word!r}")
        if not equals:
            value = next(rest, None)
            # A forgotten value would swallow the next option.
            if value is None or value.startswith("--"):
                raise ConfigError(
                    f"expected --section.key value, got {key} and no value; write {key}=VALUE for "
                    "a value that starts with --"
                )
        keys, new = tree.setdefault(section, {}), _parse(section, name, value)
        outer, inner, last = name.partition(".")
        # A key that is a record again: `--objective.length_reward.name kimi`.
        if inner and records_at(section, outer):
            keys = keys.setdefault(outer, {})
            if not isinstance(keys, dict):
                raise ConfigError(
                    f"--{section}.{name}: --{section}.{outer} is {show(keys)} already; give one of "
                    "them"
                )
        else:
            last, new = name, _record(section, name, new)
        if last in keys and keys[last] != new:
            old = show(keys[last])
            say(f"--{section}.{name} stands twice: {show(new)} is taken, and {old} left out")
        keys[last] = new
    return tree


def _parse(section: str, name: str, word: str) -> Any:
    """Read a word as its field takes it. Where text is one choice among others, a word that opens a
    list or a mapping is one; a `#`, a colon or a number means nothing in text."""
    # Of every variant: which one it is may stand in another word.
    outer, _, last = name.partition(".")
    within = records_at(section, outer) if last else records_of(section)
    types = [t for r in within for t in members_of(fields_of(r).get(last or name))]
    types += [t for kind in types for t in members_of(item_of(kind))]
    structured = any(kind not in (str, type(None)) for kind in types)
    takes_text = str in types or any(fields_of(kind) for kind in types)  # a record's first key
    opens = word.lstrip()[:1] in ("[", "{")
    # Bytes that are not UTF-8 come from the shell as lone surrogates.
    if strict_yaml.LONE.search(word):
        raise ConfigError(f"--{section}.{name}: got {word!r}, expected UTF-8")
    if word in strict_yaml.NULL and word:
        return None
    # Of a class of the user's own, whose keys nobody knows yet.
    if not types and section == "objective":
        try:
            return strict_yaml.parse_word(word)
        except strict_yaml.YamlError:
            return word
    # Unknown keys keep their text: resolve complains with the nearest name.
    if not types or (takes_text and not (structured and opens)):
        return word
    # An unset shell variable is the usual cause; as YAML it would mean null.
    if not word.strip():
        raise ConfigError(f"--{section}.{name}: got an empty word; write null to unset the key")
    try:
        return strict_yaml.parse_word(word)
    except strict_yaml.YamlError as error:
        raise ConfigError(f"--{section}.{name}: got {word[:80]!r}: {error}") from error


def _merge(
    base: Mapping[str, Any], top: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, str, list[str]]]]:
    """Lay the keys of `top` over those of `base`, section by section, and in a key that is a record
    again. What is no section stays: it is refused with the rest.

    Where `top` names another variant, the keys of the old one are left out: (place, new name, the
    keys), for each such place.
    """
    merged, lost = dict(base), []
    for section, keys in top.items():
        below = merged.get(section, {})
        if not isinstance(below, Mapping):
            continue
        # Elsewhere `name` is a key like any other.
        if section in VARIANTS:
            below, left = _kept(below, keys, VARIANTS[section])
            if left:
                lost.append((section, keys["name"], left))
        merged[section] = {**below, **keys}
        for key, deep in keys.items():
            records = isinstance(deep, Mapping) and isinstance(below.get(key), Mapping)
            if records and records_at(section, key):
                kept, left = _kept(below[key], deep, None)
                if left:
                    lost.append((f"{section}.{key}", deep["name"], left))
                merged[section][key] = {**kept, **deep}
    return merged, lost


def _kept(
    base: Mapping[str, Any], top: Mapping[str, Any], default: str | None
) -> tuple[Mapping[str, Any], list[str]]:
    """The keys of `base` that those of `top` come over, and those that another variant leaves
    out."""
    name = top.get("name")
    if name is None or name == base.get("name", default):
        return base, []
    left = [key for key in base if key != "name"]
    return {}, left


def _with_lists(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Make a list of one of a single value where only a list fits; in a list of records, text is
    the first key of one. Here, because a validator of pydantic's would end the strict reading of
    JSON."""

    def wrapped(hint: Any, value: Any) -> Any:
        # Without an item the key is no list; null is for the strict reading to refuse or to take.
        item = item_of(hint)
        if item is None or value is None:
            return value
        values = value if isinstance(value, (list, tuple)) else [value]
        first = next(iter(fields_of(item)), None)
        return [{first: v} if first and isinstance(v, str) else v for v in values]

    filled = dict(tree)
    for section, keys in tree.items():
        for record in records_of(section) if isinstance(keys, Mapping) else []:
            hints = fields_of(record)
            filled[section] = {k: wrapped(hints.get(k), v) for k, v in filled[section].items()}
    return filled


def _with_preset(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Give variants their name, and an objective the keys of its preset."""
    tree = dict(tree)
    for section, name in VARIANTS.items():
        keys = tree.get(section, {})
        tree[section] = {"name": name, **keys} if isinstance(keys, Mapping) else keys
    keys = tree["objective"]
    return {**tree, "objective": with_preset(keys)} if isinstance(keys, Mapping) else tree
