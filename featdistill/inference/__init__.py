"""Scoring images with an ensemble (paper, sections 4.4 and 4.8, equations 3 and 4).

`predictor` loads an ensemble, `scoring` runs it over batches, `compute` and `float8` choose device and
precision, `fusion`, `fusion_fit` and `fusion_weights` combine the experts; `jobs`, `journal` and `processes`
write predictions files that a killed run continues. `detector` scores pictures for a program, one call at a
time, and `single_images` shows its rows. `flags` declares the ensemble's flags for all commands.
"""
