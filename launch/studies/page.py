from pathlib import Path


def write(out: Path) -> Path:
    return out
