"""ON WHAT it runs: devices and the few kernels that differ between them.

Owns   contracts (what a device must offer), the table of devices, and the reference kernels.
Never  knows the engine; no backend knows another.
"""
