"""Crash-safe state of one device in one folder; the exact bytes of an update are durable before they are sent."""

from edge_runtime.store.checkpoints import Checkpoints, SavedCheckpoint
from edge_runtime.store.device import DeviceStore, Enrolment
from edge_runtime.store.files import FileLayer
from edge_runtime.store.outbox import Message, Outbox, OutboxEntry
from edge_runtime.store.records import DamagedFileError, StateError

__all__ = [
    "Checkpoints",
    "DamagedFileError",
    "DeviceStore",
    "Enrolment",
    "FileLayer",
    "Message",
    "Outbox",
    "OutboxEntry",
    "SavedCheckpoint",
    "StateError",
]
