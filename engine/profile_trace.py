"""Where profiled steps went: from a Chrome trace of torch's profiler to the share of each part of a step.

Marks are host events `step/NAME`, all on one thread; the innermost one that is open says which part the host is in.

With device activity in the trace, each instant of the steps is shared equally among the parts that have an activity on
the device then, and an instant with none is idle.  An activity belongs to the part that the host was in when it was
launched, by time, since autograd launches from threads of its own; NCCL's kernels are communication.

Without, each instant belongs to the part that the host is in, less what is communication.  gloo works in threads of its
own, as events `gloo:NAME`, while the host's thread shows the launch alone, as `c10d::NAME` (torch 2.14): that it waits
shows by what is missing.  So a pause between the host's operators counts as communication up to the end of a collective
within it; one in which no collective ends was not spent waiting for any.  How long the host takes to wake up after that
the trace does not tell; it stays with the part.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, NamedTuple

PARTS = ("data", "forward", "loss", "backward", "optimizer", "communication")
OTHER, IDLE = "other", "idle"
PREFIX = "step/"
WHOLE = "whole"  # the mark around a step
OUTSIDE = "outside"  # the mark around what happens between two steps and is part of neither
NO_OPERATOR = "(no operator open)"

_COMMUNICATION = "communication"
_HOST = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Busiest(NamedTuple):
    """A kernel, or without device activity an operator, in one part of the step."""

    name: str
    part: str
    ms: float
    """Milliseconds a step, without those of operators inside of it; overlapping kernels count in full."""
    calls: float
    """A step."""
    share: float
    """`ms` over the wall time of a step."""


class Bar(NamedTuple):
    """A stretch of the timeline of one step."""

    row: str
    part: str
    start: float
    """Milliseconds from the start of the step."""
    length: float
    """Milliseconds."""


@dataclass(frozen=True)
class Breakdown:
    """Where the profiled steps went."""

    steps: int
    """How many were profiled."""
    ms_per_step: float
    """Wall time of a step in milliseconds."""
    on_device: bool
    """Whether shares are of the device's time; else of the host's."""
    graphs: bool
    """Whether CUDA graphs were replayed: all that one holds counts in the part that launched it."""
    shares: dict[str, float]
    """Share of the time, of PARTS, OTHER and IDLE; they add up to 1."""
    idle_host: dict[str, float]
    """Share of the time in which the device idled while the host was in each part; they add up to that of IDLE."""
    busiest: list[Busiest]
    """Those with most time."""
    timeline: list[Bar]
    """The step of median length: what the host was in, then each stream of the device, or gloo's collectives."""


class _Span(NamedTuple):
    """An interval in microseconds of the trace's clock."""

    start: float
    end: float
    part: str
    name: str
    first: bool = True  # of the pieces that an operator is in
    row: str = "host"


class _Piece(NamedTuple):
    """A stretch of the host's thread with the same innermost event."""

    start: float
    end: float
    mark: str  # the innermost that is open
    name: str  # of the innermost operator
    first: bool  # of the pieces of this operator
    launches: bool  # a collective is being launched
    may_wait: bool  # for a collective: the innermost event does not compute

    @property
    def part(self) -> str:
        return _COMMUNICATION if self.launches else _part_of(self.mark)


def _part_of(mark: str) -> str:
    return mark if mark in PARTS else OTHER


