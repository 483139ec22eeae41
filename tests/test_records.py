"""The tables that stages hand each other."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medusa_ray import records

SCHEMAS = {
    name: schema for name, schema in vars(records).items() if isinstance(schema, pa.Schema)
}  # every table of the module, so that a new one is tested too


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_table_survives_parquet_with_its_types(name: str, tmp_path: Path) -> None:
    """Token ids must stay plain int32 lists: Ray's converters make tensors of them when lengths agree."""
    schema = SCHEMAS[name]
    pq.write_table(schema.empty_table(), tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet").schema.equals(schema)


def test_columns_come_in_order_and_strangers_are_dropped() -> None:
    rows = {"reference": ["c"], "extra": [1], "id": ["a"], "reply": ["b"]}
    table = records.check_columns(pa.table(rows), records.REPLIES, "evaluation")
    assert table.schema.equals(records.REPLIES)


def test_a_missing_column_is_named_with_the_stage_to_run_again() -> None:
    with pytest.raises(
        ValueError, match=r"evaluation lacks the columns \['reference'\]; it has \['id', 'reply'\]"
    ):
        records.check_columns(pa.table({"id": ["a"], "reply": ["b"]}), records.REPLIES, "evaluation")


def test_a_hidden_row_asks_a_head_only_where_a_label_exists() -> None:
    """Three prompt tokens and four of a reply: a head at t guesses t + 2, which exists for t = 2, 3, 4."""
    row = records.hidden_row("a", [5, 6, 7], [1, 2, 3, 4], b"", "last")
    assert row["position"] == [2, 3, 4]
    assert row["input_ids"][row["position"][-1] + 2] == 4
    assert row["label_mask"] == [False] * 3 + [True] * 4


def test_where_all_tokens_are_labels_the_first_still_is_none() -> None:
    """No state says it."""
    row = records.hidden_row("a", [5, 6, 7], [1, 2, 3, 4], b"", "all")
    assert row["position"] == [0, 1, 2, 3, 4]
    assert row["label_mask"] == [False] + [True] * 6
    assert records.num_positions(3, 4, "all") == 5
    assert records.num_positions(3, 1, "last") == 0


def test_a_hidden_table_says_how_its_bytes_are_to_be_read() -> None:
    row = records.hidden_row("a", [5], [1, 2], bytes(2 * 8), "last")
    table = records.hidden_table([row], "bfloat16", 8, 2)
    assert table.schema.metadata == {b"dtype": b"bfloat16", b"hidden_size": b"8", b"top_k": b"2"}
    assert table.schema.remove_metadata().equals(records.HIDDEN)
