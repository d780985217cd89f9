"""Protocols: every shipped config builds under each of its own, and says what it is."""

import pytest

from efficient_tx.config import check, load, protocols
from tests.support import ROOT


def pairs():
    """Each shipped config with each protocol that it may run under; most published ones for the slow tests."""
    for name in load.shipped():
        file = load.ConfigFile(name)
        for protocol in file.protocols:
            if protocol == "default" or protocols.key(file.config().task) in protocols.PROTOCOLS[protocol]:
                at_once = (protocol == "default" and "imagenet" not in name) or name == "lra_pathx"
                yield pytest.param(name, protocol, marks=() if at_once else pytest.mark.slow)


@pytest.mark.parametrize(("name", "protocol"), list(pairs()))
@pytest.mark.first(4)
def test_every_shipped_config_builds_under_each_of_its_protocols(name, protocol):
    check.check(load.ConfigFile(name).resolve({"protocol": protocol}))


@pytest.mark.quick
@pytest.mark.parametrize("name", load.shipped())
def test_every_shipped_config_opens_with_what_it_costs_and_scores(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert all(word in text for word in ("Command:", "Hardware:", "Expected:"))


@pytest.mark.quick
def test_a_task_without_published_settings_has_the_default_only():
    with pytest.raises(ValueError, match=r"efficient_tx\.data\.recall"):
        load.ConfigFile("recall").resolve({"protocol": "lra"})
