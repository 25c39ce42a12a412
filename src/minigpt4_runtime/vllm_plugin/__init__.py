"""What vLLM needs to serve a model folder: its config, tokenizer, prompts, pictures and model.

Owns   the entry point `vllm.general_plugins`, and the classes that vLLM loads through it.
Takes  a model folder as it is; vLLM computes the language model, and our modules the image side.
Never  is imported by the runtime. Only vLLM loads it.
"""
