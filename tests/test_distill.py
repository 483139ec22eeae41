"""A killed run goes on and ends with the same rows; the rows are what the engine says when called alone."""

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from medusa_ray import distill, parts, provenance, records
from medusa_ray.chat import Chat
from medusa_ray.config import RunConfig, UserError
from medusa_ray.distill import rows as distilled_rows
from medusa_ray.distill.generate import Generator, SharedEngine
from medusa_ray.distill.given import Copier
from medusa_ray.distill.rows import seed_of
from medusa_ray.medusa import states
from medusa_ray.medusa.engine import Engine, Request
from medusa_ray.medusa.replies import Counters
from medusa_ray.medusa.scheduler import Sequence
from medusa_ray.states import settings_of

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test

NUM_PROMPTS = 20
BAD = 7  # index of a prompt that came with an error
HUGE = 11  # index of a prompt that no engine can serve


def make_prompts(folder: Path | str, base: Path) -> list[dict[str, Any]]:
    """Two files of prompts, as the data stage writes them."""
    chat = Chat.load(str(base))
    rows = []
    for i in range(NUM_PROMPTS):
        messages = [{"role": "user", "content": f"{'why ' * (i % 5)}{i}"}]
        reference = None if i == 3 else f"because {i}"
        row = {
            "id": f"chat{i:02}/0",
            "messages": messages,
            "prompt_ids": [4] * 510 if i == HUGE else chat.prompt_ids(messages),
            "reference": reference,
            "reference_ids": reference and chat.reply_ids(messages, reference),
            "error": None,
        }
        if i == BAD:
            row |= {"prompt_ids": [], "reference_ids": None, "error": "too long: very"}
        rows.append(row)
    for index, some in enumerate((rows[:13], rows[13:])):
        table = pa.Table.from_pylist(some, records.PROMPTS)
        parts.write(f"{folder}/prompts/train", parts.part_name(index), table)
    provenance.write(f"{folder}/prompts", {}, {}, splits={"train": {"longest_prompt_tokens": 510}})
    return rows


def config_of(folder: Path | str, base: Path, mode: str = "capture", **options: Any) -> RunConfig:
    options = {"batch_size": 1, "rows_per_part": 4, "max_new_tokens": 12, **options}
    return RunConfig.model_validate(
        {
            "output": str(folder),
            "model": {"base": str(base), "dtype": "float32", "device": "cpu"},
            "data": {"train": "-"},
            "distill": options,
            "hidden": {"mode": mode},
        }
    )


def rows_of(config: RunConfig, artifact: str) -> list[dict[str, Any]]:
    folder = config.artifact(artifact)
    return [row for name in parts.names(folder) for row in parts.read(folder, name).to_pylist()]


class Parrot:
    """An engine that answers with the seed's digits and kills its process while file `flag` is missing."""

    hidden_size, num_waiting = 2, 0

    def __init__(self, flag: str | None = None) -> None:
        self.flag = flag
        self.counters = Counters()
        self.waiting: list[Sequence] = []

    def check(self, request: Request) -> None:
        if len(request.prompt_ids) + request.max_new_tokens > 512:
            raise ValueError("the limit is 512.")

    def add(self, request: Request) -> Sequence:
        sequence = Sequence(request, frozenset())
        self.waiting.append(sequence)
        return sequence

    def step(self) -> None:
        if self.flag and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        while self.waiting:
            sequence = self.waiting.pop()
            sequence.token_ids = [int(digit) for digit in str(sequence.seed)[:5]]
            sequence.hidden_parts, sequence.finish_reason = [torch.ones(5, 2)], "stop"
            self.counters.num_steps += 1


def parrot(base: str, **options: Any) -> Parrot:
    return Parrot()


# -------------------------------------------------------------------------------------------- without Ray


def worker(config: RunConfig, load_engine: Any = parrot) -> Generator:
    folders = [config.artifact(name) for name in ("prompts", "distilled", "hidden")]
    return Generator(config, config.model.base, "cpu", 510, *folders, load_engine)


