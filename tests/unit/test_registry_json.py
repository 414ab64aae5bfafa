"""What is read of a registry.json, whole, torn or damaged; and what an entry may be."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from madsci_registry import salvage
from madsci_registry.registry_json import (
    CLAIM_INSTANCE,
    Document,
    _of_any_file,
    entry_fault,
    is_claim,
    is_foreign_id,
    parse,
)

AT = "2026-11-24T13:00:00.123456Z"


def entry(number: int = 0, **more: Any) -> dict[str, Any]:
    """Return an entry as MADSci writes it."""
    return {
        "id": f"01ARZ3NDEKTSV4RRFFQ69{number:05}",
        "component_type": "node",
        "created_at": AT,
        "last_seen": AT,
        "metadata": {"rack": [1, {"deep": None}], "note": "x"},
        "lock": {
            "holder_pid": 7,
            "holder_host": "lab",
            "holder_instance": "01ARZ3NDEKTSV4RRFFQ69G5FAV",
            "acquired_at": AT,
            "heartbeat_at": AT,
            "expires_at": AT,
        },
        "workcell_id": None,
        **more,
    }


def registry(entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"version": 1, "created_at": AT, "updated_at": AT, "entries": entries, **more}


def written(entries: dict[str, Any], **more: Any) -> bytes:
    """Return a file as MADSci writes it."""
    return json.dumps(registry(entries, **more), indent=2).encode()


FIVE = {f"node_{n}": entry(n) for n in range(5)}
WHOLE = written(FIVE)
COMPACT = json.dumps(registry(FIVE), separators=(",", ":")).encode()
LINES = b"{%s,\n%s\n}}\n" % (
    COMPACT[1:].partition(b'"node_0"')[0] + b'\n"node_0":' + json.dumps(FIVE["node_0"]).encode(),
    b",\n".join(b'"%s": %s' % (name.encode(), json.dumps(FIVE[name]).encode()) for name in list(FIVE)[1:]),
)
LAYOUTS = pytest.mark.parametrize(
    "content", [WHOLE, COMPACT, LINES], ids=["MADSci's own", "on one line", "an entry a line, as the daemon writes it"]
)


def told(document: Document) -> list[tuple[str | None, str]]:
    return [(fault.name, fault.reason) for fault in document.faults]


@LAYOUTS
def test_whole_file_is_read_as_it_is(content: bytes) -> None:
    """A sound file gives its entries and when it was made, and no faults."""
    assert parse(content) == Document(AT, FIVE, [], True)


def test_file_that_madsci_init_writes_is_whole() -> None:
    """A file with nothing but an empty object of entries is whole; no version means 1."""
    assert parse(b'{"entries": {}}') == Document()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"null", b"[]", b'"x"', b'{"entries": null}', b'{"entries": []}', b"\0" * 9]
)
def test_file_without_entries_is_not_whole(content: bytes) -> None:
    """What has no object of entries is not whole, and is told to be so: it must not pass for an empty registry."""
    document = parse(content)
    assert not document.whole and not document.entries and document.faults


@pytest.mark.parametrize("version", [2, 0, "1", True, None, 1.5, [1]])
def test_unsupported_version_gives_nothing(version: Any) -> None:
    """Of a file in another version nothing is taken, and the fault says which one it is."""
    document = parse(written(FIVE, version=version))
    assert not document.whole and document.entries == {}
    assert [fault.name for fault in document.faults] == [None] and "version" in document.faults[0].reason


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"id": "a", "metadata": {"x": NaN}}', "NaN"),
        (b'{"id": "a", "x": -Infinity}', "-Infinity"),
        (b'{"id": "a", "x": 1e999}', "too large"),
        (b'{"id": "a", "x": ' + b"9" * 5000 + b"}", "too large"),
        (b'{"id": "\\ud800"}', "lone surrogate"),
        (b'{"id": "a", "\\udfff": 1}', "lone surrogate"),
        (b'{"id": "a", "x": ' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
        (b'{"id": "a", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "deeper than 64"),
        (b'{"id": "a", "id": "b"}', "'id' stands twice"),
        (b"null", "no object"),
        (b'"text"', "no object"),
        (b"[{}]", "no object"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else None,
)
def test_value_that_cannot_be_stored_is_its_entrys_fault_alone(bad: bytes, reason: str) -> None:
    """NaN, a lone surrogate, a huge number, deep nesting, a key twice: that entry is out, the file is whole."""
    content = WHOLE.replace(b'"entries": {', b'"entries": {\n    "bad": ' + bad + b",", 1)
    document = parse(content)
    assert document.whole and document.entries == FIVE
    assert [fault.name for fault in document.faults] == ["bad"]
    assert document.faults[0].line == 6 and reason in document.faults[0].reason


def test_escaped_pair_of_surrogates_is_text() -> None:
    """An emoji that json.dump has escaped is text like any other."""
    entries = {"robot 🤖": entry(metadata={"🤖": "🤖"})}
    assert b"\\ud83e" in written(entries)
    assert parse(written(entries)) == Document(AT, entries, [], True)


@LAYOUTS
def test_damage_costs_only_the_entries_in_it(content: bytes) -> None:
    """NULs or garbage over the middle of a file cost the entries that they touch; the fault says line and name."""
    begin = content.index(b'"node_2"') + 20
    for garbage in (b"\0" * 40, b"garbage, \xff\xfe", b"}}}}", b']]"', b'{"'):
        document = parse(content[:begin] + garbage + content[begin + 60 :])
        assert not document.whole
        assert {name: FIVE[name] for name in ("node_0", "node_1", "node_3", "node_4")} == document.entries, garbage
        line = content[: begin - 20].count(b"\n") + 1
        assert [(f.name, f.line) for f in document.faults][:1] == [("node_2", line)]


@LAYOUTS
def test_second_half_of_a_file_gives_its_entries(content: bytes) -> None:
    """A file whose head is lost gives the entries that are complete in the rest."""
    for cut in range(content.index(b'"node_1"') + 1, content.index(b'"node_2"')):
        document = parse(content[cut:])
        assert document.entries == {f"node_{n}": FIVE[f"node_{n}"] for n in (2, 3, 4)}
        assert not document.whole and document.faults


def test_lost_bracket_swallows_no_entry() -> None:
    """Where the end of one entry is lost, the next ones are not taken for a part of it."""
    begin, end = WHOLE.index(b'"metadata"', WHOLE.index(b'"node_1"')), WHOLE.index(b'"node_2"')
    document = parse(WHOLE[:begin] + WHOLE[end:])
    assert document.entries == {f"node_{n}": FIVE[f"node_{n}"] for n in (0, 2, 3, 4)}
    assert [fault.name for fault in document.faults][:1] == ["node_1"]


@LAYOUTS
def test_object_inside_a_damaged_entry_is_no_entry(content: bytes) -> None:
    """What lies in the metadata of a torn entry is not taken for an entry, however much it looks like one."""
    tricky = registry({"a": entry(1), "b": entry(2, metadata={"x": {"c": entry(3)}}), "d": entry(4)})
    indent = 2 if content is WHOLE else None
    text = json.dumps(tricky, indent=indent).encode()
    for cut in range(text.index(b'"c"'), text.index(b'"d"')):
        assert parse(text[:cut]).entries.keys() <= {"a", "b"}


def test_two_documents_give_what_both_know() -> None:
    """What two writers left behind one another is read as far as it goes: both documents, or the tail of the longer."""
    other = written({"x": entry(50), "node_1": FIVE["node_1"]})
    for content in (WHOLE + other, WHOLE + b"\n\n" + other):
        document = parse(content)
        assert document.entries == {**FIVE, "x": entry(50)} and not document.whole
        assert [fault.name for fault in document.faults] == [None]
    tail = other + WHOLE[len(other) :]
    document = parse(tail)
    assert document.entries == {"x": entry(50), **{f"node_{n}": FIVE[f"node_{n}"] for n in (1, 2, 3, 4)}}


def test_byte_order_mark_is_a_fault_that_costs_nothing() -> None:
    """MADSci does not read a file with a byte order mark: it is not whole, and every entry of it is taken."""
    document = parse(b"\xef\xbb\xbf" + WHOLE)
    assert document.entries == FIVE and not document.whole
    assert told(document) == [(None, "begins with a byte order mark, which JSON has not")]


def test_bad_utf8_costs_its_entry() -> None:
    """Bytes that are no UTF-8 cost the entry that they are in; a name that holds them is shown escaped."""
    document = parse(WHOLE.replace(b'"rack"', b'"r\xffck"', 1))
    assert not document.whole and told(document) == [("node_0", "is not UTF-8")] and len(document.entries) == 4
    document = parse(WHOLE.replace(b'"node_0"', b'"n\xff"', 1))
    assert not document.whole and told(document) == [(None, r"its name is not text: n\udcff")]


def test_name_twice_is_told_and_taken_only_if_the_ids_agree() -> None:
    """A name that stands twice makes the file ambiguous: both places are told; with two ids neither is taken."""
    same, other = entry(0, metadata={"later": 1}), entry(77)
    for second, kept in ((same, {"node_0": same}), (other, {})):
        tail = b'"node_0": ' + json.dumps(second).encode() + b"}}"
        document = parse(WHOLE[: WHOLE.rindex(b"}", 0, -2)].rstrip()[:-1] + b"}," + tail)
        assert not document.whole
        assert {k: v for k, v in document.entries.items() if k == "node_0"} == kept
        assert [fault.name for fault in document.faults] == ["node_0", "node_0"]
        assert document.faults[0].line != document.faults[1].line


def test_top_level_key_twice_is_not_whole() -> None:
    """A registry with two objects of entries is ambiguous; both are read."""
    document = parse(b'{"entries": {"a": {"id": "1"}}, "entries": {"b": {"id": "2"}}}')
    assert document.entries.keys() == {"a", "b"} and not document.whole and document.faults


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)
_ENTRIES = st.dictionaries(
    _TEXT,
    st.builds(lambda n, m: entry(n, metadata=m), st.integers(0, 99999), st.dictionaries(_TEXT, _VALUE)),
    max_size=4,
)
_STYLE = st.sampled_from(
    [{"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"indent": 0}, {}, {"separators": (",", ":")}]
)


def _ends(text: str, entries: dict[str, Any]) -> dict[str, int]:
    """Return by name where its entry ends in the text, by Python's own JSON parser."""
    decoder, ends = json.JSONDecoder(), {}
    at = text.index("{", text.index('"entries"'))
    for name in entries:
        at = text.index('"', at + 1)
        _, at = decoder.raw_decode(text, at)
        at = text.index("{", at)
        _, ends_at = decoder.raw_decode(text, at)
        ends[name] = at = ends_at
    return ends


