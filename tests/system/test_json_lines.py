"""minllama/system/json_lines.py: an object a line, or one list of them, in any layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minllama.system.errors import UsageError
from minllama.system.json_lines import read_values

VALUES = st.recursive(
    st.none() | st.integers() | st.text('a"\\[]{},: \n\u4e2d', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("k]", max_size=2), inner),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.text('a"[,', max_size=3), VALUES, max_size=3), max_size=5)


def read(text: str) -> list[tuple[int, dict]]:
    return list(read_values(enumerate(text.split("\n"), start=1), Path("a.json")))


@given(OBJECTS, st.sampled_from([None, 0, 1, 4]), st.booleans(), st.integers(0, 2))
def test_a_list_is_its_items_in_any_layout(objects, indent, ascii_only, blank):
    """Each with the number of the line that it begins on; blank lines are nothing."""
    text = "\n" * blank + json.dumps(objects, indent=indent, ensure_ascii=ascii_only) + "\n" * blank
    found = read(text)
    assert [value for _, value in found] == objects
    lines = text.split("\n")
    assert all("{" in lines[number - 1] for number, _ in found)


@given(OBJECTS, st.sampled_from([None, 0, 2]))
def test_lines_are_objects(objects, indent):
    """As many as there are, with their numbers; an object over several lines was no JSON."""
    texts = [json.dumps(value, indent=indent) for value in objects]
    starts = [1 + sum(text.count("\n") + 2 for text in texts[:i]) for i in range(len(texts))]
    assert read("\n\n".join(texts)) == list(zip(starts, objects, strict=True))


BAD = {
    "[": r"a.json:1: not JSON \(its list has no end\)",
    '[{"a": 1},': "a.json:1: not JSON .its list has no end",
    '[\n{"a": 1},\n{"b":\n\n': "a.json:3: not JSON .its list has no end",
    '[{"a": 1}]\n{}': "a.json:2: more after the end of the list",
    '[\n{"a": 1},\n{"a" 1},\n{}]': "a.json:3: not JSON .Expecting ':'",
    '[{"a": "b\nc"}]': "a.json:1: not JSON .Unterminated string",
    "[" * 100_000: "a.json:1: not JSON",
    '[{"a":' * 100_000: "a.json:1: not JSON",
    "[{" + '"a":{},\n' * 2000: "a.json:1: not JSON .its list has no end",
    '{"a": 1,\n{"b": 2}': "a.json:2: not JSON .*; the item begins in line 1",
    '{"a": 1} {"b": 2}': "a.json:1: not JSON .more than one value in a line",
    '[{"a": 1}\n\n{"b": 2}]': "a.json:3: not JSON .no comma before this item",
    '{}\n{"a"': "a.json:2: not JSON",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_no_json_is_named(text):
    """By its line, soon, and with no other exception."""
    with pytest.raises(UsageError, match=BAD[text]):
        read(text)


@pytest.mark.parametrize("layout", ["[%s]", "%s"])
def test_an_item_of_many_long_lines_is_parsed_a_few_times(layout, monkeypatch):
    """It was parsed again with each line that it gained: 900 lines of 171 MB took over a minute."""
    item, parsed = {"a": ["x" * 2000] * 900}, []
    text = layout % json.dumps(item, indent=0)

    class Decoder(json.JSONDecoder):
        def raw_decode(self, text: str, at: int = 0):
            parsed.append(len(text) - at)
            return super().raw_decode(text, at)

    monkeypatch.setattr("minllama.system.json_lines.json.JSONDecoder", Decoder)
    assert read(text) == [(1, item)]
    assert sum(parsed) < 4 * len(text) and len(parsed) < 20


def test_a_list_in_one_line_is_read_once():
    """A shard of TinyStories is one line of 130 MB, which a quadratic reader reads for hours."""
    text = json.dumps([{"story": "Once upon a time."}] * 300_000)
    assert sum(1 for _ in read(text)) == 300_000
