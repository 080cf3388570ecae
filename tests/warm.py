"""What the server of ranks.py does once, so that not every process that it forks does it."""

from vpgea_fast.config.schema import known_keys

# Resolves the types of every section: 0.1 s.
known_keys()