@settings(max_examples=60, deadline=None)
@given(_ENTRIES, _STYLE, st.booleans(), st.data())
def test_truncated_file_gives_exactly_the_complete_entries(
    entries: dict[str, Any], style: dict[str, Any], ascii: bool, data: st.DataObject
) -> None:
    """A file cut at any byte gives exactly the entries that were complete before the cut, and is whole only uncut."""
    text = json.dumps(registry(entries), ensure_ascii=ascii, **style)
    content = text.encode()
    assert parse(content) == _of_any_file(text) == Document(AT, entries, [], True)
    ends = {name: len(text[:end].encode()) for name, end in _ends(text, entries).items()}
    for cut in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=30)):
        document = parse(content[:cut])
        assert document.entries == {name: entries[name] for name, end in ends.items() if end <= cut}
        assert not document.whole and document.faults


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300) | st.text(alphabet='{}[]",:\\ \n\tau0e.-NI\0', max_size=300).map(str.encode))
def test_any_bytes_are_read_without_an_error(content: bytes) -> None:
    """Whatever the bytes are, there is an answer: an object that Python's own parser reads as well is whole."""
    document = parse(content)
    assert document.whole or document.faults
    for name, value in document.entries.items():
        json.dumps([name, value], ensure_ascii=False, allow_nan=False).encode()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_file_gives_what_the_damage_has_not_touched(data: st.DataObject) -> None:
    """Whatever is cut out of a file with an entry, or a member, a line, or written over it: every entry that it does
    not touch is taken, and no others."""
    content = data.draw(st.sampled_from([WHOLE, LINES]))
    begin = data.draw(st.integers(20, len(content)))  # behind the version, without which nothing is taken
    end = data.draw(st.integers(begin, min(begin + 200, len(content))))
    filler = data.draw(st.sampled_from([b"", b"\0" * 50, b'"', b"{", b"}", b"\xff", b",", b'x"y":{']))
    document = parse(content[:begin] + filler + content[end:])
    sound = {name: value for name, value in document.entries.items() if not entry_fault(name, value)}
    as_they_were = {name for name, value in sound.items() if FIVE.get(name) == value}
    # A gap of 200 bytes touches two entries; what is left of them may be one that nobody can tell from a sound one.
    assert len(as_they_were) >= len(FIVE) - 2
    assert len(sound) - len(as_they_were) <= 1


