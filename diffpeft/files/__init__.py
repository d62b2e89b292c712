"""Files: what is read comes from one snapshot, what is written together is committed together, and sizes are judged before anything is made of them."""

from diffpeft.files.commits import folder, replacing
from diffpeft.files.outputs import refuse_existing
from diffpeft.files.snapshots import Snapshot, config_text, near_path, present, together
from diffpeft.files.tables import MAX_CONFIG, MAX_ITEMS, Json, config_in, parsed, unreadable

__all__ = [
    "MAX_CONFIG",
    "MAX_ITEMS",
    "Json",
    "Snapshot",
    "config_in",
    "config_text",
    "folder",
    "near_path",
    "parsed",
    "present",
    "refuse_existing",
    "replacing",
    "together",
    "unreadable",
]
