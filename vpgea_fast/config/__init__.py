"""Configuration: one frozen dataclass a stage, validated at birth, from YAML and `--section.key
value`.

An unknown key is an error that names the nearest known one; for a key of an older version it gives
the new one. A variant (the objective, the engine) is a type of its own, so no field is read
by one branch only. Values are taken as strict_yaml.py reads them, in a file and on the command line
alike, and never converted. `resolve` gives the record, `dump` the YAML that makes it again.
"""

from vpgea_fast.config.errors import ConfigError
from vpgea_fast.config.inputs import (
    DataConfig,
    DataFile,
    ModelConfig,
    ParallelConfig,
    PosteriorConfig,
    PromptConfig,
    RunConfig,
)
from vpgea_fast.config.method import (
    EngineConfig,
    HfEngineConfig,
    ReplayEngineConfig,
    RolloutConfig,
    ScoringConfig,
    VerifyConfig,
    VllmEngineConfig,
)
from vpgea_fast.config.outputs import CheckpointConfig, EvalConfig, MetricsConfig
from vpgea_fast.config.reading import (
    ROWS,
    SHIPPED,
    as_dict,
    changes,
    dump,
    find,
    load,
    parse_overrides,
    read_sections,
    resolve,
)
from vpgea_fast.config.records import Config, LossConfig, OptimConfig, TrainConfig
from vpgea_fast.config.renamed import RENAMED, renewed
from vpgea_fast.config.schema import VARIANTS, known_keys
from vpgea_fast.values import Exponent, PositiveInt, expand_home, one_line, printable

__all__ = [
    "RENAMED",
    "ROWS",
    "SHIPPED",
    "VARIANTS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataFile",
    "EngineConfig",
    "EvalConfig",
    "Exponent",
    "HfEngineConfig",
    "LossConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PositiveInt",
    "PosteriorConfig",
    "PromptConfig",
    "ReplayEngineConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoringConfig",
    "TrainConfig",
    "VerifyConfig",
    "VllmEngineConfig",
    "as_dict",
    "changes",
    "dump",
    "expand_home",
    "find",
    "known_keys",
    "load",
    "one_line",
    "parse_overrides",
    "printable",
    "read_sections",
    "renewed",
    "resolve",
]