def breakdown(trace: Mapping[str, Any], *, top: int = 15, skip: int = 0) -> Breakdown:
    """The steps marked in a Chrome trace, by parts, with the `top` busiest kernels or operators.

    The first `skip` steps are left out.  Raises ValueError: the trace has no such step.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    marked = sorted((event for event in events if _mark(event) == WHOLE), key=_start)[skip:]
    if not marked:
        raise ValueError(f"the trace holds no event {PREFIX}{WHOLE}")
    thread = (marked[0]["pid"], marked[0]["tid"])
    own = [event for event in events if event.get("cat") in _HOST and (event["pid"], event["tid"]) == thread]
    pieces = list(_pieces(own))
    steps = [_without((_start(event), _end(event)), own) for event in marked]
    windows = [window for step in steps for window in step]
    lengths = [sum(end - start for start, end in step) for step in steps]
    wall = sum(lengths)

    collectives = [
        _Span(_start(e), _end(e), _COMMUNICATION, e["name"], row="collectives")
        for e in events
        if e["name"].startswith("gloo:")
    ]
    host = list(_with_waits(pieces, collectives))
    device = list(_device_spans(events, pieces))
    busy = device or host
    shared, idle_host = _shares(windows, busy, host)
    middle = marked[lengths.index(median_low(lengths))]
    return Breakdown(
        steps=len(steps),
        ms_per_step=wall / len(steps) / 1e3,
        on_device=bool(device),
        graphs=any(
            e.get("cat") in _LAUNCHES and "GraphLaunch" in e["name"] and _overlap(_start(e), _end(e), windows)
            for e in events
        ),
        shares={part: shared[part] / wall for part in (*PARTS, OTHER, IDLE)},
        idle_host={part: idle_host[part] / wall for part in (*PARTS, OTHER)},
        busiest=_busiest(busy, windows, len(steps), wall)[:top],
        timeline=list(_timeline(_start(middle), _end(middle), [*host, *(device or collectives)])),
    )


def _start(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


def _mark(event: Mapping[str, Any]) -> str:
    """The name of a host's mark; empty for any other event."""
    found = event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)
    return event["name"].removeprefix(PREFIX) if found else ""


