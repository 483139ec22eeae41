"""Generated text-to-SQL chats: reproducible, disjoint, unambiguous, and answered by SQL that runs."""

import hashlib
import json
import random
import re
import sqlite3
import subprocess
import sys

import pytest

from medusa_ray.demo import chats as generator
from medusa_ray.demo.chats import SEEN, UNSEEN, Column, Table, chats, execute, is_equivalent

DIGEST = """
import hashlib, json
from medusa_ray.demo.chats import chats
print(hashlib.sha256(json.dumps([chats(split, 50, 7) for split in ("train", "test")]).encode()).hexdigest())
"""


def question(chat: dict) -> str:
    return chat["messages"][1]["content"]


def answer(chat: dict) -> str:
    return chat["messages"][2]["content"]


def tables(chat: dict) -> list[Table]:
    """The schema, read back from its CREATE TABLE statements."""
    found = re.findall(r"CREATE TABLE (\w+) \((.*)\);", chat["messages"][0]["content"])
    return [
        Table(name, name, [Column(*column.split(), pool="city") for column in body.split(", ")])
        for name, body in found
    ]


def made_up(sql: str) -> dict:
    """A chat about one small table whose answer is `sql`."""
    schema = "CREATE TABLE orders (order_id INTEGER, price REAL, fee REAL, city TEXT);"
    contents = ["Translate.\n" + schema, "?", sql]
    roles = ["system", "user", "assistant"]
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}


def test_chats_are_the_same_in_every_process():
    """A set or Python's own hash in the generator would look reproducible inside one process."""
    here = hashlib.sha256(json.dumps([chats(split, 50, 7) for split in ("train", "test")]).encode())
    for hash_seed in "1", "2":
        there = subprocess.run(
            [sys.executable, "-c", DIGEST], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True
        )
        assert there.stdout.strip() == here.hexdigest(), there.stderr


def test_a_longer_list_begins_with_the_shorter_and_a_seed_changes_it():
    assert chats("train", 20)[:10] == chats("train", 10)
    assert chats("train", 10, seed=1) != chats("train", 10, seed=2)


def test_ids_are_unique():
    rows = [chat["id"] for split in ("train", "test", "out_of_domain") for chat in chats(split, 200)]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_schema_is_on_the_side_of_its_split(seed: int):
    """Side by side with fixed sides, no train set of any seed can meet a test set of any other."""
    assert not any(generator.is_held_out(tables(chat)) for chat in chats("train", 1000, seed))
    assert all(generator.is_held_out(tables(chat)) for chat in chats("test", 300, seed))


def test_shuffled_columns_and_other_types_do_not_change_the_side():
    for chat in chats("test", 100):
        schema = tables(chat)
        for table in schema:
            table.columns[:] = [Column(column.name, "TEXT", "city") for column in reversed(table.columns)]
        assert generator.is_held_out(schema[::-1])


def test_out_of_domain_schemas_use_no_word_of_the_other_splits():
    def names(vocabulary):
        return {*vocabulary.entities, *vocabulary.numbers, *vocabulary.texts}

    assert not names(SEEN) & names(UNSEEN)
    seen = names(SEEN)
    for chat in chats("out_of_domain", 200):
        for table in tables(chat):
            words = {table.name.split("_")[-1], *(column.name.split("_")[-1] for column in table.columns)}
            assert not words & seen


def test_no_column_word_is_a_question_word():
    """A column total_price beside price would give `the total price` two meanings."""
    phrases = [*generator.SHOW, *generator.CONNECTORS]
    phrases.append("distinct different overall number each per of for and or")
    for group in (*generator.AGGREGATES.values(), *generator.COMPARISONS.values()):
        phrases += group
    for _, superlatives in (*generator.ORDERS, *generator.EXTREMES):
        phrases += superlatives
    said = set(" ".join(phrases).lower().split())
    columns = {prefix.rstrip("_") for prefix in generator.COLUMN_PREFIXES}
    for vocabulary in (SEEN, UNSEEN):
        columns |= {*vocabulary.entities, *vocabulary.numbers, *vocabulary.texts}
    assert not columns & said


def close_names() -> list[Table]:
    """Two tables whose columns are as easy to confuse as the word pools allow."""
    parent = Table("eu_orders", "orders", [Column("order_id", "INTEGER", "")])
    child = Table("orders_old", "visits", [Column("visit_id", "INTEGER", "")])
    for table in (parent, child):
        table.columns.extend(Column(name, "REAL", "number") for name in ("price", "net_price"))
        table.columns.extend(Column(name, "TEXT", "grade") for name in ("grade", "base_grade"))
    child.columns.append(parent.columns[0])
    return [parent, child]


