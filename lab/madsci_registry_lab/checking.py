"""Says how a lab's store is (`madsci-registry-lab check`): what a person should know before a lab rests on it.

etcd tells its flags to nobody. So what is asked is what shows them: versions, members, alarms, and the quota and the
compaction in the metrics of each member.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from madsci_registry.errors import RegistryError
from madsci_registry_lab import etcd_rows as rows
from madsci_registry_lab.etcd_access import EtcdAccess
from madsci_registry_lab.etcd_gateway import EtcdGateway
from madsci_registry_lab.etcd_wire import Range, after

SUPPORTED = {(3, 5): 28, (3, 6): 9}
"""The first patch of each line without known holes (CVE-2026-33413, CVE-2026-33343). 3.4 ended on 2026-06-01."""
UNCOMPACTED = 1_000_000
"""Revisions that a compaction each hour leaves in the busiest lab that three small machines carry."""
FULL = 0.8
"""Of the quota."""
PATIENCE_S = 3.0
"""A cluster that has just lost its leader has another one by then."""

Weight = Literal["good", "warning", "bad"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    weight: Weight
    text: str


def check(access: EtcdAccess) -> list[Finding]:
    """Look at an etcd and the lab in it. Nothing is changed."""
    with closing(EtcdGateway(access, total_s=PATIENCE_S)) as gateway:
        found = [finding for part in (_members, _alarms, _lab) for finding in _told(part(gateway), "etcd")]
        return found + [f for member in access.endpoints for f in _told(_member(gateway, member), member)]


def _told(findings: Iterator[Finding], where: str) -> Iterator[Finding]:
    """Tell findings; that nothing is answered, or what etcd does not say, is one."""
    try:
        yield from findings
    except RegistryError as error:
        yield Finding("bad", error.message)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        yield Finding("bad", f"{where}: what is said there is not understood: {error!r}")


def _members(gateway: EtcdGateway) -> Iterator[Finding]:
    members = gateway.call("/v3/cluster/member/list", {}).get("members", [])
    voting = [member for member in members if not member.get("isLearner")]
    may_fail = (len(voting) - 1) // 2
    text = f"{len(voting)} members, of which {may_fail} may fail"
    if may_fail == 0:
        yield Finding("warning", f"{text}: a lab that rests on no single machine has three")
    elif len(voting) % 2 == 0:
        yield Finding("warning", f"{text}: one fewer would be as safe")
    else:
        yield Finding("good", text)
    if len(gateway.access.endpoints) < len(voting):
        yield Finding("warning", f"the store's setting names {len(gateway.access.endpoints)} of {len(voting)} members")


def _alarms(gateway: EtcdGateway) -> Iterator[Finding]:
    alarms = gateway.call("/v3/maintenance/alarm", {"action": "GET"}).get("alarms", [])
    for alarm in alarms:
        yield Finding("bad", f"alarm {alarm.get('alarm')} of member {int(alarm.get('memberID', 0)):x}")
    if not alarms:
        yield Finding("good", "no alarm")


def _lab(gateway: EtcdGateway) -> Iterator[Finding]:
    prefix = gateway.access.prefix
    meta = gateway.range(Range(prefix + rows.META)).kvs
    if not meta:
        yield Finding("warning", f"there is no lab under {prefix} yet")
        return
    known = json.loads(meta[0].value)
    names = gateway.range(Range(f"{prefix}n/", after(f"{prefix}n/"), count_only=True)).count
    yield Finding("good", f"lab under {prefix}: format {known['format']}, epoch {known['epoch']}, {names} names")


def _member(gateway: EtcdGateway, member: str) -> Iterator[Finding]:
    version = str(gateway.get(member, "/version").json().get("etcdserver", "unknown"))
    yield Finding("good" if is_supported(version) else "warning", f"{member}: etcd {version}{_advice(version)}")
    status = gateway.ask(member, "/v3/maintenance/status", {})
    if not int(status.get("leader", 0)):
        yield Finding("bad", f"{member} has no leader")
    metrics = gateway.get(member, "/metrics").text
    size, quota = int(status.get("dbSize", 0)), _metric(metrics, "etcd_server_quota_backend_bytes")
    if quota:
        share = size / quota
        text = f"{member}: {size >> 20} MiB of a quota of {int(quota) >> 20} MiB"
        yield Finding("warning" if share > FULL else "good", text)
    else:
        yield Finding("warning", f"{member}: {size >> 20} MiB; its quota is not told (no /metrics there)")
    yield from _compaction(member, metrics, int(status["header"].get("revision", 0)))


def _compaction(member: str, metrics: str, revision: int) -> Iterator[Finding]:
    compacted = _metric(metrics, "etcd_debugging_mvcc_compact_revision")
    if compacted is None:
        yield Finding("warning", f"{member}: what it compacts is not told (no /metrics there)")
        return
    kept = revision - max(int(compacted), 0)
    never = " and it has compacted none yet" if compacted <= 0 else ""
    text = f"{member}: {kept} revisions are kept{never}"
    if kept > UNCOMPACTED:
        text += ": run it with --auto-compaction-mode periodic --auto-compaction-retention 1h"
    yield Finding("warning" if kept > UNCOMPACTED else "good", text)


def _metric(metrics: str, name: str) -> float | None:
    found = re.search(rf"^{name} (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else None


def is_supported(version: str) -> bool:
    """Tell whether a version of etcd gets fixes and has no known holes."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if not found:
        return False
    major, minor, patch = map(int, found.groups())
    return (major, minor) > max(SUPPORTED) or patch >= SUPPORTED.get((major, minor), patch + 1)


def _advice(version: str) -> str:
    return "" if is_supported(version) else ": production needs 3.5.28, 3.6.9 or later"
