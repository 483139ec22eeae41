"""A seed -> text-to-SQL chats: a random schema, a question about it and the one SQL query that answers it.

Schemas are drawn from so many names, and questions carry so many random values, that nothing can be answered
by heart: table, column and value have to be copied from the prompt. A phrasing stands for one SQL shape and
names its columns in the query's order, so a question and its schema determine the query, and exact match is a
fair measure.

Splits: `train` and `test` share the words but no schema (a digest of the schema decides its side, whatever
the seed); `out_of_domain` has entities and columns that the other two never use.
"""

import hashlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["train", "test", "out_of_domain"]
Chat = dict[str, Any]
Rng = random.Random
Worded = tuple[str, str]  # the same thing in English and in SQL

INSTRUCTION = "You translate questions into SQL for this schema."
TEST_SHARE = 8  # one schema in so many is held out


def words(text: str) -> list[str]:
    return text.split()


@dataclass(frozen=True)
class Vocabulary:
    """Names of a domain. Entities are plurals in -s or -ies; a text column names the pool of its values.

    No column word may double as a question word (total, average, distinct): questions would be ambiguous.
    """

    entities: list[str]
    numbers: list[str]
    texts: dict[str, str]


SEEN = Vocabulary(
    entities=words(
        """orders customers products invoices payments shipments employees departments projects tickets
        suppliers stores warehouses accounts loans flights airports hotels bookings patients doctors
        visits students courses teachers books authors films actors songs albums artists teams players
        races stadiums cars dealers drivers trips sensors readings devices users sessions posts comments
        claims policies farms crops recipes ingredients events venues donors grants"""
    ),
    numbers=words(
        """amount price quantity score age salary weight height duration capacity rating balance budget
        revenue distance speed rank stock discount tax points wins losses views pages width length volume
        temperature hours cost fee year"""
    ),
    texts={
        "name": "person", "owner": "person", "manager": "person", "contact": "person", "nickname": "person",
        "city": "city", "region": "city", "origin": "city", "destination": "city", "country": "country",
        "status": "status", "category": "kind", "type": "kind", "genre": "kind", "code": "code",
        "label": "code", "model": "code", "color": "color", "currency": "currency", "brand": "brand",
        "grade": "grade", "title": "title",
    },
)  # fmt: skip
UNSEEN = Vocabulary(
    entities=words(
        """clinics museums rockets parcels voters juries vineyards turbines satellites bakeries ferries
        tournaments glaciers orchestras"""
    ),
    numbers=words("altitude pressure tonnage mileage humidity bounty latency voltage yield depth"),
    texts={
        "captain": "person", "inspector": "person", "district": "city", "harbor": "city",
        "homeland": "country", "species": "kind", "dialect": "kind", "badge": "code", "license": "code",
        "verdict": "status",
    },
)  # fmt: skip
TABLE_PREFIXES = ["", "", "", "", *words("dim_ fact_ eu_ us_ stg_ raw_ old_ new_ daily_ monthly_")]
COLUMN_PREFIXES = [
    *("", "", "", ""),
    *words("net_ base_ primary_ secondary_ home_ billing_ shipping_ last_ initial_ daily_ weekly_ previous_"),
    *words("current_ target_ local_ spare_"),
]
FIRST_NAMES = words(
    """Anna Boris Carla David Elena Felix Grace Hugo Irene Jonas Karla Liam Maria Nadia Oscar Paula Quinn Rosa
    Simon Tara Ugo Vera Walter Xenia Yusuf Zoe"""
)
LAST_NAMES = words(
    """Adams Baker Clark Diaz Evans Foster Gupta Hill Ito Jensen Khan Lopez Meyer Novak Olsen Perez Reed Silva
    Tanaka Urban Vogel Weber Young Zhang"""
)
POOLS = {
    "city": words(
        """Paris Lyon Berlin Madrid Oslo Rome Vienna Lima Quito Cairo Tokyo Osaka Delhi Boston Denver Austin
        Miami Dallas Porto Geneva Zurich Prague Dublin Athens Seoul Hanoi Perth Sydney"""
    ),
    "country": words(
        """France Germany Spain Norway Italy Austria Peru Ecuador Egypt Japan India Canada Portugal
        Switzerland Ireland Greece Vietnam Australia Brazil Chile Kenya Ghana"""
    ),
    "status": words(
        "active inactive pending shipped cancelled closed open approved rejected expired draft paid overdue"
    ),
    "kind": words(
        """basic premium standard gold silver bronze retail wholesale online classic modern rock jazz drama
        comedy sports science history"""
    ),
    "color": words("red blue green black white yellow orange purple grey brown"),
    "currency": words("USD EUR GBP JPY CHF BRL INR CAD"),
    "brand": words("Acme Globex Initech Umbrella Stark Wayne Hooli Vandelay Wonka Cyberdyne Soylent Tyrell"),
    "grade": words("A B C D E F"),
    "title": words("Sunrise Harbor Echo Voyage Garden Winter Mirror Falcon River Shadow Lantern Compass"),
}
CODE_LETTERS = "ABCDEFGHKLMNPRSTX"
SHOW = ("List the", "Show the", "What is the", "Give me the", "Find the", "Return the")
CONNECTORS = ("where", "whose", "for which")
COMPARISONS = {
    ">": ("is above", "is greater than", "is over", "exceeds"),
    "<": ("is below", "is less than", "is under"),
    ">=": ("is at least", "is no less than"),
    "<=": ("is at most", "is no more than"),
    "=": ("is", "equals", "is exactly"),
    "BETWEEN": ("is between", "lies between"),
}
AGGREGATES = {
    "AVG": ("average", "mean"),
    "SUM": ("total", "sum of the"),
    "MAX": ("maximum", "highest"),
    "MIN": ("minimum", "lowest"),
}
ORDERS = (("DESC", ("highest", "largest", "top")), ("ASC", ("lowest", "smallest", "bottom")))
EXTREMES = (("MAX", ("highest", "largest")), ("MIN", ("lowest", "smallest")))


