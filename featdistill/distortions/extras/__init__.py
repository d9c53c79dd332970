"""Distortions of film, video, files and screens, 5 levels each.

The authors' training policy used them, but they are not among the paper's 35, so they have a library of their
own; a policy draws from them if it lists the library `extras`.
"""
