"""The robustness sweep: the AUC of an ensemble under every distortion at every level (paper, section 4.2).

`plan` chooses the operations, levels and images, `run` scores them and computes AUCs, `tables` prints them.
"""
