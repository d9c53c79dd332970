"""Studies with the toolkit: the backbones of the paper's Table 2, and what each part of the method brings."""
