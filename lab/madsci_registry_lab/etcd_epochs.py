"""Epochs of a lab on etcd: each start of a lab registry begins one, as with SQLite.

A cursor names its epoch, so one from a time that a restore took back is known as such. And every new term is above the
epoch, which is no lower than the seconds since 1970: so what is given after a restore is above what was given in that
time, and is forgotten. That takes a start after the restore, of every lab registry that was running.
"""

from __future__ import annotations

import json
import random

from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.clock import Clock
from madsci_registry_lab.etcd_gateway import EtcdGateway
from madsci_registry_lab.etcd_rows import dumps
from madsci_registry_lab.etcd_transaction import Runner, Transaction
from madsci_registry_lab.etcd_wire import Range, after
from madsci_registry_lab.faults import DAMAGED, Fault

FORMAT = 1
EPOCHS_MAX = 200
"""That are kept: a cursor of an older start is `compacted`."""


def begin(gateway: EtcdGateway, runner: Runner, clock: Clock) -> int:
    """Begin a new epoch, in a store that is set up if it is new; return its revision in etcd.

    Raises:
        Fault: the store is newer than this program.
        UnavailableError, NoSpaceError: see EtcdGateway.
    """

    def operation(tx: Transaction) -> None:
        last, now = _last(tx, gateway.access.prefix), int(clock.wall())
        # Where no clock tells it, a store that was set back shall not come to an epoch that it had.
        epoch = now if now > last else last + random.randint(1, 100)
        tx.put(rows.META, dumps({"format": FORMAT, "epoch": epoch}))
        tx.put(f"e/{epoch}", "")
        for old in _known(gateway)[:-EPOCHS_MAX]:
            tx.delete(f"e/{old}")
        tx.put(rows.LAST, tx.op)

    runner.run(operation)
    return gateway.range(Range(gateway.access.prefix + rows.LAST)).kvs[0].changed


def _last(tx: Transaction, prefix: str) -> int:
    """Return the last epoch; 0: this is a new lab. Raises Fault."""
    text = tx.get(rows.META)
    if text is None:
        return 0
    try:
        meta = json.loads(text)
        known, epoch = meta["format"], int(meta["epoch"])
    except (ValueError, TypeError, LookupError):
        raise Fault(DAMAGED, f"what stands under {prefix} in etcd is no lab") from None
    if known != FORMAT:
        raise Fault(DAMAGED, f"this lab in etcd has format {known}, this program knows {FORMAT}")
    return epoch


def _known(gateway: EtcdGateway) -> list[int]:
    """Return the epochs that are known, in order."""
    start = f"{gateway.access.prefix}e/"
    found = gateway.range(Range(start, after(start), keys_only=True)).kvs
    return sorted(int(kv.key.removeprefix(start)) for kv in found)