def test_a_teacher_asks_the_model_while_no_other_thread_does(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pass sets the model up otherwise: a step in the middle of it would see the teacher's states."""
    make_prompts(tmp_path, tiny_base)
    at_once = config_of(tmp_path / "at_once", tiny_base, batch_size=4)
    at_once = at_once.model_copy(update={"hidden": at_once.hidden.model_copy(update={"top_k": 4})})
    in_turn = at_once.model_copy(update={"output": str(tmp_path / "in_turn")})
    set_up = states._before_output

    @contextmanager
    def slowly(*arguments: Any) -> Iterator[None]:
        with set_up(*arguments):
            time.sleep(0.05)
            yield

    for config, num_threads in ((in_turn, 1), (at_once, 3)):
        os.makedirs(config.output)
        os.symlink(tmp_path / "prompts", config.artifact("prompts"))
        generator = worker(config, Engine.load)
        monkeypatch.setattr(states, "_before_output", slowly)
        with ThreadPoolExecutor(num_threads) as threads:
            list(threads.map(generator, distill.plan(f"{tmp_path}/prompts/train", 4)))
    assert rows_of(at_once, "distilled") == rows_of(in_turn, "distilled")
    hidden = [[row["teacher_ids"] for row in rows_of(config, "hidden")] for config in (at_once, in_turn)]
    assert hidden[0] == hidden[1]


def test_every_prompt_is_in_one_shard_and_shards_never_change(tmp_path: Path, tiny_base: Path) -> None:
    make_prompts(tmp_path, tiny_base)
    shards = list(distill.plan(f"{tmp_path}/prompts/train", 4))
    assert [(shard["source"], shard["start"], shard["length"]) for shard in shards] == [
        ("part-000000", 0, 4), ("part-000000", 4, 4), ("part-000000", 8, 4), ("part-000000", 12, 1),
        ("part-000001", 0, 4), ("part-000001", 4, 3),
    ]  # fmt: skip
    assert [shard["part"] for shard in shards] == [parts.part_name(i) for i in range(6)]
    assert shards == list(distill.plan(f"{tmp_path}/prompts/train", 4))


def test_seeds_differ_by_row_and_by_run_but_never_by_chance() -> None:
    seeds = {seed_of(seed, f"chat{i}/0") for seed in range(3) for i in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "chat0/0") == 7609246971096445180


def test_bad_prompts_stay_rows_and_do_not_disturb_the_others(tmp_path: Path, tiny_base: Path) -> None:
    prompts = make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)
    generator = worker(config)
    for shard in distill.plan(f"{tmp_path}/prompts/train", 4):
        generator(shard)
    rows = rows_of(config, "distilled")
    assert [row["id"] for row in rows] == [f"{prompt['id']}/0" for prompt in prompts]
    errors = {i: row["error"] for i, row in enumerate(rows) if row["error"]}
    assert errors == {BAD: "too long: very", HUGE: "refused by the engine: the limit is 512."}
    good = [row for row in rows if not row["error"]]
    for row in good:
        assert row["reply_ids"] == [int(digit) for digit in str(seed_of(0, row["id"][:-2]))[:5]]
    hidden = rows_of(config, "hidden")
    assert [row["id"] for row in hidden] == [row["id"] for row in good]
    facts: dict[str, Any] = {}
    for name in parts.names(config.artifact("distilled")):
        distilled_rows.add(facts, distilled_rows.read_facts(config.artifact("distilled"), name))
    counts = {"in": 20, "good": 18, "errors": {"too long": 1, "refused by the engine": 1}}
    assert (facts["rows"], facts["sources"]) == (counts, {"train": counts})
    assert (facts["finish_reasons"], facts["num_reply_tokens"]) == ({"stop": 18}, 90)
    assert facts["num_prompt_tokens"] == sum(len(row["prompt_ids"]) for row in good)
    assert facts["taken"]["all"] == 18


