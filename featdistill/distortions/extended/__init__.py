"""The paper's extended library: 35 distortions in 8 categories, 5 levels each, on uint8 images.

Each is modelled on what happens to light, sensor, file or scene; the modules of `featdistill/extended/`, one
for each category, say how. The categories are the paper's (section 4.2); where it names a distortion, it is
here under that name. The paper gives no parameters, so models and levels are ours.
"""
