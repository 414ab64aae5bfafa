"""Imports: pieces gathered in memory, applied whole in one transaction, reported entry by entry.

What is here already wins: an import adds names, it never rebinds one or changes what is known. With `replace`, names
that the file lacks are retired. Limits for new names do not bind what an import brings in: it stays resolvable.
"""

from __future__ import annotations

import json
from typing import Any

from madsci_registry import protocol as p
from madsci_registry.errors import InvalidError, RegistryError, TooLargeError
from madsci_registry.names import NAME_MAX_BYTES
from madsci_registry.registry_json import FOREIGN_ID, entry_fault, is_foreign_id
from madsci_registryd.batch import Write
from madsci_registryd.locks import Session
from madsci_registryd.reads import cut_page
from madsci_registryd.registrar import Answer, Registrar
from madsci_registryd.service import Service
from madsci_registryd.transaction import Tx

UPLOAD_MAX_BYTES = 64 << 20
"""All pieces of one import: 200,000 entries of 300 bytes, the quota of names."""
UPLOADS_A_SESSION = 4
ENTRIES_OF_A_USER = 200
"""More hold the loop for longer than one user may make the others wait, and are an administrator's."""

Line = tuple[str, str, str]


class Upload:
    """The pieces of one import, then its report."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any]] = []
        self.size_bytes = 0
        self.report: list[Line] | None = None

    def add(self, entries: list[tuple[str, Any]]) -> None:
        self.size_bytes += sum(len(json.dumps(entry)) for entry in entries)
        if self.size_bytes > UPLOAD_MAX_BYTES:
            raise TooLargeError(f"entries: more than {UPLOAD_MAX_BYTES} bytes in one import", field="entries")
        self.entries += entries

    def page(self, start: int) -> dict[str, Any]:
        assert self.report is not None
        lines, _ = cut_page(self.report[start:], lambda line: line)
        end = start + len(lines)
        return {"report": lines, "cursor": end if end < len(self.report) else None}


class Imports:
    """The `import` verb."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar
        self._service = registrar.service

    def receive(self, who: Session, r: p.Import, answer: Answer) -> None:
        """Take a piece, and apply the import with the last one; or show more of a report."""
        key = f"import {r.upload}"
        if r.report_from is not None:
            upload = who.uploads.get(key)
            if upload is None or upload.report is None:
                raise InvalidError("upload: no report under this name", field="upload", reason="unknown")
            answer({"ok": upload.page(r.report_from)})
            return
        if key not in who.uploads and len(who.uploads) >= UPLOADS_A_SESSION:
            who.uploads.pop(next(iter(who.uploads)))
        self._check(who, r, who.uploads.get(key))
        upload = who.uploads.setdefault(key, Upload())
        upload.add(r.entries)
        if not r.last:
            answer({"ok": {"report": [], "cursor": None}})
            return

        def done(result: Any) -> None:
            if isinstance(result, RegistryError):
                who.uploads.pop(key, None)
                answer({"error": result.to_wire()})
            else:
                upload.report, upload.entries, upload.size_bytes = result, [], 0
                answer({"ok": upload.page(0)})

        def do(tx: Tx) -> list[Line]:
            return apply(self._service, tx, who, upload.entries, replace=r.mode == "replace", dry_run=r.dry_run)

        def then(refusal: RegistryError | None) -> None:
            if refusal is not None:
                done(refusal)
            else:
                self._registrar.submit(Write(do, done))

        sound = [] if r.dry_run else [(name, entry) for name, entry in upload.entries if not entry_fault(name, entry)]
        self._service.old_programs.prepare(self._service.old_programs.for_import(sound), then)

    def _check(self, who: Session, r: p.Import, upload: Upload | None) -> None:
        if r.mode == "replace" and not r.dry_run:
            self._service.need_admin(who, "import with replace, which retires what others made")
        if len(r.entries) + (len(upload.entries) if upload else 0) > ENTRIES_OF_A_USER:
            self._service.need_admin(who, f"import more than {ENTRIES_OF_A_USER} entries at once")
        uploads = [u for s in self._registrar.sessions.values() if s.uid == who.uid for u in s.uploads.values()]
        kept = sum(each.size_bytes for each in uploads if isinstance(each, Upload))
        self._service.quotas.check(who.uid, "bytes", kept)


def apply(
    service: Service, tx: Tx, who: Session, entries: list[tuple[str, Any]], *, replace: bool, dry_run: bool
) -> list[Line]:
    """Add what is new of `entries` and say of each what became of it: (name, outcome, reason)."""
    store = service.store
    report: list[Line] = []
    seen: set[str] = set()
    for name, entry in entries:
        reason = entry_fault(name, entry) or ("twice in this import" if name in seen else "")
        seen.add(name)
        if reason:
            report.append((name[:NAME_MAX_BYTES], "invalid", reason))
            continue
        row, other = store.by_name(name), store.by_id(entry["id"])
        if row is not None and other is not None and row.id == other.id:
            report.append((name, "same", ""))
        elif row is not None:
            report.append((name, "conflict", f"known here as {row.id}"))
        elif other is not None:
            report.append((name, "conflict", f"{entry['id']} is called {other.name!r} here"))
        else:
            if not dry_run:
                service.adopt(tx, who, name, entry)
            report.append((name, "added", FOREIGN_ID if is_foreign_id(entry) else ""))
    if replace:
        report += service.retire_all_but(tx, who, seen, dry_run=dry_run)
    return report