def _without(step: tuple[float, float], events: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """What is left of a step when what lies outside of it is cut out."""
    windows, now = [], step[0]
    for event in sorted((e for e in events if _mark(e) == OUTSIDE), key=_start):
        if step[0] <= _start(event) < step[1]:
            windows.append((now, _start(event)))
            now = min(_end(event), step[1])
    return [*windows, (now, step[1])]


# -- the host --------------------------------------------------------------------------------------------------------


@dataclass
class _Open:
    """An event that is open on the host's thread."""

    end: float
    mark: str
    name: str
    launches: bool
    may_wait: bool
    first: bool = True


def _pieces(events: Iterable[Mapping[str, Any]]) -> Iterator[_Piece]:
    """The time of nested events in pieces, each with what was innermost."""
    stack: list[_Open] = []
    now = float("-inf")
    for event in [*sorted(events, key=lambda e: (_start(e), -float(e["dur"]))), None]:
        start = float("inf") if event is None else _start(event)
        while stack:
            top = stack[-1]
            end = min(top.end, start)
            if end > now:
                yield _Piece(now, end, top.mark, top.name, top.first, top.launches, top.may_wait)
                top.first, now = False, end
            if top.end > start:
                break
            stack.pop()
        now = start
        if event is not None:
            stack.append(_opened(event, stack))


def _opened(event: Mapping[str, Any], stack: list[_Open]) -> _Open:
    mark, name = _mark(event), event["name"]
    outer = stack[-1] if stack else _Open(float("inf"), OTHER, NO_OPERATOR, False, True)
    launches = name.startswith("c10d::")
    if launches:
        for holder in stack:
            holder.may_wait = True  # behind the launch
    return _Open(
        end=min(_end(event), outer.end),  # the trace's rounding aside, nested events do not overlap
        mark=mark or outer.mark,
        name=NO_OPERATOR if mark else name,
        launches=launches or outer.launches,
        may_wait=event.get("cat") == "user_annotation",
    )


def _with_waits(pieces: Iterable[_Piece], collectives: Sequence[_Span]) -> Iterator[_Span]:
    """The host's pieces by part, those that wait for a collective cut where it ends."""
    by_end = sorted(collectives, key=lambda span: span.end)
    ends = [span.end for span in by_end]
    for start, end, mark, name, first, launches, may_wait in pieces:
        last = bisect_right(ends, end) - 1
        if may_wait and not launches and last >= 0 and ends[last] > start and mark != OUTSIDE:
            yield _Span(start, ends[last], _COMMUNICATION, f"waiting for {by_end[last].name}")
            start = ends[last]
        if end > start:
            part = _COMMUNICATION if launches else _part_of(mark)
            yield _Span(start, end, part, name, first, "" if mark == OUTSIDE else "host")


# -- the device ------------------------------------------------------------------------------------------------------


def _device_spans(events: Sequence[Mapping[str, Any]], pieces: Sequence[_Piece]) -> Iterator[_Span]:
    """What ran on the device, each with the part that launched it."""
    launched = {
        event["args"]["correlation"]: _start(event)
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    starts = [piece.start for piece in pieces]

    def part_at(time: float | None) -> str:
        if time is None:
            return OTHER
        found = bisect_right(starts, time) - 1
        return _part_of(pieces[found].mark) if found >= 0 and time < pieces[found].end else OTHER

    for event in events:
        if event.get("cat") in _DEVICE:
            nccl = event["cat"] == "kernel" and "nccl" in event["name"].lower()
            part = _COMMUNICATION if nccl else part_at(launched.get(event.get("args", {}).get("correlation")))
            yield _Span(_start(event), _end(event), part, event["name"], row=f"stream {event['tid']}")


# -- sums ------------------------------------------------------------------------------------------------------------


def _shares(
    windows: Sequence[tuple[float, float]], busy: Iterable[_Span], host: Iterable[_Span]
) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds of the windows by part, and of those in which nothing was busy, by where the host was."""
    window, active, on_host = 0, Counter[str](), Counter[str]()
    edges: list[tuple[float, int, str, int]] = []  # time, which count, part, change
    for start, end in windows:
        edges += [(start, 0, "", 1), (end, 0, "", -1)]
    for which, spans in ((1, busy), (2, host)):
        for span in spans:
            edges += [(span.start, which, span.part, 1), (span.end, which, span.part, -1)]
    edges.sort(key=lambda edge: edge[0])
    shared, idle_host = defaultdict[str, float](float), defaultdict[str, float](float)
    now = edges[0][0]
    for time, which, part, change in edges:
        if time > now and window:
            parts = [name for name, count in active.items() if count]
            for name in parts:
                shared[name] += (time - now) / len(parts)
            if not parts:
                shared[IDLE] += time - now
                idle_host[next((name for name, count in on_host.items() if count), OTHER)] += time - now
        now = time
        if which == 0:
            window += change
        else:
            (active if which == 1 else on_host)[part] += change
    return shared, idle_host


def _overlap(start: float, end: float, windows: Sequence[tuple[float, float]]) -> float:
    """Microseconds of an interval within ordered windows."""
    found = 0.0
    for window_start, window_end in windows[bisect_left(windows, start, key=lambda w: w[1]) :]:
        if window_start >= end:
            break
        found += max(0.0, min(end, window_end) - max(start, window_start))
    return found


def _busiest(spans: Iterable[_Span], windows: Sequence[tuple[float, float]], steps: int, wall: float) -> list[Busiest]:
    """Kernels or operators, those with most time first."""
    time: defaultdict[tuple[str, str], float] = defaultdict(float)
    calls = Counter[tuple[str, str]]()
    for span in spans:
        if (inside := _overlap(span.start, span.end, windows)) > 0:
            time[span.name, span.part] += inside
            calls[span.name, span.part] += span.first and span.name != NO_OPERATOR
    order = sorted(time.items(), key=lambda item: -item[1])
    return [Busiest(*key, us / steps / 1e3, calls[key] / steps, us / wall) for key, us in order]


def _timeline(start: float, end: float, spans: Iterable[_Span]) -> Iterator[Bar]:
    """Spans between two times, neighbours of the same row and part as one."""
    joined: dict[str, Bar] = {}
    for span in sorted(spans, key=lambda span: span.start):
        left, right = max(span.start, start), min(span.end, end)
        if right <= left or not span.row:
            continue
        bar = Bar(span.row, span.part, (left - start) / 1e3, (right - left) / 1e3)
        last = joined.get(span.row)
        if last is not None and last.part == bar.part and bar.start - (last.start + last.length) < 1e-3:
            length = max(last.start + last.length, bar.start + bar.length) - last.start
            joined[span.row] = last._replace(length=length)
            continue
        if last is not None:
            yield last
        joined[span.row] = bar
    yield from joined.values()
