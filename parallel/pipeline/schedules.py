"""Pipeline schedules as tables: which stage runs which operation at which tick. Pure Python, no JAX.

A table is made in two steps: each stage's operations in order, which is what a schedule is, and then each operation at
the earliest tick at which its inputs have arrived. A message sent at tick t can be used at tick t + 1 at the soonest.

Virtual stages cut the model in `stages * chunks` parts in model order; `placement` says where each one lives.
Draw one: python -m parallel.pipeline show 1f1b --stages 4 --microbatches 8
"""

import csv
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KINDS = FORWARD, BACKWARD, WEIGHT = "F", "B", "W"
DEFAULT_CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zero_bubble_v": 2}

Placement = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Op:
    """What one stage does in one tick."""

    kind: str  # F forward | B backward: input gradient, and weight gradient too unless split | W weight gradient
    chunk: int  # which of the stage's virtual stages
    microbatch: int  # counted from 0
    line: int | None = field(default=None, compare=False, repr=False)  # of the user's CSV file, for messages

    def __str__(self):
        return f"{self.kind} of chunk {self.chunk}, microbatch {self.microbatch}"


@dataclass(frozen=True)
class PipelineSchedule:
    """A table of operations with the placement of the model's parts. `check` tells whether it is legal."""

    name: str  # of the schedule, or the path of the user's table
    stages: int
    microbatches: int
    chunks: int  # virtual stages on each stage
    placement: Placement  # virtual stage, in model order -> (stage, chunk on that stage)
    table: tuple[tuple[Op | None, ...], ...]  # [tick][stage]

    @property
    def ticks(self) -> int:
        """Rows of the table: every stage does one operation, or waits, in each."""
        return len(self.table)

    @property
    def split(self) -> bool:
        """Whether W operations exist: then B computes input gradients only."""
        return any(op.kind == WEIGHT for _, _, op in self.operations())

    def operations(self) -> Iterator[tuple[int, int, Op]]:
        """(tick, stage, operation), tick by tick."""
        for tick, row in enumerate(self.table):
            for stage, op in enumerate(row):
                if op is not None:
                    yield tick, stage, op

    def peak_in_flight(self) -> tuple[int, ...]:
        """Most (chunk, microbatch) pairs whose activations each stage holds at once: from F to B, to W when split."""
        ends = WEIGHT if self.split else BACKWARD
        held, peak = [0] * self.stages, [0] * self.stages
        for _, stage, op in self.operations():
            held[stage] += (op.kind == FORWARD) - (op.kind == ends)
            peak[stage] = max(peak[stage], held[stage])
        return tuple(peak)

    def bubble(self, forward: float = 1.0, backward_input: float = 1.0, weight: float = 1.0) -> float:
        """Idle share of the stages' time when each runs its operations in order, as soon as their inputs are there.

        Costs are those of one operation on one chunk, in any unit; messages cost nothing. A B that is not split costs
        `backward_input + weight`.
        """
        costs = self._costs(forward, backward_input, weight)
        orders = [[row[stage] for row in self.table if row[stage] is not None] for stage in range(self.stages)]
        starts = _starts(self.placement, orders, costs)
        busy = [sum(costs[op.kind] for op in order) for order in orders]
        ends = [begun[-1] + costs[order[-1].kind] for begun, order in zip(starts, orders, strict=True)]
        return 1 - sum(busy) / (self.stages * max(ends))

    def lockstep_bubble(self, forward: float = 1.0, backward_input: float = 1.0, weight: float = 1.0) -> float:
        """As `bubble`, when all stages wait for each other after every tick, which then lasts as its longest operation.

        That is the worst that an interpreter which exchanges messages in every tick can come to.
        """
        costs = self._costs(forward, backward_input, weight)
        ticks = [[costs[op.kind] for op in row if op is not None] for row in self.table]
        return 1 - sum(map(sum, ticks)) / (self.stages * sum(max(costs, default=0.0) for costs in ticks))

    def _costs(self, forward: float, backward_input: float, weight: float) -> dict[str, float]:
        return {FORWARD: forward, BACKWARD: backward_input + (0 if self.split else weight), WEIGHT: weight}


