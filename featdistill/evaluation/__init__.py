"""From scores to figures (paper, Table 2).

`metrics` has the challenge's AUCs, error rates and calibration, `intervals` the 95 % intervals of AUCs, and
`stratified` AUCs over images that are alike. `audits` reads what an audit sets next to them.
`splits` joins predictions and labels and collects all results of a split, with `experts` and `breakdowns`;
`comparison` ranks runs over the same images, `protocols` scores by the sets of GenImage and
UniversalFakeDetect, and `leaderboard` adds the published results. `tables` prints them.
"""
