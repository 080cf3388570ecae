"""Importing this enables `integrations.verl` in the process that does; for verl's workers:

actor_rollout_ref.model.external_lib=vpgea_fast.integrations.verl_enabled
"""

from vpgea_fast.integrations import verl

SWITCH = verl.enable()