# ----------------------------------------------------------------------------------------------- schemas


@dataclass(frozen=True)
class Column:
    """`pool` says where values come from: a key of POOLS, person, code or number; "" marks a key column."""

    name: str
    type: str
    pool: str

    @property
    def spoken(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Table:
    """Questions name a table by its entity, and never ask for its keys."""

    name: str
    entity: str
    columns: list[Column]

    def asked(self) -> list[Column]:
        return [column for column in self.columns if column.pool]

    def numbers(self) -> list[Column]:
        return [column for column in self.asked() if column.pool == "number"]

    def texts(self) -> list[Column]:
        return [column for column in self.asked() if column.pool != "number"]

    def ddl(self) -> str:
        columns = ", ".join(f"{column.name} {column.type}" for column in self.columns)
        return f"CREATE TABLE {self.name} ({columns});"


def draw_schema(rng: Rng, vocabulary: Vocabulary) -> list[Table]:
    """One table, or two of which the second refers to the first by its key."""
    entities = rng.sample(vocabulary.entities, 2 if rng.random() < 0.4 else 1)
    tables = [draw_table(rng, vocabulary, entity) for entity in entities]
    if len(tables) == 2:
        tables[1].columns.append(tables[0].columns[0])
    return tables


def draw_table(rng: Rng, vocabulary: Vocabulary, entity: str) -> Table:
    """A key, then two to five columns in any order, at least one of text and one of numbers."""
    drawn: dict[str, Column] = {}
    for is_text in (True, False, *rng.choices((True, False), k=rng.randint(1, 3))):
        word = rng.choice(list(vocabulary.texts) if is_text else vocabulary.numbers)
        name = rng.choice(COLUMN_PREFIXES) + word
        column_type = "TEXT" if is_text else rng.choice(("INTEGER", "REAL"))
        drawn.setdefault(name, Column(name, column_type, vocabulary.texts[word] if is_text else "number"))
    columns = list(drawn.values())
    rng.shuffle(columns)
    singular = entity[:-3] + "y" if entity.endswith("ies") else entity[:-1]
    key = Column(f"{singular}_id", "INTEGER", "")
    return Table(rng.choice(TABLE_PREFIXES) + entity, entity, [key, *columns])


def is_held_out(tables: list[Table]) -> bool:
    """The side of a schema. The order and the types of its columns do not make it another schema."""
    identity = sorted(f"{table.name}:{sorted(column.name for column in table.columns)}" for table in tables)
    return hashlib.sha256("\n".join(identity).encode()).digest()[0] % TEST_SHARE == 0


# -------------------------------------------------------------------------------------------- conditions


def draw_text(rng: Rng, pool: str) -> str:
    if pool == "person":
        return rng.choice(FIRST_NAMES) + (f" {rng.choice(LAST_NAMES)}" if rng.random() < 0.6 else "")
    if pool == "code":
        return "".join(rng.choices(CODE_LETTERS, k=2)) + f"-{rng.randint(10, 999)}"
    return rng.choice(POOLS[pool])


def draw_number(rng: Rng) -> int:
    ranges = (rng.randint(1, 20), rng.randint(10, 100), rng.randint(1, 50) * 10, rng.randint(1, 40) * 50)
    return rng.choice(ranges)


def text_condition(rng: Rng, column: Column, name: str) -> Worded:
    value, said = draw_text(rng, column.pool), column.spoken
    match rng.choices(("equal", "unequal", "either", "prefix"), weights=(70, 10, 10, 10))[0]:
        case "equal":
            return f"{said} {rng.choice(('is', 'equals', 'is exactly'))} {value}", f"{name} = '{value}'"
        case "unequal":
            return f"{said} {rng.choice(('is not', 'is other than'))} {value}", f"{name} <> '{value}'"
        case "either":
            other = value
            while other == value:
                other = draw_text(rng, column.pool)
            choice = rng.choice((f"is either {value} or {other}", f"is one of {value}, {other}"))
            return f"{said} {choice}", f"{name} IN ('{value}', '{other}')"
        case _:
            start = value[:2]
            return f"{said} {rng.choice(('starts with', 'begins with'))} {start}", f"{name} LIKE '{start}%'"


def number_condition(rng: Rng, column: Column, name: str) -> Worded:
    value = draw_number(rng)
    operator = rng.choices(list(COMPARISONS), weights=(34, 24, 10, 6, 14, 12))[0]
    said = f"{column.spoken} {rng.choice(COMPARISONS[operator])} {value}"
    if operator == "BETWEEN":
        upper = value + draw_number(rng)
        return f"{said} and {upper}", f"{name} BETWEEN {value} AND {upper}"
    return said, f"{name} {operator} {value}"


def draw_condition(rng: Rng, column: Column, qualifier: str) -> Worded:
    draw = number_condition if column.pool == "number" else text_condition
    return draw(rng, column, qualifier + column.name)


def draw_where(rng: Rng, table: Table, qualifier: str = "") -> Worded:
    """One condition, or two about different columns joined by AND or OR."""
    count, joint = rng.choices(((1, ""), (2, "and"), (2, "or")), weights=(55, 35, 10))[0]
    conditions = [draw_condition(rng, column, qualifier) for column in rng.sample(table.asked(), count)]
    said = f" {joint} ".join(words for words, _ in conditions)
    sql = f" {joint.upper()} ".join(sql for _, sql in conditions)
    return f"{rng.choice(CONNECTORS)} {said}", f"WHERE {sql}"


# --------------------------------------------------------------------------- shapes of questions and SQL


def draw_columns(rng: Rng, table: Table) -> Worded:
    columns = rng.sample(table.asked(), min(len(table.asked()), rng.choice((1, 1, 2, 2, 3))))
    *most, last = [column.spoken for column in columns]
    said = f"{', '.join(most)} and {last}" if most else last
    return said, ", ".join(column.name for column in columns)


def draw_aggregate(rng: Rng, column: Column) -> Worded:
    function = rng.choice(list(AGGREGATES))
    return f"{rng.choice(AGGREGATES[function])} {column.spoken}", f"{function}({column.name})"


def projection(rng: Rng, table: Table) -> Worded:
    (said, columns), (condition, where) = draw_columns(rng, table), draw_where(rng, table)
    question = f"{rng.choice(SHOW)} {said} of {table.entity} {condition}"
    return question, f"SELECT {columns} FROM {table.name} {where}"


def count(rng: Rng, table: Table) -> Worded:
    condition, where = draw_where(rng, table)
    asked = rng.choice(("How many {} are there", "Count the {}", "What is the number of {}"))
    question = f"{asked.format(table.entity)} {condition}"
    return question, f"SELECT COUNT(*) FROM {table.name} {where}"


def aggregate(rng: Rng, table: Table) -> Worded:
    said, function = draw_aggregate(rng, rng.choice(table.numbers()))
    condition, where = draw_where(rng, table)
    question = f"{rng.choice(SHOW)} {said} of {table.entity} {condition}"
    return question, f"SELECT {function} FROM {table.name} {where}"


def ranking(rng: Rng, table: Table) -> Worded:
    said, columns = draw_columns(rng, table)
    condition, where = draw_where(rng, table) if rng.random() < 0.4 else ("", "")
    by, limit = rng.choice(table.numbers()), rng.randint(2, 10)
    order, superlatives = rng.choice(ORDERS)
    of = f"of the {limit} {table.entity} with the"
    question = f"{rng.choice(SHOW)} {said} {of} {rng.choice(superlatives)} {by.spoken} {condition}"
    return question, f"SELECT {columns} FROM {table.name} {where} ORDER BY {by.name} {order} LIMIT {limit}"


def grouping(rng: Rng, table: Table) -> Worded:
    group = rng.choice(table.texts())
    said, function = draw_aggregate(rng, rng.choice(table.numbers()))
    each = f"For each {group.spoken}, what is the {said} of {table.entity}?"
    question = rng.choice((each, f"{rng.choice(SHOW)} {said} of {table.entity} per {group.spoken}"))
    return question, f"SELECT {group.name}, {function} FROM {table.name} GROUP BY {group.name}"


def having(rng: Rng, table: Table) -> Worded:
    group, limit = rng.choice(table.texts()), rng.randint(2, 10)
    question = f"{rng.choice(('Which', 'What'))} {group.spoken} has more than {limit} {table.entity}?"
    return question, f"SELECT {group.name} FROM {table.name} GROUP BY {group.name} HAVING COUNT(*) > {limit}"


def extreme(rng: Rng, table: Table) -> Worded:
    (said, columns), by = draw_columns(rng, table), rng.choice(table.numbers())
    function, superlatives = rng.choice(EXTREMES)
    of = f"of the {table.entity} with the overall"
    question = f"{rng.choice(SHOW)} {said} {of} {rng.choice(superlatives)} {by.spoken}"
    inner = f"SELECT {function}({by.name}) FROM {table.name}"
    return question, f"SELECT {columns} FROM {table.name} WHERE {by.name} = ({inner})"


def distinct(rng: Rng, table: Table) -> Worded:
    column, (condition, where) = rng.choice(table.texts()), draw_where(rng, table)
    show = f"{rng.choice(SHOW)} distinct {column.spoken} of"
    asked = rng.choice((show, f"Which different {column.spoken} appear in"))
    return f"{asked} {table.entity} {condition}", f"SELECT DISTINCT {column.name} FROM {table.name} {where}"


def join_clause(parent: Table, child: Table) -> str:
    key = parent.columns[0].name
    return f"FROM {child.name} JOIN {parent.name} ON {child.name}.{key} = {parent.name}.{key}"


def join_projection(rng: Rng, parent: Table, child: Table) -> Worded:
    column, (condition, where) = rng.choice(child.asked()), draw_where(rng, parent, f"{parent.name}.")
    question = f"{rng.choice(SHOW)} {column.spoken} of {child.entity} for {parent.entity} {condition}"
    return question, f"SELECT {child.name}.{column.name} {join_clause(parent, child)} {where}"


def join_count(rng: Rng, parent: Table, child: Table) -> Worded:
    condition, where = draw_where(rng, parent, f"{parent.name}.")
    asked = rng.choice(("Count the {} of {}", "How many {} belong to {}")).format(child.entity, parent.entity)
    return f"{asked} {condition}", f"SELECT COUNT(*) {join_clause(parent, child)} {where}"


def join_grouping(rng: Rng, parent: Table, child: Table) -> Worded:
    group = rng.choice(parent.texts())
    have = f"How many {child.entity} does each {group.spoken} of {parent.entity} have?"
    question = rng.choice((have, f"For each {group.spoken} of {parent.entity}, count the {child.entity}"))
    column = f"{parent.name}.{group.name}"
    return question, f"SELECT {column}, COUNT(*) {join_clause(parent, child)} GROUP BY {column}"


ON_ONE_TABLE: dict[Callable[[Rng, Table], Worded], int] = {
    projection: 30, count: 12, aggregate: 12, ranking: 12, grouping: 10, having: 8, extreme: 8, distinct: 8,
}  # fmt: skip
ON_TWO_TABLES: dict[Callable[[Rng, Table, Table], Worded], int] = {
    join_projection: 50, join_count: 25, join_grouping: 25,
}  # fmt: skip


def draw_question(rng: Rng, tables: list[Table]) -> Worded:
    """A question about the schema and the query that answers it, with or without a full stop at its end."""
    if len(tables) == 2 and rng.random() < 0.6:
        two = rng.choices(list(ON_TWO_TABLES), list(ON_TWO_TABLES.values()))[0]
        question, sql = two(rng, *tables)
    else:
        one = rng.choices(list(ON_ONE_TABLE), list(ON_ONE_TABLE.values()))[0]
        question, sql = one(rng, rng.choice(tables))
    question = " ".join(question.split()).removesuffix("?")
    is_question = question.startswith(("What", "How", "Which", "For each")) and "count the" not in question
    return question + rng.choice(("?", "?", "") if is_question else (".", "")), " ".join(sql.split()) + ";"


# ------------------------------------------------------------------------------------------------- chats


def chats(split: Split, num_chats: int, seed: int = 0) -> list[Chat]:
    """The first `num_chats` chats of a split and seed: {"id", "messages": [system, user, assistant]}.

    The same on every machine, and a longer list begins with the shorter one.
    """
    return [draw_chat(split, seed, index) for index in range(num_chats)]


def draw_chat(split: Split, seed: int, index: int) -> Chat:
    rng = random.Random(f"{split}/{seed}/{index}")
    vocabulary = UNSEEN if split == "out_of_domain" else SEEN
    tables = draw_schema(rng, vocabulary)
    while split != "out_of_domain" and is_held_out(tables) != (split == "test"):
        tables = draw_schema(rng, vocabulary)
    question, sql = draw_question(rng, tables)
    system = "\n".join([INSTRUCTION, *(table.ddl() for table in tables)])
    messages = [("system", system), ("user", question), ("assistant", sql)]
    return {
        "id": f"{split}-{seed}-{index}",
        "messages": [{"role": role, "content": content} for role, content in messages],
    }


# ---------------------------------------------------------------------------------------------- execution

READ_ONLY = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
MAX_LENGTH = 1_000_000  # characters of one value
MAX_WORK = 2_000_000  # instructions of sqlite's machine
FILLER = ("Bergen", "amber", "ZQ-101", "Ruth", "Kyoto", "plain")


def execute(chat: Chat, sql: str, seed: int = 0) -> list[tuple]:
    """Rows of a query on a small random database of the chat's schema, filled with the answer in mind.

    The query may only read, and its work is bounded. Raises sqlite3.Error when it fails or may not run.
    """
    connection = sqlite3.connect(":memory:")
    try:
        fill(connection, chat, seed)
        connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in READ_ONLY else sqlite3.SQLITE_DENY
        )
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_LENGTH)
        connection.set_progress_handler(lambda: 1, MAX_WORK)
        return connection.execute(sql).fetchmany(10_000)
    finally:
        connection.close()


