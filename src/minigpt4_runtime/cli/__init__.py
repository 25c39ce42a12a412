"""The command `minigpt4`: one thin file per command, typed words in, one call out."""
