"""What users type into the nodes."""

from __future__ import annotations

import pytest

from comfy_nodes.selection import (
    Block,
    block_of,
    block_strengths,
    complete,
    parse_selection,
    parse_strengths,
)

SD15 = [
    *(Block("input", i) for i in (1, 2, 4, 5, 7, 8)),
    Block("middle", 0),
    *(Block("output", i) for i in range(3, 12)),
]


def strengths(text: str) -> dict[str, float]:
    """Those that are not 1."""
    found = block_strengths(text, SD15)
    assert list(found) == SD15
    return {f"{b.section}{b.number}": s for b, s in found.items() if s != 1}


def test_blocks() -> None:
    assert strengths("") == strengths(" , ") == {}
    assert strengths("in4-8=0.5") == {f"input{i}": 0.5 for i in (4, 5, 7, 8)}
    assert strengths("mid=0") == strengths("middle = 0") == {"middle0": 0.0}
    assert strengths("IN=2, out11=-1.5") == {
        **{f"input{i}": 2.0 for i in (1, 2, 4, 5, 7, 8)},
        "output11": -1.5,
    }
    # The later entry wins: nothing but output block 5.
    assert set(strengths("in=0 mid=0\nout=0 out5=1")) == {
        f"{b.section}{b.number}" for b in SD15 if b != Block("output", 5)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("in4", "expected entries such as in4-8=0.5, mid=1 or output=0, found 'in4'"),
        ("up1=0.5", "found 'up1=0.5'"),
        ("in=a", "strength of 'in=a': expected a finite number, found 'a'"),
        ("in=nan", "expected a finite number, found 'nan'"),
        ("in8-4=1", "'in8-4=1' names no block with cross-attention; this model's are: input1, "),
        ("in3=1", "input7, input8, middle, output3"),
        ("in-3=1", "found 'in-3=1'"),
    ],
)
def test_bad_blocks(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^blocks: ") as error:
        strengths(text)
    assert message in str(error.value)


def test_block_of_a_layer() -> None:
    assert block_of("input_blocks.4.1.transformer_blocks.0.attn2") == Block("input", 4)
    assert block_of("middle_block.1.transformer_blocks.9.attn2") == Block("middle", 0)
    assert block_of("output_blocks.11.1.transformer_blocks.0.attn2") == Block("output", 11)


def test_selection() -> None:
    assert parse_selection("") == parse_selection(" {} ") == {}
    assert parse_selection('{"vibrant color": 1.5, "光": 0}') == {"vibrant color": 1.5, "光": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vibrant", "expected JSON such as"),
        ("[1]", "expected a JSON object, label to weight, found '[1]'"),
        ('{"a": "b"}', "weight of 'a': expected a finite number, found 'b'"),
        ('{"a": true}', "weight of 'a': expected a finite number, found True"),
        ('{"a": NaN}', "weight of 'a': expected a finite number, found nan"),
        ('{"a": 1e999}', "weight of 'a': expected a finite number, found inf"),
        ('{"a": 1', "expected JSON such as"),
    ],
)
def test_bad_selection(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_selection(text)
    assert message in str(error.value)


def test_defaults_fill_what_is_left_out() -> None:
    defaults = {"color": 1.0, "light": 0.5}
    assert complete(defaults, {}) == defaults
    assert complete(defaults, {"light": 2.0}) == {"color": 1.0, "light": 2.0}
    with pytest.raises(ValueError, match=r"unknown label 'colour'.*labels are: 'color', 'light'"):
        complete(defaults, {"colour": 1.0})


def test_strengths() -> None:
    assert parse_strengths("0, 0.5,1 -2") == [0.0, 0.5, 1.0, -2.0]
    for text in ("", " , ", "1, x"):
        with pytest.raises(ValueError, match=r"^strengths: "):
            parse_strengths(text)
