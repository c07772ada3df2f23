"""Errors that a user can do something about. Each is one sentence that says what is wrong and what to do."""


class DiffusionGemmaError(Exception):
    """Base of every error this package raises on purpose; the command line prints it and exits 1."""


class CheckpointError(DiffusionGemmaError):
    """A checkpoint's files are missing, damaged, of another model, or cannot be converted as asked."""


class PromptError(DiffusionGemmaError):
    """A prompt, its messages or an option of the request cannot be used."""


class BusyError(DiffusionGemmaError):
    """A cache or a conversation is in use by another request; the same call works once that one is over."""


class CanvasError(DiffusionGemmaError):
    """A starting canvas does not fit the model or the request."""


class AdapterError(DiffusionGemmaError):
    """An adapter's files or settings cannot be used, or not with this model."""


class TrainingError(DiffusionGemmaError):
    """Training data or settings cannot be used, or training cannot go on."""


class MissingBackendError(DiffusionGemmaError, ImportError):
    """MLX is not installed, or without a backend for this machine."""


class MemoryWarning(UserWarning):
    """A model fits this machine, but not with a long prompt."""
