"""vLLM, the only rooms that import it: in a training process, in a child of it, or at a server.

engine.py    the engine here                 remote.py    the engine at a server
options.py   what vLLM is told               client.py    calls to a server, and its key
transfer.py  weights, both ends              serve.py     `vpgea serve`, the server itself
lifetime.py  processes that vLLM starts      versions.py  which vLLM fits
"""
