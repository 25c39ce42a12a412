"""ON WHAT it runs: CPU, CUDA and Ascend devices, and groups of ranks.

Owns   the device contract and the table of devices. Takes the name that a user typed.
Never  knows the engine; no device module imports another.
"""