def test_hidden_rows_are_the_states_that_some_label_needs(tmp_path: Path, tiny_base: Path) -> None:
    """A state too many or one place off still trains; only acceptance drops."""
    make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)
    generator = worker(config, Engine.load)
    generator({"part": "part-000000", "source": "part-000000", "start": 0, "length": 2})
    table = parts.read(config.artifact("hidden"), "part-000000")
    assert table.schema.equals(records.HIDDEN)
    assert table.schema.metadata == {b"dtype": b"float32", b"hidden_size": b"32", b"top_k": b"0"}
    for row, reply in zip(table.to_pylist(), rows_of(config, "distilled"), strict=True):
        num_prompt, num_reply = len(reply["prompt_ids"]), len(reply["reply_ids"])
        assert row["input_ids"] == reply["prompt_ids"] + reply["reply_ids"]
        assert row["position"] == list(range(num_prompt - 1, num_prompt + num_reply - 2))
        assert row["label_mask"] == [False] * num_prompt + [True] * num_reply
        state_TC = torch.frombuffer(bytearray(row["hidden"]), dtype=torch.float32).view(-1, 32)
        logits_TV = generator.engine.model.get_output_embeddings()(state_TC)
        assert logits_TV.argmax(-1).tolist() == reply["reply_ids"][:-1]


def test_a_reply_of_one_token_leaves_no_hidden_row(tmp_path: Path, tiny_base: Path) -> None:
    make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base, max_new_tokens=1)
    worker(config, Engine.load)({"part": "part-000000", "source": "part-000000", "start": 0, "length": 2})
    assert len(rows_of(config, "distilled")) == 2
    table = parts.read(config.artifact("hidden"), "part-000000")
    assert len(table) == 0
    assert table.schema.equals(records.HIDDEN)


def test_half_precision_states_keep_their_bytes(tmp_path: Path, tiny_base: Path) -> None:
    make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    worker(config, Engine.load)({"part": "part-000000", "source": "part-000000", "start": 0, "length": 1})
    table = parts.read(config.artifact("hidden"), "part-000000")
    assert table.schema.metadata[b"dtype"] == b"bfloat16"
    (row,) = table.to_pylist()
    assert len(row["hidden"]) == len(row["position"]) * 32 * 2


def test_given_replies_are_the_chats_own(tmp_path: Path, tiny_base: Path) -> None:
    prompts = make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base, mode="compute", replies="given")
    rows = copied(config)
    errors = {i: row["error"].split(":")[0] for i, row in enumerate(rows) if row["error"]}
    assert errors == {3: "no reply", BAD: "too long"}
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if row["error"] is None and i != HUGE:
            assert row["reply_ids"] == prompt["reference_ids"]
            assert row["finish_reason"] == "stop"


def copied(config: RunConfig) -> list[dict[str, Any]]:
    folders = [config.artifact(name) for name in ("prompts", "distilled")]
    copier = Copier(config, config.model.base, *folders)
    for shard in distill.plan(f"{config.output}/prompts/train", 4):
        copier(shard)
    return rows_of(config, "distilled")


def test_an_over_long_reply_is_cut_or_left_out_or_stops_the_run(tmp_path: Path, tiny_base: Path) -> None:
    """The base has 512 positions, of which the prompt takes 510."""
    prompts = make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base, mode="compute", replies="given")
    row = copied(config)[HUGE]
    assert (row["reply_ids"], row["finish_reason"]) == (prompts[HUGE]["reference_ids"][:2], "length")

    def with_over_long(what: str) -> RunConfig:
        return config.model_copy(update={"data": config.data.model_copy(update={"over_long": what})})

    row = copied(with_over_long("skip"))[HUGE]
    reason = "too long: a prompt of 510 tokens and a reply of 11, over distill.max_new_tokens = 12 or the base's 512"
    assert row["error"].startswith(reason)
    assert row["reply_ids"] == []
    with pytest.raises(UserError, match=r"chat11/0 is too long: .* Set data\.over_long to truncate or skip"):
        copied(with_over_long("error"))
    shorter = config.model_copy(update={"distill": config.distill.model_copy(update={"max_new_tokens": 4})})
    assert {len(row["reply_ids"]) for row in copied(shorter) if row["error"] is None} == {2, 4}


