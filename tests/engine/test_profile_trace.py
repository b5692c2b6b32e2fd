"""Where steps went, of traces small enough to add up by hand; times in microseconds, steps of 100."""

from typing import Any

import pytest

from engine.profile_trace import IDLE, NO_OPERATOR, OTHER, PARTS, breakdown

Event = dict[str, Any]


def event(name: str, start: float, end: float, *, cat: str = "cpu_op", tid: int = 1, pid: int = 500, **args) -> Event:
    times = {"ts": 4e12 + start, "dur": end - start}
    return {"ph": "X", "cat": cat, "name": name, **times, "pid": pid, "tid": tid, "args": args}


def mark(name: str, start: float, end: float) -> Event:
    return event(f"step/{name}", start, end, cat="user_annotation")


def launch(at: float, correlation: int, *, tid: int = 1, name="cudaLaunchKernel", cat="cuda_runtime") -> Event:
    return event(name, at, at + 1, cat=cat, tid=tid, correlation=correlation)


def kernel(name: str, start: float, end: float, correlation: int, *, stream: int = 7, cat: str = "kernel") -> Event:
    return event(name, start, end, cat=cat, tid=stream, pid=0, correlation=correlation)


def trace(*events: Event) -> dict[str, Any]:
    # In no order, among events of other kinds.
    others = [{"ph": "M", "name": "thread_name", "pid": 1, "args": {}}, {"ph": "s", "id": 1, "ts": 3, "name": "ac2g"}]
    return {"traceEvents": [*others, *reversed(events)]}


def shares(**given: float) -> dict[str, Any]:
    return pytest.approx({**dict.fromkeys((*PARTS, OTHER, IDLE), 0.0), **given}, abs=1e-4)


HOST = [
    mark("whole", 0, 100), mark("data", 0, 10), mark("forward", 10, 30), mark("loss", 30, 35), mark("backward", 35, 70),
    mark("optimizer", 80, 95),
]  # fmt: skip


def test_the_first_steps_may_be_left_out():
    steps = [mark("whole", 100 * i, 100 * i + 100 - 30 * (i == 0)) for i in range(3)]
    found = breakdown(trace(*steps, mark("forward", 120, 170)), skip=1)
    assert (found.steps, found.ms_per_step) == (2, pytest.approx(0.1))
    assert found.shares == shares(forward=0.25, other=0.75)
    with pytest.raises(ValueError, match="no event step/whole"):
        breakdown(trace(*steps), skip=3)


def test_the_device_is_shared_among_the_parts_that_launched_what_runs():
    found = breakdown(
        trace(
            *HOST,
            launch(5, 1), kernel("Memcpy HtoD", 8, 12, 1, stream=13, cat="gpu_memcpy"),
            launch(12, 2), kernel("conv", 15, 35, 2),
            launch(20, 3), kernel("conv", 25, 45, 3, stream=9),
            launch(32, 4), kernel("pairs", 40, 50, 4),
            launch(40, 5, tid=2), kernel("wgrad", 50, 70, 5),  # by autograd's thread
            launch(45, 6, tid=2), kernel("ncclDevKernel_AllReduce", 60, 80, 6, stream=20),
            kernel("elementwise", 85, 88, 99),  # whose launch the trace lacks
            launch(85, 7, cat="cuda_driver", name="cuLaunchKernelEx"), kernel("lars", 90, 95, 7),
            event("step/forward", 15, 45, cat="gpu_user_annotation", pid=0, tid=7),  # no activity
        )
    )  # fmt: skip
    assert (found.steps, found.on_device, found.graphs) == (1, True, False)
    assert found.ms_per_step == pytest.approx(0.1, rel=1e-3)
    # 40 to 45: half forward, half loss; 60 to 70: half backward, half communication
    assert found.shares == shares(
        data=0.04, forward=0.275, loss=0.075, backward=0.15, communication=0.15, optimizer=0.05, other=0.03, idle=0.23
    )
    assert sum(found.shares.values()) == pytest.approx(1)
    waits = {part: share for part, share in found.idle_host.items() if share}
    assert waits == pytest.approx({"data": 0.08, "forward": 0.03, "optimizer": 0.07, "other": 0.05}, abs=1e-4)
    name, part, ms, calls, share = found.busiest[0]
    assert (name, part, calls) == ("conv", "forward", 2)
    assert (ms, share) == pytest.approx((0.04, 0.4), rel=1e-3), "both in full, though they overlap"
    assert [row.name for row in found.busiest[1:3]] in (
        ["wgrad", "ncclDevKernel_AllReduce"], ["ncclDevKernel_AllReduce", "wgrad"]
    )  # fmt: skip
    assert {bar.row for bar in found.timeline} == {"host", "stream 7", "stream 9", "stream 13", "stream 20"}


