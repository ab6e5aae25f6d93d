"""What this package is called where it is installed: the import and the distribution have two names."""

DISTRIBUTION = "vindex-svd"  # on PyPI, where `vindex` is somebody else's


def namesake() -> str | None:
    """The version of PyPI's other `vindex`, where it is installed beside this package; it has no command like ours."""
    from importlib import metadata

    try:
        other = metadata.distribution("vindex")
    except metadata.PackageNotFoundError:
        return None
    ours = any(script.value == "vindex.__main__:main" for script in other.entry_points)
    return None if ours else other.version


def version() -> str:
    """That of the installed distribution, or of the source where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "0+source"