def test_only_what_shapes_the_rows_makes_another_run(tmp_path: Path, tiny_base: Path) -> None:
    make_prompts(tmp_path, tiny_base)
    keys = [
        provenance.key(*distill.identity(config_of(tmp_path, tiny_base, **options)))
        for options in ({}, {"num_actors": 2}, {"mode": "compute"}, {"seed": 1}, {"temperature": 0.5})
    ]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3
    provenance.write(f"{tmp_path}/prompts", {"num_train": 5}, {})
    assert provenance.key(*distill.identity(config_of(tmp_path, tiny_base))) not in keys


def test_rows_of_another_config_are_refused_and_not_removed(tmp_path: Path, tiny_base: Path) -> None:
    """A typo would otherwise cost what hours have generated."""
    make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)

    def start(config: RunConfig) -> set[str]:
        folders = config.artifact("distilled"), config.artifact("hidden")
        return distill.begin(config, *folders, *distill.identity(config))

    assert start(config) == set()
    generator = worker(config)
    for shard in list(distill.plan(f"{tmp_path}/prompts/train", 4))[:2]:
        generator(shard)
    assert start(config) == {"part-000000", "part-000001"}
    assert start(config_of(tmp_path, tiny_base, batch_size=9, num_actors="auto")) == {
        "part-000000",
        "part-000001",
    }
    other = config_of(tmp_path, tiny_base, seed=5)
    with pytest.raises(
        UserError, match=r"distilled holds 2 parts of another run: distill\.seed was 0, and is 5\. Set"
    ):
        start(other)
    deeper = config.model_copy(update={"hidden": config.hidden.model_copy(update={"top_k": 4})})
    with pytest.raises(UserError, match=r"hidden holds 2 parts of another run: top_k was 0, and is 4\. Set"):
        start(deeper)
    (tmp_path / "hidden" / "part-000001.parquet").unlink()
    with pytest.raises(
        UserError, match=r"1 of 2 parts of .* have no states in .* Set hidden\.mode to compute"
    ):
        start(config)
    assert len(rows_of(config, "distilled")) == 8


