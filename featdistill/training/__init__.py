"""Both training stages (paper, sections 4.3, 4.7 and 5.1).

`recipe` holds every setting, `objectives` (equations 1 and 2) and `contrastive` (5.1) the losses, `teachers`
the frozen and the momentum teacher (equation 5), `tasks` one training step of each stage, `trainer` the loop,
`stages` the way from a recipe to a finished run, and `run_folder` its files.
"""
