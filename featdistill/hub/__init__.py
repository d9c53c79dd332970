"""Experts on the Hugging Face Hub: `hub:OWNER/NAME[@REVISION]` among the folders of `--experts`, and `push`.

`download` turns a reference into a folder of the local cache. `push` decides which files go out, free of this
machine's paths, and uploads them as one commit; `model_card` writes their README from what `training_data`
and the expert's card know; `push_flags` has the command line.
"""
