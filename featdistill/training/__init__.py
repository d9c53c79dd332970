"""Both training stages (paper, sections 4.3, 4.7 and 5.1), and a student of several experts.

`recipe` reads recipes (their settings are in `featdistill.recipe_groups`), `recipe_list` prints them, and
`memory` estimates what they need; `objectives` (equations 1 and 2) and `contrastive` (5.1) hold the losses,
`extras` networks that serve a loss alone, `teachers` the frozen and the momentum teacher (equation 5),
`averages` those of the weights, `tasks` one training step of each stage, `student` that of a student of
several experts, `student_targets`, `student_banks` and `student_flags` its teachers; `trainer` the loop,
`stages` the path from a recipe to a finished run, and `run_folder` its files.
`from_tokens` lets a run start before the last blocks, and `top_tokens` chooses those of a feature.
`finetuning`, `compilation`, `optimizer`, `passes`, `processes`, `sharding`, `holdout`, `selection` (the best
epoch) and `log` are parts of the loop; `plot_run` plots its progress.
"""
