"""Published detectors as experts: `published:NAME` wherever an expert's folder is accepted.

`community_forensics`, `universal_fake_detect` and `rine` describe one detector each: architecture, names in
its file, preprocessing, license and source. `entry` is the form of a description, `files` fetches and checks
files, and `loading` turns a reference into an expert.
"""
