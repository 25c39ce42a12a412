"""WHAT is said: messages as a prompt, text as ids, and ids as the text that a user reads.

Owns   templates, the tokenizer and the trimming of answers. Takes words; gives ids, and back.
Never  loads torch.
"""
