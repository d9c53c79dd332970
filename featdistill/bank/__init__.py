"""Embed once, try everything: features of many views kept on disk, and heads that are fitted on them.

* `heads`: logistic regressions and perceptrons along a path of regularizations, chosen by grouped folds.
"""