def make(name: str, stages: int, microbatches: int, chunks: int = 0) -> PipelineSchedule:
    """The schedule of that name, or the user's table at that path if it ends with .csv; legal for any sizes >= 1.

    `chunks` 0 takes the schedule's own: 2 for interleaved and zero_bubble_v, else 1. Raises ValueError for an unknown
    name, sizes below 1, chunks that the schedule cannot have, and a table that is illegal or of other sizes.
    """
    sizes = {"stages": stages, "microbatches": microbatches}
    for word, size in sizes.items():
        if size < 1:
            raise ValueError(f"a pipeline of {size} {word} is impossible; use {word} >= 1")
    if name.endswith(".csv"):
        return _of_sizes(read_csv(name), sizes | ({"chunks": chunks} if chunks else {}))
    if name not in DEFAULT_CHUNKS:
        raise ValueError(f"schedule {name} is unknown; use {', '.join(DEFAULT_CHUNKS)} or a path to a .csv table")
    asked, chunks = chunks, chunks or DEFAULT_CHUNKS[name]
    if chunks < 1 or (name != "interleaved" and chunks != DEFAULT_CHUNKS[name]):
        valid = "1 or more" if name == "interleaved" else str(DEFAULT_CHUNKS[name])
        raise ValueError(f"schedule {name} cannot have chunks={asked}; use {valid}, or 0 to choose")

    orders = [_order(name, stage, stages, microbatches, chunks) for stage in range(stages)]
    placement = v_placement(stages) if name == "zero_bubble_v" else looped_placement(stages, chunks)
    return PipelineSchedule(name, stages, microbatches, chunks, placement, _table(placement, orders))


def _of_sizes(schedule: PipelineSchedule, asked: Mapping[str, int]) -> PipelineSchedule:
    wrong = [word for word, size in asked.items() if getattr(schedule, word) != size]
    if wrong:
        has = ", ".join(f"{word}={getattr(schedule, word)}" for word in wrong)
        wanted = ", ".join(f"{word}={asked[word]}" for word in wrong)
        raise ValueError(f"{schedule.name} is a table for {has}, but {wanted} is asked for; change one to the other")
    return schedule


def looped_placement(stages: int, chunks: int) -> Placement:
    """The model goes `chunks` times up the stages: virtual stage chunk * stages + stage."""
    return tuple((stage, chunk) for chunk in range(chunks) for stage in range(stages))


def v_placement(stages: int) -> Placement:
    """Chunk 0 goes up the stages, chunk 1 comes back: the first stage holds both ends of the model."""
    return (*((stage, 0) for stage in range(stages)), *((stage, 1) for stage in reversed(range(stages))))


