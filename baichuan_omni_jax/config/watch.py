"""What a run notices of itself while it works."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a step counts as hung, and what is worth an alert. None of it changes what is learned: docs/how-to/watch.md.

    Times in seconds.
    """

    # --- Hangs: all hosts write their stacks, the one that others wait for is named, and the run ends to be started
    # again (exit code 76).
    # A step is hung after so many times the median step, and after `hang_s` at least: the longest that a bucket is
    # known to be away. 0: never.
    hang_s: float = 180.0
    hang_factor: float = 10.0
    # The same for what is no step and has no median: compiling, a save, an evaluation of suites. 0: never.
    pause_s: float = 14400.0
    # A host that gives no sign of life for so long is named: before JAX itself ends the run, after 100 s, naming none.
    silent_s: float = 60.0

    # --- Hosts beside each other, in a line of the log and in the metrics.
    hosts_every: int = 100  # steps; 0: never

    # --- Alerts, in the log and in alerts.jsonl.
    # How far loss and gradient norm may lie above the median of the last steps, in standard deviations. 0: no alerts.
    spike: float = 6.0
    data_wait: float = 0.05  # the share of the last steps' time that devices may wait for rows
    # An update larger than so many times the parameters of its group: the run diverges.
    update_share: float = 1.0

    # --- Silent corruption.
    # Steps between two that are computed twice and compared bit for bit, at the cost of two more steps; 0: never.
    replay_every: int = 0