def test_parts_are_few_and_never_large(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"{tmp_path}/prompts/train"
    sizes = {}
    for num_rows in (1, 64, 6400, 100_000):
        ids = pa.array([f"chat{i}/0" for i in range(num_rows)])
        parts.write(folder, parts.part_name(0), pa.table({"id": ids}))
        config = config_of(tmp_path, tiny_base, rows_per_part=None)
        sizes[num_rows] = distill.rows_per_part(config, f"{tmp_path}/prompts")
    assert sizes == {1: 1, 64: 1, 6400: 100, 100_000: 512}
    monkeypatch.setattr(distill, "MOST_PARTS", 100)
    assert distill.rows_per_part(config, f"{tmp_path}/prompts") == 1000


def test_more_files_than_names_can_keep_in_order_are_refused(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """part-1000000 would come before part-999999."""
    make_prompts(tmp_path, tiny_base)
    monkeypatch.setattr(parts, "MOST", 2)
    with pytest.raises(UserError, match=r"rows_per_part is 4, which makes \d+ files; expected 2 at most\. Raise it"):
        distill.run(config_of(tmp_path, tiny_base))


def test_ids_that_stand_there_twice_are_refused(tmp_path: Path) -> None:
    folder = str(tmp_path)
    parts.write(folder, "part-000000", pa.table({"id": ["a/0", "b/0"]}))
    distill._refuse_twins(folder)
    parts.write(folder, "part-000001", pa.table({"id": ["c/0", "a/0"]}))
    with pytest.raises(UserError, match=r"1 ids in .* stand there twice, a/0 for one"):
        distill._refuse_twins(folder)


def test_every_sample_has_a_seed_of_its_own(tmp_path: Path, tiny_base: Path) -> None:
    make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base, samples=3, temperature=1.0)
    worker(config)({"part": "part-000000", "source": "part-000000", "start": 6, "length": 2})
    rows = rows_of(config, "distilled")
    assert [row["id"] for row in rows] == [f"chat0{i}/0/{n}" for i in (6, 7) for n in range(3)]
    assert len({tuple(row["reply_ids"]) for row in rows[:3]}) == 3
    assert [row["error"] for row in rows[3:]] == ["too long: very"] * 3
    alone = config_of(tmp_path / "alone", tiny_base, temperature=1.0)
    make_prompts(tmp_path / "alone", tiny_base)
    worker(alone)({"part": "part-000000", "source": "part-000000", "start": 6, "length": 2})
    assert rows_of(alone, "distilled") == rows[::3]  # the first is what it would be by itself


def test_shards_of_two_threads_share_the_batch_and_not_their_rows(tmp_path: Path, tiny_base: Path) -> None:
    """One after the other each shard would end with a batch that is nearly empty."""
    engine = Engine.load(str(tiny_base), max_batch_size=4, max_total_tokens=512)
    shared = SharedEngine(engine, 4)
    prompts = [[1, 4, 10 + i] for i in range(24)]
    lengths = [5 + 7 * (i % 6) for i in range(24)]

    def generate(indices: range) -> list[list[int]]:
        with shared.entered(alone=False):
            asked = [
                Request(prompts[i], lengths[i], temperature=1.0, seed=i, ignore_eos=True) for i in indices
            ]
            return [completion.token_ids for completion in shared.generate(asked)]

    with ThreadPoolExecutor(3) as pool:
        replies = [
            ids for some in pool.map(generate, [range(i, i + 6) for i in range(0, 24, 6)]) for ids in some
        ]
    for i, ids in enumerate(replies):
        (alone,) = engine.generate([prompts[i]], lengths[i], temperature=1.0, seed=i, ignore_eos=True)
        assert ids == alone.token_ids
    cost = shared.cost()
    assert cost["taken"]["all"] == sum(lengths) - 24  # the first token is the prompt's
    assert cost["taken"]["steady"] / cost["slots"]["steady"] > 0.9
    assert shared.cost()["slots"] == {"all": 0, "steady": 0}


def test_a_shard_that_wants_the_engine_for_itself_gets_it(tmp_path: Path, tiny_base: Path) -> None:
    """Another shard's row that ended the process would be blamed on this one's."""
    shared = SharedEngine(Parrot(), 4)
    inside: list[int] = []
    most: list[int] = []

    def enter(number: int) -> None:
        alone = number % 3 == 0
        with shared.entered(alone):
            inside.append(number)
            time.sleep(0.005)
            assert not alone or inside == [number]
            most.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(enter, range(30)))
    assert max(most) > 1


def test_prompts_that_are_not_finished_are_not_distilled(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"prompts is not finished\. Run the data stage"):
        distill.run(config_of(tmp_path, tiny_base))


# -------------------------------------------------------------------------------------------- with Ray


