"""Codabench submissions: write and check the zip, compare it with the last one, keep a ledger of all."""
