"""The public names of MiniGPT-4 Runtime."""
