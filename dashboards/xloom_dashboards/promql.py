"""PromQL from metrics of the table: series, rates, shares and quantiles, each within a scope of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xloom.observability.table import Metric

RATE = "$__rate_interval"  # at least four scrapes, as Grafana works it out


@dataclass(frozen=True)
class Scope:
    """The labels every series of a board or a rule file is narrowed to, and the window of its rates."""

    matchers: tuple[str, ...] = ()
    window: str = RATE

    def series(self, metric: Metric | str, *matchers: str, suffix: str = "") -> str:
        """`name{...}`; a matcher is PromQL's own text, as `status=~"5.."`."""
        name = metric if isinstance(metric, str) else metric.exported
        both = ",".join((*self.matchers, *matchers))
        return f"{name}{suffix}{{{both}}}" if both else f"{name}{suffix}"

    def rate(self, metric: Metric | str, *matchers: str, by: Sequence[str] = (), window: str = "") -> str:
        """A counter's increase a second, summed."""
        return total(f"rate({self.series(metric, *matchers)}[{window or self.window}])", by)

    def quantile(
        self, quantile: float, metric: Metric | str, *matchers: str, by: Sequence[str] = (), window: str = ""
    ) -> str:
        """A quantile over all series of a histogram together, or by some labels."""
        return f"histogram_quantile({quantile:g}, {self.buckets(metric, *matchers, by=by, window=window)})"

    def quantile_of_all(self, quantile: float, metric: Metric | str, *matchers: str, by: Sequence[str] = ()) -> str:
        """A quantile since the processes started: for what is so rare that a rate would mostly have nothing to say."""
        series = self.series(metric, *matchers, suffix="_bucket")
        return f"histogram_quantile({quantile:g}, {total(series, ('le', *by))})"

    def buckets(self, metric: Metric | str, *matchers: str, by: Sequence[str] = (), window: str = "") -> str:
        """A histogram's buckets, as quantiles and heatmaps take them."""
        series = self.series(metric, *matchers, suffix="_bucket")
        return total(f"rate({series}[{window or self.window}])", ("le", *by))


def total(expr: str, by: Sequence[str] = ()) -> str:
    """A sum, by some labels or of all."""
    return aggregate("sum", expr, by)


def aggregate(operator: str, expr: str, by: Sequence[str] = ()) -> str:
    """Any aggregation, by some labels or of all."""
    return f"{operator} by ({', '.join(by)}) ({expr})" if by else f"{operator}({expr})"


def share(part: str, whole: str, by: Sequence[str] = ()) -> str:
    """One over another; `by` names the labels both have, where the whole has fewer than the part."""
    return f"{part} / on ({', '.join(by)}) group_left () {whole}" if by else f"{part} / {whole}"


def or_nothing(expr: str) -> str:
    """A share, or 0 where there is nothing to share: 0 divided by 0 is no number."""
    return f"({expr} > 0 or vector(0))"


def or_zero(expr: str) -> str:
    """An expression, or 0 where nothing of the kind has ever been counted."""
    return f"({expr} or vector(0))"
