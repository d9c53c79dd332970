"""What a source command writes: a manifest, and copies of images where it makes any."""
