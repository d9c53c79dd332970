"""Distortions, and how they are drawn (paper, sections 3 and 4.2).

`official` has the challenge's 12 operations (section 4.2), `extended` the paper's 35, `extras` 14 more, and
`evaluation` those of the validation and test splits (section 3); `libraries` lists them all. A `policy` (with
its `presets`) draws a `plan` for each image. `kernels` has the building blocks of operations, `command` the
command line of the libraries, and `adapters` the distortions that need somebody else's package.
"""
