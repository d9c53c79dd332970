"""Codabench submissions: write and check the zip, compare it with the previous one, keep a ledger.

`profiles` are the conventions of the zip, `writing` makes one, `check` checks anybody's, `difference` and
`ledger` look back, and `command` is what `make_submission.py` runs.
"""
