"""Programs that pip can't install: without them a test is skipped, but in CI it fails."""

from __future__ import annotations

import os
import shutil

import pytest


def found(program: str) -> str | None:
    """A program's path; system folders, which a user's PATH may lack, included."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def needs(*programs: str, package: str) -> pytest.MarkDecorator:
    """The mark of tests that run these programs, of one Debian package."""
    missing = [each for each in programs if found(each) is None]
    reason = f"{' and '.join(missing)} not installed: apt-get install {package}"
    return pytest.mark.skipif(bool(missing) and not os.environ.get("CI"), reason=reason)
