"""WHAT is seen: an image in any form that people have → the pixels that the model takes.

Owns   formats, limits, scaling and resizing, and the guarded fetching of addresses.
Takes  paths, bytes, URLs, PIL images, arrays and tensors; gives RGB images and pixels.
Never  loads torch.
"""
