"""What a run reads, told apart by content: a file may change while its name stays, and a
configuration be written otherwise while its meaning stays."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vpgea_fast.config import Config, DataConfig, DataFile, as_dict, renewed, resolve
from vpgea_fast.data import DataError, fingerprint, load_questions
from vpgea_fast.estimate.choice import settled
from vpgea_fast.objectives import reads_reference
from vpgea_fast.weights import model_digest


class Inputs:
    """Fingerprints by name of the files of a sweep's runs. Each is read once, when it is first
    asked for. DataError for what cannot be read."""

    def __init__(self) -> None:
        self._known: dict[Hashable, str] = {}

    def of(self, cfg: Config) -> dict[str, str]:
        """What a run of `cfg` trains with; what it is evaluated on comes from `questions`."""
        models = [cfg.model.path]
        # One that no objective reads changes no run.
        if reads_reference(cfg.objective) and cfg.model.reference_path is not None:
            models.append(cfg.model.reference_path)
        if cfg.posterior.path is not None:
            models.append(cfg.posterior.path)
        # Classes of the user's, by their files: a name stays while its code changes.
        code = [getattr(cfg.objective, "target", None), cfg.verify.target]
        return {
            **{f"model {path}": self._once(("model", path), path) for path in models},
            **{f"data.train {f.path}": self._asked(f, cfg.data) for f in cfg.data.train},
            **{f"code {name}": self._once(("code", name), name) for name in code if name},
            **{f"engine.paths {file}": self._once(("file", file), file) for file in _paths(cfg)},
        }

    def questions(self, files: Sequence[DataFile], data: DataConfig) -> dict[str, str]:
        """Of the questions that evaluate all runs."""
        return {f"eval.data {file.path}": self._asked(file, data) for file in files}

    def _asked(self, file: DataFile, data: DataConfig) -> str:
        # By its questions and not its bytes: the keys that say where they stand count too.
        key = file, data
        if key not in self._known:
            self._known[key] = fingerprint(load_questions(file, data).questions)
        return self._known[key]

    def _once(self, key: tuple[str, str], name: str) -> str:
        # All runs share the model: its files are read once.
        if key not in self._known:
            digests = {"model": model_digest, "code": _code, "file": file_digest}
            self._known[key] = digests[key[0]](name)
        return self._known[key]


def _paths(cfg: Config) -> tuple[str, ...]:
    return cfg.replay.paths if cfg.engine.name == "replay" else ()


def file_digest(file: str | Path) -> str:
    """128 bits of BLAKE2b over the bytes of a file, in hex. DataError where it cannot be read."""
    try:
        with Path(file).open("rb") as opened:
            return hashlib.file_digest(opened, "blake2b").hexdigest()[:32]
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}; bring it back") from error


def _code(target: str) -> str:
    """Of the file of `package.module:name`; none where a module has no file."""
    # Found and not imported, but for the packages above it: a user's module may take seconds.
    spec = importlib.util.find_spec(target.partition(":")[0])
    return "" if spec is None or spec.origin is None else file_digest(spec.origin)


def changed(known: dict[str, str], now: dict[str, str]) -> str | None:
    """The first name whose content differs from what is known; None where all is the same."""
    # Of both sides: what only one of them has read is a change too.
    names = {**now, **known}
    return next((name for name in names if known.get(name) != now.get(name)), None)


def meaning(sections: Mapping[str, Any], source: str = "configuration") -> dict[str, Any]:
    """Return the sections of a record as they are read today, for one process of this device.

    Two records are of one configuration where these are equal. An older one has keys of its version
    and lacks later ones, which have their defaults; null and what it becomes here are one value.
    ConfigError for a record that no longer is a configuration.
    """
    cfg = resolve(renewed(sections), source)
    cuda = cfg.model.device != "cpu" and torch.cuda.is_available()
    return as_dict(settled(cfg, world=1, cuda=cuda))
