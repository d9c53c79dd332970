"""The paper's extended library: 35 distortions in 8 categories, 5 levels each (section 4.2).

There is one module per category. Each distortion models what happens to light, sensor, file or scene. Where
the paper names a distortion, that name is used; it gives no parameters, so models and levels are ours.
"""