HOSTILE = {
    "quotes": b'"',
    "brackets": b"[",
    "nested objects": b'{"a":',
    "escapes": b',"\\"',
    "entries that break": b'"a":{x',
    "candidates": b',"a":{',
    "lines": b'\n    "a":{',
    "names": b'"a":{},',
    "closing": b"}",
    "NULs": b"\0",
    "spaces": b", ",
}


@pytest.mark.parametrize("piece", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize(
    "head", [b"", b'{"entries":{', b'{"entries":{\n    "a":{"x":'], ids=["bare", "entries", "inside"]
)
def test_hostile_file_takes_linear_time(head: bytes, piece: bytes) -> None:
    """Four times the bytes take about four times as long, whatever they are; what it tells of them stays short."""

    def seconds(times: int) -> float:
        content = head + piece * times
        begin = time.process_time()
        assert len(parse(content).faults) <= salvage.FAULTS_MAX + 1
        return time.process_time() - begin

    seconds(100)
    assert seconds(80_000) < 8 * seconds(20_000) + 0.1


@pytest.mark.parametrize(
    ("lock", "ours"),
    [
        ({"holder_instance": CLAIM_INSTANCE}, True),
        ({"holder_instance": f"{CLAIM_INSTANCE} 01ARZ3"}, True),
        ({"holder_instance": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}, False),
        ({"holder_instance": 7}, False),
        ({}, False),
        (None, False),
        ([CLAIM_INSTANCE], False),
    ],
)
def test_claim_is_told_from_a_lock(lock: object, ours: bool) -> None:
    """A claim is an object whose holder_instance begins with the daemon's name; nothing else is one."""
    assert is_claim(lock) is ours


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"id": "node-7"}, ""),
        ({"id": "é" * 127}, ""),
        ({"id": "é" * 128}, "id is no ULID"),
        ({"id": ""}, "id is no ULID"),
        ({"id": "a\nb"}, "id is no ULID"),
        ({"id": "\ud800"}, "id is no ULID"),
        ({"id": None}, "id is no ULID"),
        ({"id": 7}, "id is no ULID"),
        ({"component_type": "robot"}, "component_type"),
        ({"component_type": ["node"]}, "component_type"),
        ({"created_at": "yesterday"}, "created_at"),
        ({"last_seen": 5}, "last_seen"),
        ({"metadata": None}, ""),
        ({"metadata": {"x": "y" * 50_000}}, ""),
        ({"metadata": "text"}, "metadata"),
        ({"metadata": {"x": "\0"}}, "metadata"),
        ({"workcell_id": 5}, "workcell_id"),
        ({"workcell_id": "\udfff"}, "workcell_id"),
    ],
)
def test_entry_is_judged_by_what_can_be_kept(changed: dict[str, Any], reason: str) -> None:
    """An entry of an old file is taken with any id and size that can be kept; what cannot is named by its field."""
    fault = entry_fault("arm", entry(1, **changed))
    assert fault == "" if not reason else reason in fault
    fault.encode()


@pytest.mark.parametrize("name", ["", "a\0", "\ud800", "x" * 1021])
def test_name_that_cannot_be_kept_is_a_fault(name: str) -> None:
    """A name that is empty, holds a NUL or a lone surrogate, or is longer than four names cannot be kept."""
    assert "name" in entry_fault(name, entry())


def test_id_that_madsci_did_not_make_is_foreign() -> None:
    """A ULID in its canonical form is none of somebody else's; anything else is."""
    assert not is_foreign_id(entry(1))
    assert is_foreign_id(entry(1, id="node-7")) and is_foreign_id(entry(1, id=entry(1)["id"].lower()))