@pytest.mark.ray
def test_rows_are_what_the_engine_says_when_it_is_called_alone(
    ray_cluster: None, tmp_path: Path, tiny_base: Path
) -> None:
    """Sampled, so that a seed that depends on the shard, the actor or the batch would show."""
    prompts = make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base, temperature=1.0, seed=3, num_actors=2)
    assert distill.run(config) == config.artifact("distilled")
    engine = Engine.load(str(tiny_base), max_batch_size=3, max_total_tokens=512)
    good = [prompt for i, prompt in enumerate(prompts) if i not in (BAD, HUGE)]
    seeds = [seed_of(3, prompt["id"]) for prompt in good]
    alone = engine.generate([p["prompt_ids"] for p in good], max_new_tokens=12, temperature=1.0, seed=seeds)
    rows = [row for row in rows_of(config, "distilled") if row["error"] is None]
    assert [row["reply_ids"] for row in rows] == [completion.token_ids for completion in alone]
    assert [row["finish_reason"] for row in rows] == [completion.finish_reason for completion in alone]
    facts = provenance.read(config.artifact("distilled"))
    assert (facts["rows"]["good"], facts["rows"]["in"], facts["sources"]) == (
        18,
        20,
        {"train": facts["rows"]},
    )
    assert facts["num_reply_tokens"] == sum(len(row["reply_ids"]) for row in rows)
    assert 0 < facts["occupancy"]["all"] <= 1

    written = (tmp_path / "distilled" / "part-000000.parquet").stat().st_mtime_ns
    distill.run(config)
    assert (tmp_path / "distilled" / "part-000000.parquet").stat().st_mtime_ns == written


@pytest.mark.ray
def test_a_killed_run_goes_on_and_a_killed_actor_is_replaced(
    ray_cluster: None, tmp_path: Path, tiny_base: Path
) -> None:
    make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)
    # The state in which a killed run leaves things: two whole parts, one half, one begun.
    distilled, hidden = tmp_path / "distilled", tmp_path / "hidden"
    key = provenance.key(*distill.identity(config))
    parts.begin(str(distilled), key)
    parts.begin(str(hidden), provenance.key(settings_of(config), {"distilled": key}))
    generator = worker(config)
    for shard in list(distill.plan(f"{tmp_path}/prompts/train", 4))[:3]:
        generator(shard)
    (distilled / "part-000002.parquet").unlink()
    (distilled / "part-000003.parquet.0123.unfinished").write_bytes(b"PAR1")
    whole = (distilled / "part-000001.parquet").stat().st_mtime_ns

    flag = tmp_path / "killed"
    distill.run(config, lambda base, **options: Parrot(str(flag)))
    assert flag.exists()
    assert (distilled / "part-000001.parquet").stat().st_mtime_ns == whole
    assert provenance.read(str(distilled))["rows"]["good"] == 18

    fresh = config_of(tmp_path / "fresh", tiny_base)
    make_prompts(tmp_path / "fresh", tiny_base)
    generator = worker(fresh)
    for shard in distill.plan(f"{tmp_path}/fresh/prompts/train", 4):
        generator(shard)
    assert rows_of(config, "distilled") == rows_of(fresh, "distilled")
    assert rows_of(config, "hidden") == rows_of(fresh, "hidden")


@pytest.mark.ray
def test_a_full_disk_stops_a_run_that_goes_on_once_there_is_room(
    ray_cluster: None, tmp_path: Path, tiny_base: Path
) -> None:
    make_prompts(tmp_path, tiny_base)
    config = config_of(tmp_path, tiny_base)
    distilled, room = tmp_path / "distilled", tmp_path / "room"

    def on_a_small_disk(base: str, **options: Any) -> Parrot:
        write_table = pq.write_table

        def write(table: pa.Table, file: Any) -> None:
            if len(list(distilled.glob("*.parquet"))) >= 2 and not room.exists():
                file.write(b"PAR1")
                raise OSError(errno.ENOSPC, "No space left on device")
            write_table(table, file)

        pq.write_table = write
        return Parrot()

    with pytest.raises(
        UserError, match=r"No space left on device\. What is finished is kept: once there is room"
    ):
        distill.run(config, on_a_small_disk)
    assert len(parts.names(str(distilled))) == 2
    written = (distilled / "part-000000.parquet").stat().st_mtime_ns
    room.touch()
    distill.run(config, on_a_small_disk)
    assert (distilled / "part-000000.parquet").stat().st_mtime_ns == written
    assert [row["id"] for row in rows_of(config, "distilled")] == [
        f"chat{i:02}/0/0" for i in range(NUM_PROMPTS)
    ]
    assert not list(distilled.rglob("*.unfinished"))
