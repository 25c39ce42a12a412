"""WHAT is kept between steps: keys and values in blocks, and image embeddings.

Owns   the blocks' memory, their owners, and the least recently used images.
Takes  block numbers, content keys and digests.
"""
