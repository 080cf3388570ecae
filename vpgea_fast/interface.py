"""docs/api.md: the public functions, from their docstrings.

Read from the source by `ast` and never imported: the page is the same whatever is installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent
WIDTH = 96
"""Columns of a signature before it is broken."""
API = {
    **dict.fromkeys(("losses", "distillation")),
    "integrations": (
        *("causal_lm_loss", "causal_lm_logprobs", "head_options", "LossModule"),
        *("CausalLoss", "CausalLogprobs"),
    ),
    "integrations.hf": ("FusedLossMixin", "enable"),
    "integrations.hosts": ("Switch",),
    "integrations.trl": ("enable", "Enabled"),
    "hf_trainer": ("VPGEATrainer", "VPGEAConfig"),
    "integrations.verl": ("enable", "Enabled", "FusedLinearForPPO", "linear_cross_entropy"),
    "integrations.torchtitan": ("FusedLoss", "fused_loss"),
    "advantage": None,
    "trainer": ("fit",),
    "callbacks": ("Callback", "Run", "StopTraining", "Ending"),
    "config": (
        *"load resolve dump as_dict changes parse_overrides read_sections ConfigError".split(),
    ),
}
"""Module -> its public names, in this order; None: every name without a leading underscore."""

Doc = ast.Module | ast.ClassDef | ast.FunctionDef


def page() -> str:
    """Make docs/api.md."""
    lines = [
        "# Python interface",
        "",
        "Generated from the docstrings by `python -m vpgea_fast.manual docs`. Do not edit.",
    ]
    for module, names in API.items():
        sources = _sources(module)
        lines += ["", f"## vpgea_fast.{module}", "", *_described(ast.parse(sources[0]))]
        for name, (node, source) in _public(sources, names).items():
            lines += ["", f"### {name}", "", "```py", *_signature(node, source), "```", ""]
            lines += [*_described(node), *_methods(node)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _sources(module: str) -> list[str]:
    """Read a module's file. Of a folder `__init__` comes first, whose docstring is the module's,
    then the others, which define what it passes on."""
    folder = ROOT.joinpath(*module.split("."))
    files = [folder / "__init__.py", *sorted(folder.glob("[!_]*.py"))]
    files = files if folder.is_dir() else [folder.with_suffix(".py")]
    return [file.read_text(encoding="utf-8") for file in files]


def _public(sources: Sequence[str], names: Sequence[str] | None) -> Mapping[str, tuple[Doc, str]]:
    """Collect documented classes and functions by name, with their source: those named, or all
    without an underscore."""
    # A name without a docstring is no part of the interface.
    found: dict[str, tuple[Doc, str]] = {
        node.name: (node, source)
        for source in sources
        for node in ast.parse(source).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    }
    wanted = [name for name in found if not name.startswith("_")] if names is None else names
    return {name: found[name] for name in wanted}


def _signature(node: Doc, source: str) -> list[str]:
    """Write a function's head, with one parameter per line where it is long, or a class's fields as
    they stand."""
    if isinstance(node, ast.ClassDef):
        fields = [item for item in node.body if isinstance(item, (ast.AnnAssign, ast.Assign))]
        # Fields as the source has them: their comments give shapes, which `ast` drops.
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        lines = source.splitlines()
        inside = [line for item in fields for line in lines[item.lineno - 1 : item.end_lineno]]
        return [f"class {node.name}{bases}:", *inside]
    assert isinstance(node, ast.FunctionDef)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    parameters = list(_parameters(node.args))
    head = f"{node.name}({', '.join(parameters)}){result}"
    # One line where it fits, as ruff would set it.
    if len(head) <= WIDTH:
        return [head]
    return [f"{node.name}(", *(f"    {part}," for part in parameters), f"){result}"]


def _methods(node: Doc) -> list[str]:
    """List the public methods and properties of a class."""
    lines = []
    for method in node.body if isinstance(node, ast.ClassDef) else ():
        if not isinstance(method, ast.FunctionDef) or method.name.startswith("_"):
            continue
        parameters = ", ".join([*_parameters(method.args)][1:])  # without self
        # `property` is the only decorator here, and a property is read, not called.
        called = "" if method.decorator_list else f"({parameters})"
        text = " ".join((ast.get_docstring(method) or "").split())
        lines.append(f"* `{method.name}{called}`: {text}")
    return ["", *lines] if lines else []


def _parameters(args: ast.arguments) -> Iterator[str]:
    """Write each parameter with its annotation and default, in the order of the source."""
    positional = [*args.posonlyargs, *args.args]
    # `ast` aligns defaults with the last parameters.
    defaults = [None] * (len(positional) - len(args.defaults)) + args.defaults
    for arg, default in zip(positional, defaults, strict=True):
        yield ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "")
    # `*args` already makes what follows it keyword-only; without it a bare star does.
    if args.vararg:
        yield f"*{ast.unparse(args.vararg)}"
    elif args.kwonlyargs:
        yield "*"
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "")
    if args.kwarg:
        yield f"**{ast.unparse(args.kwarg)}"


def _described(node: Doc) -> list[str]:
    """Turn a docstring into Markdown: prose as it stands, what is laid out in columns as code."""
    lines: list[str] = []
    for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
        inside = paragraph.split("\n")
        listed = inside[0].startswith("* ")
        # Markdown would run columns together.
        laid_out = not listed and any(re.match(r" |>>> ", line) or "   " in line for line in inside)
        lines += ["```text", *inside, "```", ""] if laid_out else [*inside, ""]
    return lines[:-1]
