"""Published detectors as experts: `published:NAME` among the folders of `--experts`.

`community_forensics`, `universal_fake_detect`, `rine`, `clipdet` and `safe` describe one detector each:
architecture, names in its file, preprocessing, license and source; `graphs` describes two in ONNX files.
`entry` is the form of a description, `files` fetches and checks files, and `loading` turns a reference into
an expert.
"""
