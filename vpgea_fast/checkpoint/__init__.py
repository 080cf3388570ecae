"""Checkpoints that outlive a kill at any moment, the claim on a run directory, and the export.

protocol.py is the order of a save and a load, state.py what they hold, dcp.py how torch cuts it,
files.py the files and the run directory, export.py the Hugging Face directory.
"""

from vpgea_fast.checkpoint.export import export_model
from vpgea_fast.checkpoint.files import (
    CheckpointError,
    RunLock,
    claim_run_dir,
    truncate_jsonl,
    write_text,
)
from vpgea_fast.checkpoint.generators import restore_rng, rng_state
from vpgea_fast.checkpoint.protocol import (
    Saver,
    best_step,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
    perform,
    read_rollout,
    save_checkpoint,
    saved_steps,
)
from vpgea_fast.checkpoint.state import Checkpoint, Kept, put_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Kept",
    "RunLock",
    "Saver",
    "best_step",
    "claim_run_dir",
    "export_model",
    "find_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "perform",
    "put_weights",
    "read_rollout",
    "restore_rng",
    "rng_state",
    "save_checkpoint",
    "saved_steps",
    "truncate_jsonl",
    "write_text",
]
