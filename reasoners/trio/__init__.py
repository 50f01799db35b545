"""Three small reasoners that come with the package: a teacher and the two students distilled from it.

They solve the word problems of `reasoners.scaling.arithmetic`, have about five million weights each, and
were trained by the package itself: the recipes `trio-teacher`, `trio-llamba` and `trio-mambainllama`.
"""

from pathlib import Path

NAMES = ("trio-teacher", "trio-llamba", "trio-mambainllama")


def folder(model: str | Path) -> Path:
    """The folder of one of NAMES; anything else is a folder itself."""
    return Path(__file__).parent / model if str(model) in NAMES else Path(model)
