"""The ids of rare log messages, one table: what alerts and `journalctl MESSAGE_ID=...` rest on.

docs/operations.md explains each: what it means, what to do. An id was made once, at random, and is never changed or
given to another message; a message that is no longer said leaves its row there.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Message(NamedTuple):
    """A kind of rare message. `log.warning(text, extra=SOME_MESSAGE(name=name))` logs one of it, with facts."""

    name: str
    id: str
    """128 bits in hexadecimal: the journal's MESSAGE_ID."""

    def __call__(self, **facts: Any) -> dict[str, Any]:
        """Return what `extra` of a log call takes; the facts are fields MADSCI_... in the journal."""
        return {"rare": self, "facts": facts}


# start and stop
STARTED = Message("started", "54355af0ab2643d8a94611ccfde7c250")
RELOADED = Message("reloaded", "0c17258fb3c54586a0b77962c1f3d2a2")
NOT_RELOADED = Message("not_reloaded", "322540225e54400a94d77fa325ca4b0a")
MANAGER_UNREACHABLE = Message("manager_unreachable", "6274f5c1ce324f68947da7002fc63618")
STOPPED = Message("stopped", "46242ae9ab06495a8375d5d7f93e5eff")
NOT_STARTED = Message("not_started", "f39ae8dbf1c540068437e605270d8010")
SCHEMA_MIGRATED = Message("schema_migrated", "0daba51f2aa44f26a0a98e30202bf7c2")
RESTORED = Message("restored", "efaad8bed9c1480eaf5e4d2756b2410c")
SERVED_ELSEWHERE_UNKNOWN = Message("served_elsewhere_unknown", "914fd4645abe4f0b9b0d1cde477a2c51")

# the disk
IO_ERROR = Message("io_error", "f1ec22081d964afc8bbf302ee0b2fb67")
CHECKING_AFTER_IO_ERROR = Message("checking_after_io_error", "16c3cf8074b142c19a3013eaef19c88f")
DISK_FULL = Message("disk_full", "23d5c3c38c1e4d4f90cac3ce6194ed2a")
DATABASE_DELETED = Message("database_deleted", "269ccbba8b0f405e84c7a71c3889c16f")
DATABASE_SAVED = Message("database_saved", "3d61aa88419f4c51b554d2a648c18ebb")
DATABASE_NOT_SAVED = Message("database_not_saved", "d291bcbb300c4b079418328f0612b107")
DATABASE_REPLACED = Message("database_replaced", "7dc262f1bd44427b90b42bc27e768a54")

# sockets and clients
SOCKET_MADE_AGAIN = Message("socket_made_again", "3435c76d185f42b49ddba28882979018")
CANNOT_LISTEN = Message("cannot_listen", "edcc19717b134e24bcb13de7c7f36c3c")
CANNOT_ACCEPT = Message("cannot_accept", "7f3ef65cbbc14eb6afcc36e2e7b61eff")
PEER_UNSEEN = Message("peer_unseen", "d70ae19ee1414bcbaae43c7398579efb")
ACCESS_REFUSED = Message("access_refused", "be225f58227c47ab932bdd98a337bb4d")
QUOTA_REFUSED = Message("quota_refused", "276fed545b1149c7898eb2e78a8df2c2")
LINE_REFUSED = Message("line_refused", "514cc76f130f48b7a85d45cd4c8595ab")
LOCK_BROKEN = Message("lock_broken", "0bf2ff7dafa647ce87e12a55799e810e")

# registry.json
REGISTRY_JSON_PUT_ASIDE = Message("registry_json_put_aside", "62ac24942dd8445d8d70d8b88fc10dc0")
REGISTRY_JSON_FAILING = Message("registry_json_failing", "dcf396f35dcd430b9ffab1a4b7f69628")
REGISTRY_JSON_KEPT_AGAIN = Message("registry_json_kept_again", "9eaf7b4ea89549f7b44d648f711462d4")
REGISTRY_JSON_BEHIND = Message("registry_json_behind", "4594fa03e3084b0086afe1a8c267d4fb")
OLD_CHANGE_REFUSED = Message("old_change_refused", "0a38e9dfecb746e2a373b8ce61b52037")
OLD_NAMES_TAKEN_IN = Message("old_names_taken_in", "ff1e3b7a37674af7974ef5818eb5e7e8")
HELD_TWICE = Message("held_twice", "6bb51461e3544fe99caf6a179bd58283")

# the lab
LAB_UP = Message("lab_up", "b129ae631b634577931c8522a8514fa7")
LAB_AWAY = Message("lab_away", "03e021f997d04028a8d7aa4987b7c56c")
LAB_REFUSED = Message("lab_refused", "de3398bc133a48e88dd6e57c734e5085")
LAB_HOST_NEW = Message("lab_host_new", "6b5c124f0166411aab736e9211b75e37")
HELD_IN_LAB_TOO = Message("held_in_lab_too", "21baad7161744bf8b60eb6c171422142")
LOST_TO_LAB = Message("lost_to_lab", "9723b85b2fb04b359b9b687887f3df22")
LAB_CONFLICT = Message("lab_conflict", "0560f5f5043f4edb8efa552ca35d73a4")
LAB_CHANGE_REFUSED = Message("lab_change_refused", "df8fae5fef124e22a9fe22454e0550de")

# ourselves
FAULT = Message("fault", "7df30153673e47dc9d6ccf6f8dcd723f")
ANSWER_TOO_LARGE = Message("answer_too_large", "805a645f5db545c6a16971183309f6ff")
METRICS_FAILING = Message("metrics_failing", "e0d48dc93d054003b2a7ec6beb663421")

MESSAGES = {message.name: message for message in vars().copy().values() if isinstance(message, Message)}
"""All of them by name."""
