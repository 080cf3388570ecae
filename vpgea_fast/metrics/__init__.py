"""What a run tells of itself. The only room that may import a logger.

log.py is metrics.jsonl and paths.jsonl, console.py the terminal, alarms.py what is wrong with a
run, measures.py times, eps3 and FLOPs, machine.py the environment. book.py, beside this folder,
says what every metric means.
"""

from vpgea_fast.metrics.alarms import Alarms
from vpgea_fast.metrics.console import Console, clock_time, step_line
from vpgea_fast.metrics.log import (
    METRICS,
    PATHS,
    MetricsWriter,
    finite,
    missing_steps,
    read_steps,
)
from vpgea_fast.metrics.machine import environment
from vpgea_fast.metrics.measures import (
    PHASE,
    ModelFlops,
    PhaseTimer,
    eps3,
    eps3_mean,
    mfu,
    model_flops,
    peak_flops,
)

__all__ = [
    "METRICS",
    "PATHS",
    "PHASE",
    "Alarms",
    "Console",
    "MetricsWriter",
    "ModelFlops",
    "PhaseTimer",
    "clock_time",
    "environment",
    "eps3",
    "eps3_mean",
    "finite",
    "mfu",
    "missing_steps",
    "model_flops",
    "peak_flops",
    "read_steps",
    "step_line",
]
