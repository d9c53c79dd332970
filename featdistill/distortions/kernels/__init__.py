"""What distortions are built from: filters, warps, noise tables, codecs, watermarks, scratch memory."""
