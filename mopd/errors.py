"""The exceptions users meet. Each is also a standard type, so that callers may catch either."""


class MopdError(Exception):
    """Root of every error that mopd raises on purpose."""


class ConfigError(MopdError, ValueError):
    """A recipe that cannot run: one line with the key and the remedy (exit code 2)."""


class ArgumentError(MopdError, ValueError):
    """A call of the library with arguments that do not fit: one line with cause and remedy."""


class ArtifactError(MopdError, RuntimeError):
    """A file on disk (projection, journal, checkpoint, world) that is missing, stale or damaged."""


class StaleWeightsError(MopdError, RuntimeError):
    """A sampler was handed a policy version that is not newer than the one it has."""


class SamplerError(MopdError, RuntimeError):
    """The engines of rollout.backend do not answer, or not with what was asked for."""


class TeacherError(MopdError, RuntimeError):
    """A teacher's answer is outside its contract (shape, ids, log-probabilities)."""


class TeacherExhausted(TeacherError):
    """No replica of a teacher answered within its budget; ``teacher`` is its name."""

    def __init__(self, teacher: str, message: str) -> None:
        super().__init__(teacher, message)
        self.teacher = teacher

    def __str__(self) -> str:
        return f"teachers.{self.teacher}: {self.args[1]}"


class DidNotLearnError(MopdError, RuntimeError):
    """The run ended and no domain improved."""


class Stopped(MopdError):
    """The run was asked to end (SIGTERM), and has saved a checkpoint of all it did."""
