"""Embed once, try everything: features of many views kept on disk, and heads that are fitted on them.

`views` makes the pictures of an image; `embed` runs a frozen backbone over them, with the flags of
`embed_flags`; `writing` puts what it returns on disk, and `store` opens it. `heads` are logistic regressions
and perceptrons along a path of regularizations, chosen by grouped folds. `probe` fits them, with the flags of
`probe_flags`: `joined` puts features of several banks side by side, `probe_plan` decides what is held out,
`figures` are AUCs over views and folds, and `probe_files` writes experts, scores and tables.
"""
