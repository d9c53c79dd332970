"""Graph files as experts: ONNX files run by ONNX Runtime or OpenVINO, and OpenVINO's own files, on the CPU.

`graph` runs one file, `graph_expert` gives it the interface of an expert, and `exported` reads the folders of
exported experts. The packages are those of `pip install ".[export]"`.
"""
