"""One image at a time: what an expert looks at (`explain`), and the page of `app.py` (`page`, `session`)."""
