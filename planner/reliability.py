"""What failures cost: the best checkpoint interval, goodput, hours to finish, and how safe stored copies are."""

import math
from dataclasses import dataclass

from planner.machine import Machine

RESTART_MINUTES = 10.0  # to notice, start again, restore and compile


@dataclass(frozen=True)
class Reliability:
    """Of a run on many devices."""

    hours_between_failures: float  # of the whole machine
    interval_minutes: float  # between two checkpoints, the best
    goodput: float  # share of the time that makes progress
    hours_without: float  # to finish, if nothing fails
    hours: float  # as things are
    failures: float  # expected in the run


def best_interval(save_s: float, mean_s: float) -> float:
    """Seconds between checkpoints that waste least: Daly's estimate (Future Generation Computer Systems 22, 2006,
    equation 37), which is Young's sqrt(2 save mean) (CACM 17, 1974) where failures are rare.
    """
    if save_s >= 2 * mean_s:
        return mean_s
    x = save_s / (2 * mean_s)
    return math.sqrt(2 * save_s * mean_s) * (1 + math.sqrt(x) / 3 + x / 9) - save_s


def goodput(interval_s: float, save_s: float, restart_s: float, mean_s: float) -> float:
    """Share of the time that makes progress, when failures come at random with this mean time between them.

    Daly's complete model (the same, equation 20): each segment of interval + save is done anew until it comes through.
    """
    segment = (interval_s + save_s) / mean_s
    spent = mean_s * math.exp(min(restart_s / mean_s, 700.0)) * math.expm1(min(segment, 700.0))
    return min(interval_s / spent, 1.0)


def reliability(
    machine: Machine, devices: int, hours: float, save_s: float, restart_s: float = 60 * RESTART_MINUTES
) -> Reliability:
    """Of a run that takes `hours` without failures and stands still for `save_s` at each checkpoint."""
    mean_s = machine.hours_between_failures / devices * 3600
    interval = best_interval(max(save_s, 0.1), mean_s)
    share = goodput(interval, save_s, restart_s, mean_s)
    total = hours / share
    return Reliability(mean_s / 3600, interval / 60, share, hours, total, total * 3600 / mean_s)


def availability(lost: float, copies: int) -> float:
    """The chance that one of R copies is there, 1 - (1 - p)^R with p = 1 - lost, where each is lost independently."""
    return 1 - lost**copies


def copies_for(lost: float, wanted: float = 1 - 1e-9) -> int:
    """The fewest copies that are there with the chance `wanted`."""
    if not 0 < lost < 1:
        return 1
    return max(1, math.ceil(math.log(1 - wanted) / math.log(lost) - 1e-9))
