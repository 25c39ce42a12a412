"""WHICH FORM an answer has: a JSON schema or a regex as the ids that may come next."""
