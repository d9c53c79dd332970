"""Experts: backbone, head and preprocessing in one module that can be saved and loaded (4.1, Table 2).

`expert` is that module; `backbones` lists the image encoders by name; `encoders` is their interface, which
`timm_encoders` and `open_clip_encoders` implement; `timm_transformers`, `tiny` and `weights` are what they
are built from, `features` is what an expert's head gets from them, and `frozen` identifies their layers.
`masking` is our reading of MPFT (arXiv 2601.03586), and `token_maps` shows what an expert looks at;
`released` and `released_files` read the authors' released experts.
"""
