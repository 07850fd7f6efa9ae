"""One study at a time works in a directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mopd.study.run import StudyError, alone


def test_a_second_study_is_refused_while_the_first_is_there(tmp_path: Path) -> None:
    work = tmp_path / "study-x"
    with alone(work), pytest.raises(StudyError, match="is in use"), alone(work):
        pass
    with alone(work):
        pass
