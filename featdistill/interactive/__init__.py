"""One image at a time: the page of `app.py`, and maps of what an expert looks at."""
