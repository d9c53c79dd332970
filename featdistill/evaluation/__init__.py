"""Scores to figures: AUCs with intervals, breakdowns, comparisons, benchmark protocols (paper, Table 2)."""
