"""Databases of earlier versions, as they were when those were current."""

from __future__ import annotations

import re
from pathlib import Path

import apsw
import pytest

from helpers import TESTS
from madsci_registryd import database, migrations

OLDER = sorted((TESTS / "data").glob("schema-*.sql"))


def tables(db: apsw.Connection) -> dict[str, list[tuple[object, ...]]]:
    """Return all that SQLite knows of the tables and indexes, without comments and spacing."""
    found: dict[str, list[tuple[object, ...]]] = {}
    for name, sql in db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
        plain = re.sub(r"\s*([,()])\s*", r"\1", re.sub(r"\s+", " ", re.sub(r"--.*", "", str(sql))))
        found[str(name)] = [(plain,), *db.execute(f"PRAGMA table_xinfo({name})")]
    return found


@pytest.mark.parametrize("schema", OLDER, ids=lambda path: path.stem)
def test_older_database_becomes_the_present_schema(tmp_path: Path, schema: Path) -> None:
    """An older database is brought to exactly schema.sql, keeps what it has, and a copy of it is made before."""
    version = int(schema.stem.removeprefix("schema-"))
    path = tmp_path / "registry.db"
    with apsw.Connection(str(path)) as db:
        db.execute(schema.read_text())
        db.pragma("application_id", migrations.APPLICATION_ID)
        db.pragma("user_version", version)
        db.execute("INSERT INTO names (name) VALUES ('arm')")
        columns = "(id, name, component_type, created_at, last_seen)"
        db.execute(f"INSERT INTO components {columns} VALUES ('u', 'arm', 'node', '', '')")
    db.close()
    migrated, fresh = database.open_database(path), database.open_database(tmp_path / "fresh.db")
    assert tables(migrated) == tables(fresh)
    assert migrated.pragma("user_version") == migrations.VERSION
    assert [id for (id,) in migrated.execute("SELECT id FROM components")] == ["u"]
    assert list(tmp_path.glob(f"registry.db.before-v{migrations.VERSION}*"))
    migrated.close()
    fresh.close()


def test_migration_to_4_says_when_an_identity_changed_last(tmp_path: Path) -> None:
    """`changed_at` is the time of a component's last event that is no lock's; without any, when it was made."""
    path = tmp_path / "registry.db"
    with apsw.Connection(str(path)) as db:
        db.execute((TESTS / "data" / "schema-3.sql").read_text())
        db.pragma("application_id", migrations.APPLICATION_ID)
        db.pragma("user_version", 3)
        for id, name in (("u", "arm"), ("v", "leg")):
            db.execute("INSERT INTO names (name) VALUES (?)", (name,))
            columns = "(id, name, component_type, created_at, last_seen)"
            db.execute(f"INSERT INTO components {columns} VALUES (?, ?, 'node', 'made', 'seen')", (id, name))
        for kind, at in (("created", "1"), ("renamed", "2"), ("metadata", "3"), ("granted", "4"), ("refused", "5")):
            db.execute("INSERT INTO events (at, kind, name, id) VALUES (?, ?, 'arm', 'u')", (at, kind))
    db.close()
    migrated = database.open_database(path)
    found = dict(migrated.execute("SELECT id, changed_at FROM components"))
    assert found == {"u": "3", "v": "made"}
    migrated.close()


def test_every_earlier_schema_is_kept_for_this_test() -> None:
    """For each version before the present one its schema is among the test data."""
    assert [path.stem for path in OLDER] == [f"schema-{n}" for n in range(1, migrations.VERSION)]
