"""Numbers -> one HTML file that needs no network: scripts, styles and data are in it.

Text of models and files never becomes markup: templates escape it, data lies in a JSON element
whose angle brackets are escaped, and the script writes it as text. A content security policy that
names the digests of the page's own two scripts keeps anything else from running or loading.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mopd.errors import ConfigError
from mopd.report.model import Report

if TYPE_CHECKING:
    from mopd.report.compare import Comparison

TEMPLATES = Path(__file__).parent / "templates"


def render_report(report: Report) -> str:
    """The page of one run.

    Raises:
        ConfigError: plotly or jinja2 is not installed.
    """
    config = yaml.safe_dump(dict(report.run.config), sort_keys=False, allow_unicode=True)
    return _render("report.html", report.client(), report=report, config=config)


def render_comparison(comparison: Comparison) -> str:
    """The page of several runs.

    Raises:
        ConfigError: plotly or jinja2 is not installed.
    """
    return _render("compare.html", comparison.client(), comparison=comparison)


def _render(name: str, client: Mapping[str, Any], **values: Any) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed and draws this page: pip install 'mopd[report]'"
        ) from error
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "duration": duration}
    own = [(TEMPLATES / file).read_text(encoding="utf-8") for file in ("plots.js", "samples.js")]
    scripts = [get_plotlyjs(), "\n".join(own)]
    template = environment.get_template(name)
    # only what this package and plotly ship is taken as markup
    return template.render(
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        data=Markup(embedded(client)),
        **values,
    )


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element: it holds no ``<``, ``>`` or ``&``."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{share:.{digits}%}"  # noqa: RUF001


def number(value: float | None) -> str:
    """Three significant digits, thousands in groups."""
    if value is None:
        return "–"  # noqa: RUF001
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"  # noqa: RUF001
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _policy(scripts: list[str]) -> str:
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
