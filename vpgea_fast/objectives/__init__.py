"""Objectives: each turns scored paths into the additive parts of a loss; rows.py does the rest.

The registry is `METHODS`. The section `objective` of a configuration is one of these types, chosen
by its `name`; `custom` is a class of the user's own. A new objective is one type here and one row
in tests/test_objectives.py: nothing outside this folder names a method.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, PlainSerializer, TypeAdapter, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass, is_pydantic_dataclass
from pydantic_core import InitErrorDetails, PydanticCustomError

from vpgea_fast.names import Score
from vpgea_fast.objectives.base import (
    Draws,
    Keys,
    Objective,
    Term,
    Terms,
    policy_rows,
    reads_reference,
    reference_rows,
    scores_answers,
)
from vpgea_fast.objectives.checks import ask, at_step, check_objective, check_terms
from vpgea_fast.objectives.length_rewards import LENGTH_REWARDS, LengthReward
from vpgea_fast.objectives.likelihood import NormalisedVeriFree, Rlt, VeriFree
from vpgea_fast.objectives.policy_gradient import (
    Cispo,
    Dapo,
    DrGrpo,
    Grpo,
    Gspo,
    PolicyGradient,
    Reinforce,
    Rloo,
)
from vpgea_fast.objectives.recording import Recording
from vpgea_fast.objectives.supervised import BestOfRft, HintRft, Rft, Sft
from vpgea_fast.objectives.vpgea import Vpgea
from vpgea_fast.objectives.vr import Vr, VrPhi, VrTheta
from vpgea_fast.values import STRICT, nearest, one_line

__all__ = [
    "DEFAULT",
    "LENGTH_REWARDS",
    "METHODS",
    "STRICT",
    "BestOfRft",
    "Cispo",
    "Custom",
    "Dapo",
    "DrGrpo",
    "Draws",
    "Grpo",
    "Gspo",
    "HintRft",
    "Keys",
    "LengthReward",
    "NormalisedVeriFree",
    "Objective",
    "ObjectiveConfig",
    "PolicyGradient",
    "Recording",
    "Reinforce",
    "Rft",
    "Rloo",
    "Rlt",
    "Sft",
    "Term",
    "Terms",
    "VeriFree",
    "Vpgea",
    "Vr",
    "VrPhi",
    "VrTheta",
    "ask",
    "at_step",
    "check_terms",
    "guard_only",
    "policy_rows",
    "reads_reference",
    "reference_rows",
    "scores_answers",
    "with_preset",
]

TARGET = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"


@dataclass(frozen=True, config=STRICT)
class Custom(Keys):
    """An objective of your own: a class with the methods of `Objective`. Its keys stand beside
    `target`."""

    name: Literal["custom"] = "custom"
    """A class of your own."""
    target: str = Field(kw_only=True)
    """`package.module:Class`: a frozen pydantic dataclass, best a subclass of
    `vpgea_fast.objectives.Keys`. It is found as modules are, or in the working directory."""


METHODS: dict[str, type] = {
    kind.name: kind
    for kind in (
        *(Vpgea, Grpo, DrGrpo, Dapo, Gspo, Cispo, Rloo, Reinforce),
        *(VeriFree, NormalisedVeriFree, Rlt),
        *(Sft, Rft, BestOfRft, HintRft),
        *(Vr, VrTheta, VrPhi),
    )
}
"""Name -> its type, whose fields are the keys of the section."""
DEFAULT = Vpgea


def with_preset(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section, below them those of its preset: what is given wins."""
    # An unknown name or preset passes here: the validation after it has the better words.
    presets = getattr(METHODS.get(str(section.get("name"))), "PRESETS", {})
    return {**presets.get(str(section.get("preset", "paper")), {}), **section}


def guard_only(objective: Objective) -> frozenset[Score]:
    """The log-probs that nothing but the leak guard reads: what it costs."""
    if not isinstance(objective, Vpgea):
        return frozenset()
    return objective.needs() - objective.unguarded_needs()


