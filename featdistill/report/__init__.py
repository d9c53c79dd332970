"""The HTML report: one file with the tables, charts and pictures of the figures in `evaluation`.

`page` puts it together from `split`, `experts`, `gallery` and `charts`; `markup` fills in `templates/`.
"""
