"""VPG-EA: variational posterior guidance with efficiency awareness, trained end to end.

`vpgea_fast.fit`, `Callback`, `StopTraining` and `Ending` are those of `vpgea_fast.trainer`, which
is imported when the first of them is asked for: `import vpgea_fast` alone costs nothing.
"""

__version__ = "0.1.0"

_OF_THE_TRAINER = ("Callback", "Ending", "StopTraining", "fit")


def __getattr__(name: str) -> object:
    if name in _OF_THE_TRAINER:
        from vpgea_fast import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
