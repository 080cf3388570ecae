"""Whether the Hugging Face Hub can be asked: known in seconds, where its own libraries try every
file six times, for minutes."""

from __future__ import annotations

import ssl
from functools import cache
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, is_offline_mode

PATIENCE_S = 5


def silent() -> bool:
    """Whether the Hub is wanted and does not answer. In offline mode nobody asks it, and what it
    holds may lie in a cache."""
    return not is_offline_mode() and not _answers(constants.ENDPOINT)


@cache
def _answers(endpoint: str) -> bool:
    """One request; any answer of a server is one."""
    try:
        # No library: huggingface_hub would try again, six times.
        urlopen(Request(endpoint, method="HEAD"), timeout=PATIENCE_S).close()
    except HTTPError:
        return True
    except OSError as error:
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # others may trust it
    return True
