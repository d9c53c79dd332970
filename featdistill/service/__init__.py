"""The HTTP service of `python -m featdistill serve`, an optional extra: scores for programs on a network.

`flags` are checked before PyTorch is loaded; `server` listens and stops; `app` answers; `bodies` reads what
clients send, within limits; `batching` scores the images of all requests together; `logs` and `metrics` tell
the operator. docs/service.md describes the interface.
"""
