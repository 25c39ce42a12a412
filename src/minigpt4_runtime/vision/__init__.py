"""IN WHAT the image side runs: torch modules, or a graph compiled by ONNX Runtime or Ascend.

Owns   the encoder contract and the table of runtimes. Takes pixels; gives image embeddings.
"""
