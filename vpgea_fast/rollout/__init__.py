"""Rollout engines: one protocol (generate, load_weights, close), one file per engine."""
