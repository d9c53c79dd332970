"""The robustness sweep: the AUC of an ensemble under every distortion at every level."""
