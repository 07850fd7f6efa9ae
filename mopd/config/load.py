"""From a recipe name and command-line words to one validated `RunConfig`.

Layers, weakest first: the schema's defaults, the files named under `defaults:`, the recipe, the
overrides. Every mistake of a user ends as a ConfigError of one line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from yaml import MarkedYAMLError, YAMLError

from mopd.config.keys import check_keys, printable
from mopd.config.recipe_files import RECIPES
from mopd.config.schema import RunConfig
from mopd.errors import ConfigError

SUFFIXES = (".yaml", ".yml")
LAYERS = ("base", "cluster", "world", "world_opd", "world_vllm")  # files that recipes build on
STUDIES = "study"  # their directory: files of `mopd study`, which are no recipes
OVERRIDE = re.compile(r"(?P<key>[A-Za-z_][\w-]*(\.[\w-]+)*)=(?P<value>.+)", re.DOTALL)

Fill = Callable[[DictConfig], DictConfig]


def load_config(
    recipe: str | Path, overrides: Sequence[str] = (), *, fill: Fill | None = None
) -> RunConfig:
    """Merge, fill in, resolve and validate; raise ConfigError with key and remedy otherwise.

    `recipe` is the name of a file in `recipes/` or a path that ends in .yaml. `overrides` are words
    such as `train.steps=3` or `teachers.math.domains=[math]`. `fill` receives the merged recipe and
    returns it completed (keys that are not set are null); an override wins over what it writes.
    A teacher that is overridden with null is dropped.
    """
    top = _parse_overrides(overrides)
    layers = [_defaults(), *_read_layers(_find(recipe), ()), top]
    merged = _without_null_teachers(_merge(layers))
    config = _resolve(merged)
    if fill is None:
        return config
    # resolved before, too: filling in may take minutes, and a typing error should not
    return _resolve(_without_null_teachers(_merge([fill(merged), top])))


def _resolve(merged: DictConfig) -> RunConfig:
    with _one_line_errors("recipe"):
        values = OmegaConf.to_container(merged, resolve=True)
    assert isinstance(values, dict)
    check_keys(values, origin="after interpolation")
    return _validate(values)


def parse_arguments(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split command-line words into the recipe (`recipe=...`, exactly one) and the overrides."""
    recipes: list[str] = []
    overrides: list[str] = []
    for word in argv:
        if word.startswith("-"):
            raise ConfigError(
                f"option `{printable(word)}` is not known: keys are written without dashes, "
                "as in train.steps=3"
            )
        key, value = _split(word)
        if key == "recipe":
            recipes.append(value)
        else:
            overrides.append(word)
    if len(recipes) != 1:
        problem = "no recipe given" if not recipes else "more than one recipe given"
        raise ConfigError(f"{problem}: write recipe=<name>; {_available()}")
    return recipes[0], overrides


def dump_config(config: RunConfig) -> str:
    """Return the YAML of a resolved config; `load_config` reads it back as the same config."""
    values = _escape_interpolations(config.model_dump(mode="json"))
    return OmegaConf.to_yaml(OmegaConf.create(values))


