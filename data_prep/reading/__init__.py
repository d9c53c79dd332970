"""What a source gives: files in folders, members of archives, parts of parquet files."""
