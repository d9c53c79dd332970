"""Bytes to pixels: image files, and members of zip and tar archives and of parquet files, read in place.

`reading` decodes an image, `archives` (with `archive_index`) and `parquet` find the bytes of a member or row,
and `equalization` gives images of all classes the same sizes and JPEG qualities.
"""
