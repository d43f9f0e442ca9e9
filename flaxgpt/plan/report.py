"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from flaxgpt.plan.plan import Plan
from flaxgpt.plan.targets import Chip


def show(plan: Plan, chip: Chip | None) -> None:
    """Print all of a plan."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{plan.target}: {plan.device}, {_axes(plan)}; nothing was run (compiled in {plan.compile_seconds:.0f} s)\n"
        f"batch_size {plan.batch_size}, grad_accum_steps {plan.grad_accum_steps}: {plan.rows} rows at once on a device\n"
        f"attention: {plan.attention}; loss: logits of {plan.loss_chunk} positions of each row at a time\n"
    )
    if plan.hosts > 1:
        console.print(_hosts(plan), style="bold")
    console.print(memory_table(plan))
    console.print(traffic_table(plan) if plan.traffic else "nothing is sent between devices\n")
    again = plan.program_flops / plan.model_flops - 1
    console.print(
        f"arithmetic of an update: {_flop(plan.model_flops)} by the model, {_flop(plan.program_flops)} in the program "
        f"({again:+.0%}: what is computed again or for nothing)"
    )
    for doubt in plan.doubts:
        console.print(doubt, style="bold")
    if plan.seconds and chip:
        console.print(
            f"an update takes at least {_time(plan.seconds.bound)}: arithmetic {_time(plan.seconds.arithmetic)}, memory "
            f"{_time(plan.seconds.memory)}, interconnect {_time(plan.seconds.interconnect)}"
        )
        console.print(f"(lower bounds, at the published peaks of {chip.source}; a real update takes longer)")


def show_ranking(plans: list[Plan], chip: Chip | None) -> None:
    """Print a line for each plan, in this order."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(ranking_table(plans))
    console.print(LEGEND)
    if plans[0].hosts > 1:
        console.print(_hosts(plans[0]), style="bold")
    if chip:
        console.print(f"(lower bounds, at the published peaks of {chip.source}; ranked by their sum)")


def show_options(plans: list[Plan]) -> None:
    """Print what `auto` was chosen among: a line for each plan, the one that was taken first."""
    Console(highlight=False, soft_wrap=True).print(
        "auto takes the first of these: what fits, with the least traffic", ranking_table(plans), LEGEND, sep="\n"
    )


def memory_table(plan: Plan) -> Table:
    """Bytes of one device."""
    table = Table("memory of a device", "", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.columns[1].justify = "right"
    rows = {
        "parameters": plan.params_bytes,
        "moments": plan.moments_bytes,
        "arguments as laid out": plan.arguments_bytes,
        "temporaries": plan.temporaries_bytes,
        "peak": plan.peak_bytes,
        "available": plan.memory_bytes,
    }
    for name, size in rows.items():
        table.add_row(name, _memory(size))
    room = plan.memory_bytes - plan.peak_bytes
    table.add_row("fits, with room for" if plan.fits else "does not fit, too large by", _memory(abs(room)), style="bold")
    table.add_row("", "")
    return table


def traffic_table(plan: Plan) -> Table:
    """What crosses the wire in an update."""
    table = Table("collective", "of", "dtype", "where", "devices", "an update", "sent", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for column in table.columns[4:]:
        column.justify, column.no_wrap = "right", True
    for row in plan.traffic:
        table.add_row(row.kind, row.what, row.dtype, row.place, f"{row.group}", f"{row.times:,}", _sent(row.wire_bytes))
    table.add_row("sent by a device", "", "", "", "", f"{sum(row.times for row in plan.traffic):,}", _sent(plan.wire_bytes))
    table.add_row("", "", "", "", "", "", "")
    return table


def ranking_table(plans: list[Plan]) -> Table:
    """A line for each plan, of 80 columns at most; LEGEND explains it."""
    headings = ("mesh", "gather", "steps", "rows", "peak", "sent", "fits", "at least", "in sum")
    table = Table(*headings, box=None, padding=(0, 2, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    for plan in plans:
        times = (_time(plan.seconds.bound), _time(plan.seconds.apart)) if plan.seconds else ("-", "-")
        sizes = (_memory(plan.peak_bytes), _sent(plan.wire_bytes), "yes" if plan.fits else "no")
        mesh = "x".join(map(str, plan.mesh.values()))
        table.add_row(mesh, plan.gather, f"{plan.grad_accum_steps}", f"{plan.rows}", *sizes, *times)
    return table


LEGEND = """
mesh: data x fsdp x tensor; steps: grad_accum_steps; rows: at once on a device
at least: the largest bound in time; in sum: what an update takes if nothing overlaps"""


def _axes(plan: Plan) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())


def _hosts(plan: Plan) -> str:
    return f"the devices of {plan.hosts} hosts: start the run on all of them (docs/hosts.md)"


def _memory(size: float) -> str:
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _sent(size: float) -> str:
    return _scaled(size, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def _flop(operations: float) -> str:
    return _scaled(operations, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    """In the largest unit of which it is one or more."""
    power = max((i for i in range(len(units)) if value >= step**i), default=0)
    return f"{value / step**power:,.{2 if power else 0}f} {units[power]}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