@pytest.mark.parametrize("seed", range(6))
def test_a_question_and_its_schema_admit_one_query(seed: int):
    """Exact match would punish a right answer otherwise. Few columns and values make questions repeat."""
    rng = random.Random(seed)
    schema = close_names() if seed < 3 else generator.draw_schema(rng, SEEN)
    queries: dict[str, str] = {}
    num_repeats = 0
    for _ in range(5000):
        asked, sql = generator.draw_question(rng, schema)
        asked = asked.rstrip("?.")
        num_repeats += asked in queries
        assert queries.setdefault(asked, sql) == sql, asked
    assert num_repeats > 100


def test_everything_in_an_answer_can_be_copied_from_its_prompt():
    for chat in chats("test", 300):
        schema = chat["messages"][0]["content"]
        for value in re.findall(r"'([^'%]*)%?'", answer(chat)):
            assert value in question(chat)
        bare = re.sub(r"'[^']*'", "", answer(chat))
        for number in re.findall(r"\b\d+\b", bare):
            assert re.search(rf"\b{number}\b", question(chat))
        for name in re.findall(r"\b[a-z_]+\b", bare):
            assert re.search(rf"\b{name}\b", schema)


def test_no_test_answer_can_be_known_from_training():
    known = {answer(chat) for chat in chats("train", 5000)}
    assert not known & {answer(chat) for chat in chats("test", 500)}


@pytest.mark.parametrize("split", ["test", "out_of_domain"])
def test_every_answer_runs_and_nearly_all_return_rows(split: generator.Split):
    """An empty result says nothing about a reply."""
    rows = chats(split, 300)
    num_full = sum(bool(execute(chat, answer(chat))) for chat in rows)
    assert num_full >= 0.95 * len(rows)


def test_the_database_of_a_chat_is_the_same_each_time():
    chat = chats("test", 1)[0]
    everything = f"SELECT * FROM {tables(chat)[0].name}"
    assert execute(chat, everything) == execute(chat, everything)
    assert execute(chat, everything) != execute(chat, everything, seed=1)


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM orders",
        "DROP TABLE orders",
        "CREATE TABLE other (x INTEGER)",
        "ATTACH DATABASE '/tmp/other.db' AS other",
        "PRAGMA query_only = 0",
        "SELECT COUNT(*) FROM orders a, orders b, orders c, orders d, orders e",
        "SELECT LENGTH(HEX(ZEROBLOB(900000000)))",
        "SELECT nothing FROM orders",
        "not SQL",
    ],
)
def test_a_query_that_fails_writes_or_never_ends_is_an_error(sql: str):
    chat = made_up("SELECT price FROM orders;")
    with pytest.raises(sqlite3.Error):
        execute(chat, sql)
    assert not is_equivalent(chat, sql)


def test_another_wording_of_the_answer_is_equivalent_and_another_meaning_is_not():
    chat = made_up("SELECT price FROM orders WHERE city = 'Oslo' AND fee > 20;")
    assert is_equivalent(chat, "select price from orders where fee > 20 and city = 'Oslo'")
    assert not is_equivalent(chat, "SELECT fee FROM orders WHERE city = 'Oslo' AND fee > 20;")
    assert not is_equivalent(chat, "SELECT price FROM orders WHERE city = 'Oslo' OR fee > 20;")
    assert not is_equivalent(chat, "SELECT price FROM orders WHERE city = 'Oslo' AND fee > 20; SELECT 1;")
    assert not is_equivalent(chat, "")


def test_order_counts_only_where_the_answer_orders():
    assert is_equivalent(made_up("SELECT price FROM orders;"), "SELECT price FROM orders ORDER BY fee")
    ranked = made_up("SELECT price FROM orders ORDER BY fee DESC LIMIT 5;")
    assert is_equivalent(ranked, "SELECT price FROM orders ORDER BY -fee LIMIT 5")
    other_order = "SELECT price FROM (SELECT * FROM orders ORDER BY fee DESC LIMIT 5) ORDER BY 1"
    assert not is_equivalent(ranked, other_order)


def test_finding_nothing_is_no_proof_of_equivalence():
    chat = made_up("SELECT price FROM orders WHERE price < -100000;")
    assert is_equivalent(chat, answer(chat))
    assert not is_equivalent(chat, "SELECT fee FROM orders WHERE price < -200000;")


def test_text_that_sqlite_cannot_take_is_not_equivalent():
    chat = made_up("SELECT price FROM orders;")
    assert not is_equivalent(chat, "SELECT price\0 FROM orders;")
    assert not is_equivalent(chat, "SELECT '\ud800' FROM orders;")
