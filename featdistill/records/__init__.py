"""The tables that stages hand on: manifests, label files, predictions, and what each was made from."""
