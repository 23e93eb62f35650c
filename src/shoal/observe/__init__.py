"""What a run shows and leaves behind: metrics, completions, the time ledger, the terminal view, the report."""

from shoal.observe.completions import CompletionRow, CompletionsWriter, read_completions, rows_of_group
from shoal.observe.ledger import TimeLedger
from shoal.observe.metrics import MetricsWriter, read_metrics
from shoal.observe.report import write_report
from shoal.observe.statistics import Interval, mean_interval, paired_difference_interval
from shoal.observe.summary import RunSummary, versions, write_summary
from shoal.observe.terminal import ProgressView
from shoal.observe.view_state import EngineView, ViewState

__all__ = [
    "CompletionRow",
    "CompletionsWriter",
    "EngineView",
    "Interval",
    "MetricsWriter",
    "ProgressView",
    "RunSummary",
    "TimeLedger",
    "ViewState",
    "mean_interval",
    "paired_difference_interval",
    "read_completions",
    "read_metrics",
    "rows_of_group",
    "versions",
    "write_report",
    "write_summary",
]
