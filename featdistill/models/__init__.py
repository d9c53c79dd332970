"""Experts: backbone, head and preprocessing as one thing that scores, saves and loads (section 4.1, Table 2).

`backbones` names the image encoders; `encoders` and `open_clip_encoders` give timm's and open_clip's models
one interface; `masking` is MPFT's texture-aware masking (arXiv 2601.03586), with `token_maps` and
`token_dropping`; `released` reads the authors' released experts.
"""
