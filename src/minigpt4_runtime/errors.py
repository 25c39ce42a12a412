"""Every error this package raises on purpose.

MiniGPT4Error
├── ConfigError                a setting or a config.json that cannot work
├── CheckpointError            weight files that are missing, damaged or do not belong together
├── RequestError               one request that cannot be served; others go on
│   ├── GrammarError           a JSON schema or a regex that an answer cannot be held to
│   ├── ImageError             a picture that cannot be read or is too large
│   └── PromptTooLongError     a prompt that does not fit into the model's context
└── BackendUnavailableError    a device or a package that this machine does not have
    └── RankLostError          a process that held a part of the model is gone, or does not answer

A message says what is wrong, what was seen and what to do. Owns words only; imports nothing.
"""


class MiniGPT4Error(Exception):
    """The root: catch it to catch everything this package raises on purpose."""


class ConfigError(MiniGPT4Error):
    """A setting, a flag or a config.json holds something that cannot work."""


class CheckpointError(MiniGPT4Error):
    """Weight files are missing, damaged or do not belong together."""


class RequestError(MiniGPT4Error):
    """One request cannot be served. It harms no other request."""


class GrammarError(RequestError):
    """A JSON schema or a regex cannot be followed, or not within the limits."""


class ImageError(RequestError):
    """A picture cannot be read, or is larger than the limits allow."""


class PromptTooLongError(RequestError):
    """A prompt does not fit; `num_tokens` and `limit` say by how much.

    `holder` is the place that is too small: the model's context, the engine's cache or the window.
    """

    def __init__(
        self,
        num_tokens: int,
        limit: int,
        holder: str = "the model's context",
        advice: str = "Shorten the text, drop older turns, or let them leave with cache_window.",
    ) -> None:
        super().__init__(
            f"The prompt has {num_tokens} tokens and {holder} holds {limit}, "
            f"one of them for the answer. {advice}"
        )
        self.num_tokens = num_tokens
        self.limit = limit


class BackendUnavailableError(MiniGPT4Error):
    """A device or an optional package is not available on this machine."""


class RankLostError(BackendUnavailableError):
    """A process that held a part of the model is gone, or does not answer: the model is lost."""
