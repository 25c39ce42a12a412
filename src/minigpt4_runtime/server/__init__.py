"""HTTP ↔ api: an OpenAI-compatible server.

Owns   the protocol, the guards around it, and the life of the serving process.
Takes  a loaded MiniGPT4 and a ServerConfig. `app.create_app` makes the application, to which
       others may be mounted; `listen.serve` runs it.
Never  touches the model, the engine or a backend: all goes through the api.
"""