def _escape_interpolations(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape_interpolations(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_escape_interpolations(child) for child in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def _defaults() -> DictConfig:
    """The schema's own defaults as the lowest layer, so that interpolation reaches them."""
    return OmegaConf.create(_escape_interpolations(RunConfig().model_dump(mode="json")))


def _find(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.suffix not in SUFFIXES:
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        raise ConfigError(f"recipe `{printable(str(recipe))}` does not exist; {_available()}")
    return path


def recipe_names() -> list[str]:
    """What ``recipe=`` takes beside a path."""
    found = sorted(
        path
        for path in RECIPES.rglob("*.yaml")
        if path.stem not in LAYERS and path.parent.name != STUDIES
    )
    return [path.relative_to(RECIPES).with_suffix("").as_posix() for path in found]


def _available() -> str:
    return f"recipes: {', '.join(recipe_names()) or 'none'}, or the path of a .yaml file"


def _read_layers(path: Path, above: tuple[Path, ...]) -> Iterator[DictConfig]:
    """Yield the layers of one file: those of its `defaults`, in order, then its own keys."""
    path = path.resolve()
    chain = (*above, path)
    if path in above:
        names = " -> ".join(printable(step.name) for step in chain)
        raise ConfigError(f"defaults: cyclic ({names}); remove one of these entries")
    layer = _read(path)
    for name in _default_names(layer, path):
        base = path.parent / (name if name.endswith(SUFFIXES) else f"{name}.yaml")
        if not base.is_file():
            beside = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml") if p != path))
            raise ConfigError(
                f"defaults: `{printable(name)}` of {printable(path.name)} does not exist; "
                f"beside it: {beside or 'none'}"
            )
        yield from _read_layers(base, chain)
    check_keys(_plain(layer), origin=printable(path.name))
    yield layer


def _default_names(layer: DictConfig, path: Path) -> list[str]:
    names = _plain(layer).get("defaults", [])
    layer.pop("defaults", None)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"defaults: expected a list of recipe names, got {printable(repr(names))} "
            f"({printable(path.name)})"
        )
    return [str(name) for name in names]


def _read(path: Path) -> DictConfig:
    with _one_line_errors(printable(path.name)):
        layer = OmegaConf.load(path)
    if not isinstance(layer, DictConfig):
        kind = "list" if isinstance(layer, ListConfig) else type(layer).__name__
        raise ConfigError(f"{printable(path.name)}: expected keys at the top level, got a {kind}")
    return layer


def _split(word: str) -> tuple[str, str]:
    match = OVERRIDE.fullmatch(word)
    if match is None:
        raise ConfigError(
            f"override `{printable(word)}` is malformed: key=value expected, as in train.steps=3 "
            "(key=null clears a key)"
        )
    return match["key"], match["value"]


def _parse_overrides(words: Iterable[str]) -> DictConfig:
    merged = OmegaConf.create({})
    for word in words:
        key, _ = _split(word)
        with _one_line_errors(f"override `{printable(word)}`"):
            layer = OmegaConf.from_dotlist([word])
        check_keys(_plain(layer), origin=f"override `{printable(key)}`")
        merged = _merge([merged, layer])
    return merged


def _merge(layers: Iterable[DictConfig]) -> DictConfig:
    merged = OmegaConf.merge(*layers)
    assert isinstance(merged, DictConfig)
    return merged


def _plain(layer: DictConfig) -> dict[Any, Any]:
    """The layer as builtins, interpolations left alone."""
    values = OmegaConf.to_container(layer, resolve=False)
    assert isinstance(values, dict)
    return values


def _without_null_teachers(config: DictConfig) -> DictConfig:
    teachers = _plain(config)["teachers"]
    if isinstance(teachers, dict):
        for name in [name for name, section in teachers.items() if section is None]:
            del config.teachers[name]
    return config


def _validate(values: dict[Any, Any]) -> RunConfig:
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    got = first["input"]
    problem = first["msg"].replace("Input should be ", "expected ", 1).removeprefix("Value error, ")
    problem = f"{problem[0].lower()}{problem[1:]}, got {got!r} ({type(got).__name__})"
    if first["type"] == "string_type" and isinstance(got, int | float):
        problem += "; quote it"
    if first["type"] in ("bool_type", "bool_parsing"):
        problem += "; write true or false"
    if first["type"] == "tuple_type":
        problem += "; write a list, as in [a, b]"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"{key}: {problem}{more}"
    raise ConfigError(printable(message)) from None


@contextmanager
def _one_line_errors(origin: str) -> Iterator[None]:
    """Turn what OmegaConf, YAML and the file system raise into a ConfigError of one line."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = f"{printable(error.full_key)}: " if error.full_key else ""
        cause = printable(str(error.msg or error).splitlines()[0])
        raise ConfigError(f"{key}{cause} ({origin}); correct the `${{...}}`") from error
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        cause = printable(error.problem or "syntax error")
        raise ConfigError(f"{origin} is not valid YAML{line}: {cause}") from error
    except YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {printable(str(error))}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise ConfigError(f"{origin} cannot be read: {printable(str(error))}") from error
