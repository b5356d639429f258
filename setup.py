"""The long description; all else is in pyproject.toml.

It is README.md without links into the repository and without its image, which lead nowhere on a
package index: a link becomes its words, and where it led.
"""

import re
from pathlib import Path

from setuptools import setup

INWARDS = r"\((?!https?://)(?P<file>[^)#\s]*)(?:#[^)\s]*)?\)"


def long_description(text: str) -> str:
    """A page in Markdown, as it can be read anywhere."""
    text = re.sub(rf"!\[[^]]*\]{INWARDS}\n*", "", text)

    def words(link: re.Match[str]) -> str:
        said, file = link["said"], link["file"]
        return said if file in ("", said) else f"{said} ({file})"

    return re.sub(rf"\[(?P<said>[^]]+)\]{INWARDS}", words, text)


setup(
    long_description=long_description((Path(__file__).parent / "README.md").read_text("utf-8")),
    long_description_content_type="text/markdown",
)
