"""Objectives: each turns scored paths into (context, tokens, coefficient per token) rows."""
