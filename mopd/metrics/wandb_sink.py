"""Step lines for Weights & Biases. It may fail at any time; the training goes on."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mopd.metrics.sinks import StepLine
from mopd.metrics.text import replace_file

FOLDER = "wandb"  # in a run's directory, which W&B itself names like this
ID_FILE = "mopd-run-id"
INIT_TIMEOUT_S, FINISH_TIMEOUT_S = 30.0, 120.0
HIDDEN = "***"


class WandbSink:
    """One run of W&B per run's directory: who continues the one continues the other.

    ``WANDB_MODE=offline`` writes to ``<run>/wandb`` alone, for `wandb sync` later; so does a run
    that cannot reach W&B at its start, or has no key for it. What fails later is told once, and
    the sink is silent from then on.

    Args:
        directory: of the run; W&B writes to ``wandb`` in it.
        config: the resolved recipe, of which `public` is sent.
        say: tells a person.
    """

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        name: str,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._say = say
        self._run: Any = None
        self._wandb: Any = _imported(say)
        if self._wandb is not None:
            about = {"project": project, "name": name, "config": public(config)}
            self._start(directory, about)

    def _start(self, directory: Path, about: dict[str, Any]) -> None:
        settings = {**about, "id": run_id(directory), "dir": str(directory), "resume": "allow"}
        # The library raises whatever its network layers do: nothing of it may end a training.
        try:
            self._run = self._init(settings)
        except Exception as error:
            self._say(
                f"warning: W&B cannot be used now ({_line(error)}); {directory / FOLDER} gets "
                "everything, and `wandb sync` sends it later (`wandb login` if it lacks a key)"
            )
            try:
                self._wandb.teardown()  # its process holds the id
                self._run = self._init(settings, mode="offline")
            except Exception as failure:
                self._give_up(failure)

    def _init(self, settings: dict[str, Any], **more: Any) -> Any:
        """Without its own prints and without a copy of this process's: there is a terminal."""
        # Its description of the machine has this process's command line, and that may have words
        # for servers. The setting is a private one of the library, so it may be gone some day.
        known = self._wandb.Settings.model_fields
        private = {key: True for key in ("x_disable_meta",) if key in known}
        quiet = self._wandb.Settings(
            console="off",
            silent=True,
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            save_code=False,
            disable_git=True,
            **private,
        )
        return self._wandb.init(settings=quiet, **settings, **more)

    def log(self, step: int, line: StepLine) -> None:
        """A line of the same step joins the one before. W&B drops steps that it has already: when
        a run continues, they come again with the numbers that they had."""
        if self._run is not None:
            self._try(lambda: self._run.log(dict(line), step=step))

    def note(self, message: str) -> None:
        del message

    def truncate_from(self, step: int) -> None:
        """Nothing to forget: W&B deletes no history, see `log`."""
        del step

    def close(self) -> None:
        """Waits for what is not sent yet, at most ``FINISH_TIMEOUT_S``; ends W&B's process."""
        if self._wandb is None:
            return
        if self._run is not None:
            self._try(self._run.finish)
        self._try(self._wandb.teardown)
        self._run = self._wandb = None

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        self._say(f"warning: W&B gets no more of this run ({_line(error)}); the training goes on")


def _imported(say: Callable[[str], None]) -> Any:
    try:
        import wandb
    except Exception as error:  # its own dependencies may break in any way
        say(f"warning: W&B gets nothing of this run ({_line(error)}); pip install 'mopd[wandb]'")
        return None
    return wandb


def run_id(directory: Path) -> str:
    """The id that a run's directory keeps, made at its first start; another after
    ``run.overwrite``, which removes the directory."""
    path = directory / FOLDER / ID_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, secrets.token_hex(6))
    return path.read_text(encoding="utf-8").strip()


def public(values: Any, *, environment: dict[str, str] | None = None) -> Any:
    """``values`` of a recipe, nested, without what may be a secret.

    A recipe names the variables that hold keys. Hidden is what stands in it all the same: values
    of such variables, and the words for servers (``args``), which may hold a token.
    """
    known = os.environ if environment is None else environment
    names = set(_variables(values))
    return _without(values, hidden={known[name] for name in names if known.get(name)})


def _variables(values: Any) -> list[str]:
    """The names under ``api_key_env``, wherever they stand."""
    if isinstance(values, Mapping):
        own = [value for key, value in values.items() if key == "api_key_env" and value]
        return own + [name for value in values.values() for name in _variables(value)]
    if isinstance(values, list):
        return [name for value in values for name in _variables(value)]
    return []


def _without(values: Any, *, hidden: set[str]) -> Any:
    if isinstance(values, Mapping):
        return {
            key: [HIDDEN for _ in value]
            if key == "args" and isinstance(value, list)
            else _without(value, hidden=hidden)
            for key, value in values.items()
        }
    if isinstance(values, list):
        return [_without(value, hidden=hidden) for value in values]
    if isinstance(values, str):
        for secret in hidden:
            values = values.replace(secret, HIDDEN)
    return values


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
