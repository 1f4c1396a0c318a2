"""From the name of a stop rule to the controller of a session: what command lines and configurations use."""

from __future__ import annotations

from collections.abc import Callable

from wisp_plugin.acceptance_model import AcceptanceModel
from wisp_plugin.controller import Abstention, SpeculationController, StopRule
from wisp_plugin.errors import ConfigError
from wisp_plugin.messages import Mode
from wisp_plugin.stop_rules import DEFAULT_ENERGY_PRICE, AdaEdl, Fixed, Paper, Price, Ratio, Svip

AUTO, DEFAULT_LENGTH = "auto", 8
RULES = (AUTO, "fixed", "fixed:N", "svip", "adaedl", "paper", "ratio", "price")
PRICED_RULES = (AUTO, "ratio", "price")  # those that ask what a draft token costs the device


def make_controller(
    rule: str, mode: Mode, model: AcceptanceModel, energy_price: float = DEFAULT_ENERGY_PRICE
) -> SpeculationController:
    """The controller of one session. `rule` is one of RULES; `auto` is `price` in `free` and `ratio` in `sync`.

    Raises:
        ConfigError: no such rule, a rule that is not for this mode, a number out of range, an `energy_price` other than
            the default for a rule that is not one of PRICED_RULES.
    """
    if rule == AUTO:
        rule = "price" if mode is Mode.FREE else "ratio"
    plain = _rule_without_price(rule, model)
    if plain is not None:
        if energy_price != DEFAULT_ENERGY_PRICE:
            given = f"{energy_price:g} was given; allowed with: {', '.join(PRICED_RULES)}"
            raise ConfigError(f"stop rule {rule!r} has no energy price, {given}")
        return SpeculationController(plain, model)
    if rule not in ("ratio", "price"):
        raise ConfigError(f"stop rule is {rule!r}; allowed: {', '.join(RULES)}")
    if (rule == "price") != (mode is Mode.FREE):
        raise ConfigError(f"stop rule {rule!r} is for mode {'free' if rule == 'price' else 'sync'}, not {mode.value}")
    chosen = Price(energy_price) if rule == "price" else Ratio(energy_price)
    return SpeculationController(chosen, model, Abstention())


def _rule_without_price(rule: str, model: AcceptanceModel) -> StopRule | None:
    """The stop rule of a name that is for either mode and has no energy price; None for other names."""
    name, colon, number = rule.partition(":")
    if rule == "fixed" or (name == "fixed" and number.isdecimal()):
        return Fixed(int(number) if colon else DEFAULT_LENGTH)
    if rule == "paper":
        return Paper(1.0 / (1.0 + model.false_alarm_cost))
    plain: dict[str, Callable[[], StopRule]] = {"svip": Svip, "adaedl": AdaEdl}
    return plain[rule]() if rule in plain else None


def no_drafts() -> SpeculationController:
    """The controller of a thin client."""
    return SpeculationController(Fixed(0))