def fill(connection: sqlite3.Connection, chat: Chat, seed: int, num_rows: int = 60) -> None:
    """Creates the chat's tables and rows, such that most conditions of its answer hold for some rows."""
    schema = chat["messages"][0]["content"].partition("\n")[2]
    answer = chat["messages"][-1]["content"]
    texts = re.findall(r"'([^']*)'", answer)
    numbers = [int(digits) for digits in re.findall(r"(?<![\w'-])\d+", answer)] or [50]
    rng = random.Random(f"{seed}/{schema}")

    def draw_value(row: int, is_first: bool, name: str, column_type: str) -> int | str:
        if name.endswith("_id"):
            return row if is_first else rng.randrange(num_rows)
        if column_type == "TEXT":
            likely_first = FILLER[min(rng.randrange(6), rng.randrange(6))]
            value = rng.choice(texts) if texts and rng.random() < 0.6 else likely_first
            return value.replace("%", rng.choice(("ra", "lo")))
        return rng.choice(numbers) + (0 if rng.random() < 0.25 else rng.randint(-60, 90))

    connection.executescript(schema)
    for table, body in re.findall(r"CREATE TABLE (\w+) \((.*)\);", schema):
        columns = re.findall(r"(\w+) (INTEGER|REAL|TEXT)", body)
        places = ", ".join("?" * len(columns))
        for row in range(num_rows):
            values = [draw_value(row, place == 0, *column) for place, column in enumerate(columns)]
            connection.execute(f"INSERT INTO {table} VALUES ({places})", values)


def is_equivalent(chat: Chat, sql: str) -> bool:
    """Whether a query returns what the chat's answer returns, on two databases.

    Rows count as a multiset unless the answer orders them. Where the answer finds nothing on either database,
    finding nothing proves nothing: then the query has to be the answer itself.
    """
    answer = chat["messages"][-1]["content"]
    if sql.strip() == answer:
        return True
    try:
        pairs = [(execute(chat, answer, seed), execute(chat, sql, seed)) for seed in (0, 1)]
    except (sqlite3.Error, sqlite3.Warning, ValueError):  # ValueError: a NUL or a lone surrogate in the text
        return False
    if not any(expected for expected, _ in pairs):
        return False
    if "ORDER BY" in answer:
        return all(expected == found for expected, found in pairs)
    return all(Counter(expected) == Counter(found) for expected, found in pairs)
