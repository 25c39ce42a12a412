"""The chat page: a client of the server, as any other could be."""
