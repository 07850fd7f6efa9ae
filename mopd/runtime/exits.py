"""How a run ends: what each kind of ending tells, and its exit code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mopd.errors import ConfigError, DidNotLearnError, MopdError, Stopped
from mopd.runtime.signals import INTERRUPTED, STOPPED


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """``message`` is for the user; ``everywhere``: each rank has its own, else all have the same.

    ``is_lost``: another rank ended, which is the one that knows why.
    """

    code: int
    message: str = ""
    is_error: bool = True
    everywhere: bool = False
    is_lost: bool = False


def ending_of(work: Callable[[], object]) -> Ending:
    """Does the work. What is no ending of a run, such as a mistake of mopd's own, is raised."""
    try:
        work()
    except ConfigError as error:
        return Ending(code=2, message=f"error: {error}")
    except DidNotLearnError as error:
        return Ending(code=1, message=f"error: {error}")
    except KeyboardInterrupt:
        said = "interrupted: the same command continues from the last checkpoint"
        return Ending(code=INTERRUPTED, message=said, is_error=False)
    except Stopped as error:
        return Ending(code=STOPPED, message=f"{error}; the same command continues", is_error=False)
    except MopdError as error:
        return Ending(code=1, message=f"error: {error}", everywhere=True)
    except RuntimeError as error:
        from mopd.student.parallel import is_lost_rank  # brings torch, which takes seconds

        if not is_lost_rank(error):
            raise
        return Ending(code=1, message=str(error), everywhere=True, is_lost=True)
    return Ending(code=0)
