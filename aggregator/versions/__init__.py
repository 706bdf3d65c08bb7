"""Model versions: their parameters on disk, and the files users take home."""

from aggregator.versions.store import VersionError, VersionStore

__all__ = ["VersionError", "VersionStore"]
