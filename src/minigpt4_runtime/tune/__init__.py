"""HOW A MODEL LEARNS: dialogues about pictures → another projection for the same model.

Owns   the reading of training data, the loss of answers, the steps, and what goes on after a stop.
Takes  a model folder and a .jsonl of messages; gives an adapter file, which `adapter` of
       `MiniGPT4.load` takes.
Never  changes the model folder. Language model and image side stay as they are: this is the second
       stage of the original (Zhu et al., 2023), which trains the projection alone.
"""
