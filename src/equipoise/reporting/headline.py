"""What the run did, in one sentence and four figures."""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.reporting.figures import MIB
from equipoise.reporting.gate_metrics import Gate
from equipoise.reporting.run_directory import Run

MINUS = "\N{MINUS SIGN}"
PERCENT = "\N{NO-BREAK SPACE}%"


@dataclass(frozen=True)
class Tile:
    """One figure of the headline.

    Attributes:
        label: what it is.
        before: text, or nothing when there is no before.
        after: text.
        note: unit and context.
    """

    label: str
    before: str
    after: str
    note: str


def signed(value: float, digits: int = 2) -> str:
    """With a sign always, a real minus; nothing that rounds to zero is called negative."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else f"{0:.{digits}f}"


def megabytes(size: int) -> str:
    """Bytes as MiB, with the digits that matter."""
    value = size / MIB
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def _share(part: float) -> str:
    return f"{100 * part:.1f}{PERCENT}"


def change(delta: float, ci95: tuple[float, float] | None) -> str:
    """A change in percent with its 95 % interval; a third decimal where two would show nothing.

    Args:
        delta: percent.
        ci95: percent, or None.
    """
    digits = 2 if max(map(abs, (delta, *(ci95 or ())))) >= 0.1 else 3
    text = f"{signed(delta, digits)}{PERCENT}, "
    if ci95 is None:
        return text + "no interval: too few windows of text"
    return f"{text}95{PERCENT} interval {signed(ci95[0], digits)} to {signed(ci95[1], digits)}{PERCENT}"


def headline(run: Run) -> str:
    """One sentence with the numbers: balance, memory, perplexity, share on quantized slots."""
    s = run.metrics.summary
    layers = len(run.plan.layers)
    return (
        f"On held-out text the busiest slot now carries {s.lis_after:.2f} times an even share of its layer's tokens, "
        f"where the busiest expert carried {s.lis_before:.2f} times (LIS, mean over {layers} MoE "
        f"layer{'s' if layers > 1 else ''}), in {_share(s.bytes_after / s.bytes_before)} of the experts' original "
        f"memory; perplexity went from {s.ppl_before:.3f} to {s.ppl_after:.3f} ("
        f"{change(s.ppl_delta_pct, s.ppl_delta_ci95)}), and "
        f"{_share(s.tokens_quantized)} of token selections ran on a quantized slot."
    )


def gate_headline(gate: Gate) -> str:
    """What a gate allowed, tried and decided, in two or three sentences."""
    accuracy, perplexity = gate.bounds.max_accuracy_drop, gate.bounds.max_perplexity_rise
    allowed = [] if accuracy is None else [f"accuracy may drop by {accuracy:g} points ({', '.join(gate.tasks)})"]
    allowed += [] if perplexity is None else [f"perplexity may rise by {perplexity:g}{PERCENT}"]
    on = " and ".join(f"{count:,} {what}" for what, count in gate.items.items())
    plans = len(gate.front) - 1
    number = gate.front.index(gate.accepted) + 1
    chosen = "the unchanged model" if gate.accepted.unchanged else f"plan {number}"
    text = (
        f"At the worse end of the paired 95{PERCENT} interval {' and '.join(allowed)}. Of {plans} "
        f"plan{'' if plans == 1 else 's'} of the front {gate.tried} {'was' if gate.tried == 1 else 'were'} measured on "
        f"{on}, {len(gate.refused)} refused; accepted: {chosen}, {gate.accepted.reason}."
    )
    if gate.refused:
        first = gate.refused[0]
        text += f" The most balanced refused is plan {gate.front.index(first) + 1} (refused-plan.json): {first.reason}."
    return text


def tiles(run: Run) -> list[Tile]:
    """The four figures."""
    s = run.metrics.summary
    limit = run.plan.budget.limit_bytes
    return [
        Tile(
            "Load imbalance score (LIS)",
            f"{s.lis_before:.3f}",
            f"{s.lis_after:.3f}",
            "held out, mean over layers; 1 is even over experts",
        ),
        Tile(
            "Expert memory",
            megabytes(s.bytes_before),
            f"{megabytes(s.bytes_after)} MiB",
            f"{_share(s.bytes_after / s.bytes_before)} of the original; {megabytes(limit)} MiB allowed",
        ),
        Tile(
            "Perplexity, held out",
            f"{s.ppl_before:.3f}",
            f"{s.ppl_after:.3f}",
            change(s.ppl_delta_pct, s.ppl_delta_ci95),
        ),
        Tile(
            "Selections on quantized slots",
            "",
            _share(s.tokens_quantized),
            f"{s.replicas:,} replicas added, {s.quantized:,} experts quantized",
        ),
    ]
