"""HOW A MODEL LEARNS: dialogues about pictures → an adapter for the same model.

Owns   the reading of training data, the loss of answers, the steps, and what goes on after a stop.
Takes  a model folder and a .jsonl of messages; gives an adapter, which `adapter` of
       `MiniGPT4.load` takes.
Never  changes the model folder. What learns stands beside it: the projection, as in the second
       stage of the original (Zhu et al., 2023), the Q-Former, and LoRA on the language model.
"""
