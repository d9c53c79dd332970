"""A second tier of distortions beside the paper's 35: film, video, files and screens, 5 levels each.

Kinds that the authors' training policy used and the paper's 35 lack. They are registered apart, so that "the
35" stays the paper's count; a policy draws from them where it names the library `extras`.
"""