def forward_only(stages: int, microbatches: int, placement: Placement) -> PipelineSchedule:
    """F operations only, for evaluation, in as few ticks as the placement allows.

    A stage runs what has arrived, in the order of training: group by group, in a group the first chunk first. Nothing
    is held for a backward, so that `check` and `peak_in_flight` are not for it.
    """
    waiting = [[] for _ in range(stages)]  # heaps of (group, virtual stage, microbatch): the inputs that have arrived
    groups = _groups(stages, microbatches)
    waiting[placement[0][0]] = [(number, 0, m) for number, group in enumerate(groups) for m in group]
    table = []
    while any(waiting):
        row, sent = [None] * stages, []
        for stage, arrived in enumerate(waiting):
            if arrived:
                group, virtual, microbatch = heapq.heappop(arrived)
                row[stage] = Op(FORWARD, placement[virtual][1], microbatch)
                sent.append((group, virtual + 1, microbatch))
        for group, virtual, microbatch in sent:
            if virtual < len(placement):
                heapq.heappush(waiting[placement[virtual][0]], (group, virtual, microbatch))
        table.append(tuple(row))
    return PipelineSchedule("forward_only", stages, microbatches, len(placement) // stages, placement, tuple(table))


# ------------------------------------------------------------------------------- the order of each stage's operations


def _order(name: str, stage: int, stages: int, microbatches: int, chunks: int) -> list[Op]:
    """What a stage does, one after the other: phases of a pattern and its number of rounds.

    F, B, W in a pattern stand for the next such operation; of chunk 0 or 1 with a digit behind. A pattern goes on with
    its other operations when one kind has run out, so that schedules hold for fewer microbatches than stages.
    """
    groups = _groups(stages, microbatches)
    forwards = [Op(FORWARD, chunk, m) for group in groups for chunk in range(chunks) for m in group]
    backwards = [Op(BACKWARD, chunk, m) for group in groups for chunk in reversed(range(chunks)) for m in group]
    weights = [Op(WEIGHT, op.chunk, op.microbatch) for op in backwards]
    lists = {FORWARD: forwards, BACKWARD: backwards, WEIGHT: weights}
    queues = {kind: iter(ops) for kind, ops in lists.items()}
    for chunk in range(chunks):
        queues |= {f"{kind}{chunk}": iter([op for op in ops if op.chunk == chunk]) for kind, ops in lists.items()}

    later = stages - 1 - stage
    match name:
        case "gpipe":
            phases = [("F", microbatches), ("B", microbatches)]
        case "1f1b":
            phases = [("F", later), ("F B", microbatches)]
        case "interleaved":
            # 1f1b further ahead (Megatron-LM's count): by the first group's way through all chunks but the last, and by
            # twice the later stages, which alternate already while this one still has to fill them.
            ahead = 2 * later + (chunks - 1) * len(groups[0]) if chunks > 1 else later
            phases = [("F", ahead), ("F B", len(forwards))]
        case "zero_bubble":
            # ZB-H1 (arXiv 2401.10241): 1f1b whose W stays `stage` microbatches behind B, to fill the bubble at the end.
            full = max(microbatches - stages, 0)
            phases = [("F", later + 1), ("B F", stage), ("B W F", full), ("B W", later + 1), ("W", stage)]
        case "zero_bubble_v":
            # ZB-V (the same paper), laid out for 2 * stages - 1 microbatches or more; fewer leave operations out.
            full = max(microbatches, 2 * stages - 1) - stages
            phases = [("F0", 2 * later + 1), ("F1 F0", stage), ("F1 B1 W1", later + 1)]
            phases += [("F0 B0 W0 F1 B1 W1", full)]
            phases += [("B0 B1", stage), ("B0 W0", later + 1), ("W1 W0", stage)]
    names = (name for pattern, rounds in phases for name in pattern.split() * rounds)
    return [op for name in names if (op := next(queues[name], None))]


def _groups(stages: int, microbatches: int) -> list[range]:
    """Microbatches that go through a chunk in a row before the next chunk's turn; the larger groups come first.

    With groups of `stages` a chunk's first result is back at stage 0 just when the group is through (Megatron-LM,
    arXiv 2104.04473). A remainder makes groups larger, not smaller: after a smaller one stage 0 would wait.
    """
    count = max(1, microbatches // stages)
    bounds = [-(-microbatches * i // count) for i in range(count + 1)]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]


# ------------------------------------------------------------------------------------------- from orders to start times


def _inputs(kind: str, virtual: int, microbatch: int, last: int) -> list[tuple[str, int, int]]:
    """What has to be done before an operation, all as (kind, virtual stage, microbatch); `last` virtual stage."""
    if kind == FORWARD:
        return [(FORWARD, virtual - 1, microbatch)] if virtual > 0 else []
    if kind == WEIGHT:
        return [(BACKWARD, virtual, microbatch)]
    own = (FORWARD, virtual, microbatch)
    return [own, (BACKWARD, virtual + 1, microbatch)] if virtual < last else [own]


def _starts(placement: Placement, orders: Sequence[Sequence[Op]], costs: Mapping[str, float]) -> list[list[float]]:
    """When each operation starts: stages work through their orders, each operation as soon as its inputs are there."""
    virtuals = {place: virtual for virtual, place in enumerate(placement)}
    starts, free, done = [[] for _ in orders], [0] * len(orders), {}
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            for op in order[len(starts[stage]) :]:
                virtual = virtuals[stage, op.chunk]
                needed = [done.get(key) for key in _inputs(op.kind, virtual, op.microbatch, len(placement) - 1)]
                if None in needed:
                    break
                start = max(free[stage], *needed, 0)
                starts[stage].append(start)
                free[stage] = done[op.kind, virtual, op.microbatch] = start + costs[op.kind]
                moved = True
    assert all(len(begun) == len(order) for begun, order in zip(starts, orders, strict=True)), "stages wait in a circle"
    return starts


def _table(placement: Placement, orders: Sequence[Sequence[Op]]) -> tuple[tuple[Op | None, ...], ...]:
    starts = _starts(placement, orders, dict.fromkeys(KINDS, 1))
    table = [[None] * len(orders) for _ in range(1 + max(begun[-1] for begun in starts))]
    for stage, (begun, order) in enumerate(zip(starts, orders, strict=True)):
        for tick, op in zip(begun, order, strict=True):
            table[tick][stage] = op
    return tuple(map(tuple, table))


# ------------------------------------------------------------------------------------------------------ what is legal


def check(schedule: PipelineSchedule) -> None:
    """Raises ValueError for an illegal schedule, naming tick, stage and operation, and the line of a user's table.

    Legal: every chunk of every microbatch has one F, one B and, if there is any W, one W; each at a later tick than its
    inputs; placement and table have the sizes that the schedule states.
    """
    name, stages, microbatches, chunks = schedule.name, schedule.stages, schedule.microbatches, schedule.chunks
    places = list(itertools.product(range(stages), range(chunks)))
    if not places or sorted(schedule.placement) != places:
        raise ValueError(f"{name}: the placement does not hold each of {stages} stages * {chunks} chunks once")
    for tick, row in enumerate(schedule.table):
        if len(row) != stages:
            raise ValueError(f"{name}: tick {tick} has {len(row)} entries for {stages} stages")
    virtuals = {place: virtual for virtual, place in enumerate(schedule.placement)}
    found: dict[tuple[str, int, int], tuple[int, int, Op]] = {}  # by kind, virtual stage, microbatch
    for tick, stage, op in schedule.operations():
        at = _at(name, tick, stage, op)
        if op.kind not in KINDS:
            raise ValueError(f"{at}: operation {op.kind} is unknown; use {', '.join(KINDS)}")
        if not (0 <= op.chunk < chunks and 0 <= op.microbatch < microbatches):
            raise ValueError(f"{at} is outside of chunks 0..{chunks - 1} and microbatches 0..{microbatches - 1}")
        key = op.kind, virtuals[stage, op.chunk], op.microbatch
        if key in found:
            earlier = found[key]
            raise ValueError(f"{at} is there twice: already at tick {earlier[0]}{_on_line(earlier[2])}; remove one")
        found[key] = tick, stage, op
    _check_complete(schedule, found)
    for key, (tick, stage, op) in found.items():
        for needed in _inputs(*key, last=len(places) - 1):
            sent, sender, message = found[needed]
            if sent >= tick:
                needs = f"needs {message} of stage {sender}, which is at tick {sent}{_on_line(message)}"
                raise ValueError(f"{_at(name, tick, stage, op)} {needs}: it can be at tick {sent + 1} at the soonest")


def _check_complete(schedule: PipelineSchedule, found: Mapping[tuple[str, int, int], tuple[int, int, Op]]) -> None:
    kinds = KINDS if schedule.split else (FORWARD, BACKWARD)
    for virtual, (stage, chunk) in enumerate(schedule.placement):
        for microbatch in range(schedule.microbatches):
            others = [found[key] for kind in kinds if (key := (kind, virtual, microbatch)) in found]
            for kind in kinds:
                if (kind, virtual, microbatch) not in found:
                    # the line of a neighbour helps to find the place
                    at = f"{_at(schedule.name, *others[0])} is there, but" if others else f"{schedule.name}:"
                    raise ValueError(f"{at} stage {stage} has no {Op(kind, chunk, microbatch)}; add it")


def _at(name: str, tick: int, stage: int, op: Op) -> str:
    return f"{name}{'' if op.line is None else f':{op.line}'}: tick {tick}, stage {stage}: {op}"


def _on_line(op: Op) -> str:
    return "" if op.line is None else f" (line {op.line})"


# ----------------------------------------------------------------------------------------------- a user's own CSV table

COLUMNS = ("tick", "stage", "operation", "chunk", "microbatch")
VIRTUAL = "virtual"  # optional column: place of (stage, chunk) in the model; default chunk * stages + stage


def write_csv(schedule: PipelineSchedule, path: str | Path) -> None:
    """Writes the table with one line an operation; `read_csv` gives the same schedule back. Raises OSError."""
    looped = schedule.placement == looped_placement(schedule.stages, schedule.chunks)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS if looped else (*COLUMNS, VIRTUAL))
        for tick, stage, op in schedule.operations():
            row = (tick, stage, op.kind, op.chunk, op.microbatch)
            writer.writerow(row if looped else (*row, schedule.placement.index((stage, op.chunk))))


def read_csv(path: str | Path) -> PipelineSchedule:
    """A user's table: columns tick, stage, operation (F, B or W), chunk, microbatch and perhaps virtual, all from 0.

    Its sizes are what the table holds. Raises ValueError naming file and line for anything that is not legal.
    """
    cells: dict[tuple[int, int], Op] = {}  # by tick, stage
    virtuals: dict[tuple[int, int], int] = {}  # by stage, chunk
    counts: dict[str, dict[int, int]] = {name: {} for name in ("tick", "stage", "chunk", "microbatch")}  # first lines
    for line, row in _rows(path):
        numbers = {column: _number(text, column, path, line) for column, text in row.items() if column != "operation"}
        tick, stage = numbers["tick"], numbers["stage"]
        op = Op(row["operation"], numbers["chunk"], numbers["microbatch"], line)
        if op.kind not in KINDS:
            raise ValueError(f"{path}:{line}: operation {op.kind!r} is unknown; use {', '.join(KINDS)}")
        if (other := cells.setdefault((tick, stage), op)) is not op:
            raise ValueError(
                f"{path}:{line}: tick {tick}, stage {stage} has an operation already, {other}{_on_line(other)}; "
                "a stage does one operation a tick"
            )
        for column, lines in counts.items():
            lines.setdefault(numbers[column], line)
        virtual = numbers.get(VIRTUAL)
        if virtual is not None and virtuals.setdefault((stage, op.chunk), virtual) != virtual:
            was = virtuals[stage, op.chunk]
            raise ValueError(f"{path}:{line}: stage {stage}, chunk {op.chunk} is virtual {was} above, {virtual} here")
    if not cells:
        raise ValueError(f"{path}: the table holds no operation")
    ticks, stages, chunks, microbatches = (_count(path, column, lines) for column, lines in counts.items())
    placement = _placement(path, stages, chunks, virtuals) if virtuals else looped_placement(stages, chunks)
    table = tuple(tuple(cells.get((tick, stage)) for stage in range(stages)) for tick in range(ticks))
    schedule = PipelineSchedule(str(path), stages, microbatches, chunks, placement, table)
    check(schedule)
    return schedule


def _rows(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields by column of each row below the header."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [column.strip() for column in next(reader, [])]
            if sorted(header) not in (sorted(COLUMNS), sorted((*COLUMNS, VIRTUAL))):
                valid = f"{','.join(COLUMNS)} and, if need be, {VIRTUAL}"
                raise ValueError(f"{path}:1: the header is {','.join(header) or 'missing'}; use {valid}")
            for row in filter(any, reader):
                if len(row) != len(header):
                    raise ValueError(f"{path}:{reader.line_num}: {len(row)} fields for {len(header)} columns")
                yield reader.line_num, {column: text.strip() for column, text in zip(header, row, strict=True)}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV text: {error}") from error


def _number(text: str, column: str, path: str | Path, line: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise ValueError(f"{path}:{line}: {column} {text!r} is no number; use 0, 1, 2, ...")
    return int(text)


def _count(path: str | Path, column: str, lines: Mapping[int, int]) -> int:
    """How many values a column has; ValueError with the line of the first beyond a gap, as they count from 0."""
    for expected, (value, line) in enumerate(sorted(lines.items())):
        if value != expected:
            raise ValueError(
                f"{path}:{line}: {column} {value} is there, but no {column} {expected}; count without gaps"
            )
    return len(lines)


def _placement(path: str | Path, stages: int, chunks: int, virtuals: Mapping[tuple[int, int], int]) -> Placement:
    places = sorted(virtuals, key=virtuals.__getitem__)
    if len(places) != stages * chunks or sorted(virtuals.values()) != list(range(len(places))):
        held = ", ".join(f"stage {stage} chunk {chunk}: {virtuals[stage, chunk]}" for stage, chunk in places)
        raise ValueError(
            f"{path}: column {VIRTUAL} has to give {stages} stages * {chunks} chunks "
            f"the numbers 0..{stages * chunks - 1} once each, but gives {held}"
        )
    return tuple(places)
