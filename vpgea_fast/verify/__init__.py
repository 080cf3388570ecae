"""Do two answers mean the same? Checkers, in worker processes that can be killed.

pool.py starts the workers and kills them, checkers.py is their program and what "the same" means,
verdicts.py keeps verdicts on disk.
"""

from vpgea_fast.verify.pool import Verifier

__all__ = ["Verifier"]
