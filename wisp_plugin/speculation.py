"""From the name of a stop rule to the controller of a session: what command lines and configurations use."""

from __future__ import annotations

from collections.abc import Callable

from wisp_plugin.acceptance_model import AcceptanceModel
from wisp_plugin.controller import Abstention, SpeculationController, StopRule
from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import Mode
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE, AdaEdl, Fixed, Paper, Price, Ratio, Svip

AUTO, DEFAULT_LENGTH = "auto", 8
_OF_EITHER_MODE: dict[str, Callable[[], StopRule]] = {"svip": Svip, "adaedl": AdaEdl}
RULES = (AUTO, "fixed", "fixed:N", "svip", "adaedl", "paper", "ratio", "price")


def make_controller(
    rule: str, mode: Mode, model: AcceptanceModel, energy_price: float = DEFAULT_ENERGY_PRICE
) -> SpeculationController:
    """The controller of one session. `rule` is one of RULES; `auto` is `price` in `free` and `ratio` in `sync`.

    Raises:
        ConfigError: no such rule, a rule that is not for this mode, a number out of range.
    """
    if rule == AUTO:
        rule = "price" if mode is Mode.FREE else "ratio"
    name, colon, number = rule.partition(":")
    if rule == "fixed" or (name == "fixed" and number.isdecimal()):
        return SpeculationController(Fixed(int(number) if colon else DEFAULT_LENGTH), model)
    if rule == "paper":
        return SpeculationController(Paper(1.0 / (1.0 + model.false_alarm_cost)), model)
    if rule in _OF_EITHER_MODE:
        return SpeculationController(_OF_EITHER_MODE[rule](), model)
    if rule not in ("ratio", "price"):
        raise ConfigError(f"stop rule is {rule!r}; allowed: {', '.join(RULES)}")
    if (rule == "price") != (mode is Mode.FREE):
        raise ConfigError(f"stop rule {rule!r} is for mode {'free' if rule == 'price' else 'sync'}, not {mode.value}")
    chosen = Price(energy_price) if rule == "price" else Ratio(energy_price)
    return SpeculationController(chosen, model, Abstention())


def no_drafts() -> SpeculationController:
    """The controller of a thin client."""
    return SpeculationController(Fixed(0))