@functools.cache
def custom_type(target: str) -> type:
    """The type of a section with this target: the user's class, and the keys `name` and `target`.

    ValueError, in one line, for a target that cannot be imported or is no objective.
    """
    module, _, attribute = target.partition(":")
    try:
        # Last, so that a file here shadows no module of an installed package.
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        kind: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise ValueError(f"cannot import {module}: {one_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(kind, part):
            raise ValueError(f"{module} has no {attribute}")
        kind = getattr(kind, part)
    if not (isinstance(kind, type) and is_pydantic_dataclass(kind) and _is_frozen(kind)):
        raise ValueError(
            f"{target} is no frozen pydantic dataclass; decorate the class with "
            "pydantic.dataclasses.dataclass(frozen=True, config=vpgea_fast.objectives.STRICT)"
        )
    # Before any path is drawn: a method that is missing would end the run in its first step.
    missing = [name for name in METHOD_NAMES if not hasattr(kind, name)]
    if missing:
        raise ValueError(
            f"{target} has no {', '.join(missing)}; expected draws(), needs() and terms() as in "
            "vpgea_fast.objectives.Objective, and the rest from vpgea_fast.objectives.Keys"
        )
    # The section's own keys, as fields of a subclass: config.yaml then holds them, and a resume
    # finds the class again.
    names = {"name": Literal["custom"], "target": str}
    values = {"name": "custom", "target": target, "__module__": kind.__module__}
    whole = type(kind.__name__, (kind,), {"__annotations__": names, **values})
    return dataclass(frozen=True, config=STRICT)(whole)


# What trainer, check, estimate and rows ask of any objective.
METHOD_NAMES = ("norm", "norm_constant", "denominator", "draws", "needs", "terms", "at", "notes")


def _is_frozen(kind: Any) -> bool:
    return kind.__dataclass_params__.frozen


def _read(value: Any, _: Any) -> Any:
    """An objective as it is, or the one that a section describes."""
    objective = value if not isinstance(value, Mapping) else _made(value)
    if any(not hasattr(objective, name) for name in METHOD_NAMES):
        raise ValueError(f"got {json.dumps(value, default=str)}, expected keys and values")
    check_objective(objective)
    return objective


def _made(section: Mapping[str, Any]) -> Any:
    kind: Any = _SECTION
    # The user's class is found by its target; all others by their name.
    if section.get("name") == "custom" and isinstance(section.get("target"), str):
        if not re.fullmatch(TARGET, section["target"]):
            raise ValueError(f"target: got {section['target']!r}, expected package.module:Class")
        kind = custom_type(section["target"])
        _refuse_unknown(kind, section)
    # Through JSON: pydantic's strict mode takes lists for tuples there, and from Python not.
    return TypeAdapter(kind).validate_json(json.dumps(section), strict=True)


def _refuse_unknown(kind: Any, section: Mapping[str, Any]) -> None:
    """ValidationError for a key that the class lacks, with the nearest: its fields are no part of
    the configuration's own records, which would be searched otherwise."""
    known = [*kind.__pydantic_fields__]
    for key in section:
        if key in known:
            continue
        near = nearest(key, known)
        hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(known)}"
        error = PydanticCustomError("unknown_key", "unknown key; {hint}", {"hint": hint})
        details = InitErrorDetails(type=error, loc=(key,), input=section[key])
        raise ValidationError.from_exception_data(kind.__name__, [details])


def _write(objective: Any) -> dict[str, Any]:
    # By its own type: one of the user's is in no union.
    return TypeAdapter(type(objective)).dump_python(objective, mode="json")


_SECTION: Any = Annotated[Union[(*METHODS.values(), Custom)], Field(discriminator="name")]
if TYPE_CHECKING:
    ObjectiveConfig = Objective
else:
    ObjectiveConfig = Annotated[_SECTION, WrapValidator(_read), PlainSerializer(_write)]
"""The section `objective`: one of METHODS, or a class of the user's."""
