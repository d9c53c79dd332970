"""What the distortions are built from: codecs, filters, noise tables, warps and watermarks."""
