"""Experts as one graph file that needs neither this toolkit nor PyTorch: `python -m featdistill export`.

`flags` is the command line and `run` its work: `tracing` turns experts and their fusion into an ONNX file,
`formats` changes its precision and format, `gate` compares it with the experts on real images and refuses it
if it differs, and `description` says in words how an image becomes its input. `example` is copied next to the
graph.
"""
