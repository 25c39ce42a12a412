"""WHAT is computed: the mathematics of the three towers, in plain torch.

Owns   every forward pass. Takes tensors and configs; gives tensors.
Never  reads a file, names a device, or keeps state between calls.
"""
