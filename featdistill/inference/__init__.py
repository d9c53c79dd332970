"""Scoring images with an ensemble (paper, sections 4.4 and 4.8, equations 3 and 4).

`predictor` is an ensemble ready to score, `scoring` its loop over batches, `compute` devices and precisions,
`fusion` the mean of the experts, `jobs` and `journal` predictions files that continue after a kill.
"""