def test_all_of_a_graph_belongs_to_the_part_that_launched_it():
    found = breakdown(
        trace(
            mark("whole", 0, 100), mark("forward", 0, 10), mark("backward", 10, 20),
            launch(2, 1, name="cudaGraphLaunch"), launch(12, 2, name="cudaGraphLaunch"),
            kernel("conv", 5, 25, 1), kernel("Memset", 25, 30, 1, cat="gpu_memset"),
            kernel("conv", 30, 60, 1), kernel("dgrad", 60, 90, 2),
        )
    )  # fmt: skip
    assert found.graphs
    assert found.shares == shares(forward=0.55, backward=0.3, idle=0.15)


def test_what_lies_between_steps_or_outside_of_them_does_not_count():
    found = breakdown(
        trace(
            mark("optimizer", -30, -10), launch(-20, 1), kernel("adam", -12, 5, 1),  # of a step that is not counted
            launch(-5, 5), kernel("copy", 6, 10, 5),  # between the two
            mark("whole", 0, 100), mark("forward", 0, 50), launch(20, 2), kernel("conv", 40, 115, 2),
            mark("whole", 110, 150), mark("outside", 130, 140), launch(132, 3), kernel("probe", 132, 148, 3),
            launch(160, 4), kernel("conv", 160, 190, 4),
        )
    )  # fmt: skip
    assert found.steps == 2
    assert found.ms_per_step == pytest.approx(0.065, rel=1e-3)
    wall = 130  # 0 to 100, 110 to 130, 140 to 150
    assert found.shares == shares(
        optimizer=5 / wall, forward=(60 + 5) / wall, other=(4 + 8) / wall, idle=(31 + 15 + 2) / wall
    )
    conv = next(row for row in found.busiest if row.name == "conv")
    assert (conv.ms, conv.calls) == pytest.approx((0.0325, 0.5), rel=1e-3)
    assert max(bar.start + bar.length for bar in found.timeline) <= 0.1001


def test_on_a_cpu_the_innermost_mark_has_the_time_less_communication():
    found = breakdown(
        trace(
            mark("whole", 0, 100),
            mark("forward", 10, 40), event("aten::conv2d", 12, 30), event("aten::mkldnn_convolution", 15, 25),
            mark("loss", 30, 40), event("aten::mm", 31, 39, tid=9),  # of another thread
            mark("backward", 40, 90),
            event("evaluate_function: _AllGatherBackward", 42, 80), event("_AllGatherBackward", 43, 79),
            event("c10d::allreduce_", 45, 47), event("gloo:all_reduce", 46, 60, cat="user_annotation", tid=2),
            event("aten::narrow", 62, 63),
            # not waited for at once: work goes on, and one ends meanwhile
            event("c10d::allreduce_", 81, 82), event("gloo:all_reduce", 81.5, 88, cat="user_annotation", tid=3),
            event("gloo:all_reduce", 82, 86, cat="user_annotation", tid=2),
            event("aten::mul", 83, 87),
        )
    )  # fmt: skip
    assert not found.on_device
    # 45 to 47 and 81 to 82 launch; 47 to 60 and 87 to 88 wait
    assert found.shares == shares(forward=0.2, loss=0.1, backward=0.33, communication=0.17, other=0.2)
    busiest = {(row.name, row.part): (row.ms * 1e3, row.calls) for row in found.busiest}
    for key, expected in {
        ("aten::mkldnn_convolution", "forward"): (10, 1),
        ("aten::conv2d", "forward"): (8, 1),
        (NO_OPERATOR, "forward"): (2, 0),
        ("waiting for gloo:all_reduce", "communication"): (14, 2),
        ("c10d::allreduce_", "communication"): (3, 2),
        ("_AllGatherBackward", "backward"): (2 + 2 + 16, 1),
    }.items():
        assert busiest[key] == pytest.approx(expected, abs=1e-2), key
    assert sum(row.ms for row in found.busiest) == pytest.approx(0.1, rel=1e-3), "all of the host's time"
    assert {bar.row for bar in found.timeline} == {"host", "collectives"}


def test_an_operator_that_computes_does_not_wait():
    """A collective that ends within the gaps of an operator which launched none."""
    found = breakdown(
        trace(
            mark("whole", 0, 100), mark("backward", 1, 99), event("c10d::allreduce_", 10, 12),
            event("aten::convolution_backward", 13, 90), event("aten::empty", 20, 21),
            event("gloo:all_reduce", 12, 50, cat="user_annotation", tid=2),
        )
    )  # fmt: skip
    assert found.shares == shares(backward=0.96, communication=0.02, other=0.02)


def test_the_list_is_cut_and_the_timeline_is_of_the_median_step():
    lengths = (50, 10, 30)
    events, now = [], 0
    for i, length in enumerate(lengths):
        events += [mark("whole", now, now + length), event(f"op{i}", now + 1, now + length)]
        now += length + 5
    found = breakdown(trace(*events), top=2)
    assert [row.name for row in found.busiest] == ["op0", "op2"]
    (bar,) = found.timeline
    assert (bar.row, bar.part) == ("host", OTHER)
    assert (bar.start, bar.length) == pytest.approx((0, 0.03), abs=1e-5)


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no event step/whole"):
        breakdown(trace(mark("forward", 0, 10)))
