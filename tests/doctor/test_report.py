"""Checks one after the other: what they say, what breaks off, what is left out, and what hosts tell each other."""

import json

import pytest

from baichuan_omni_jax.doctor import Check, Hosts, Line, Setting, Verdict, examine, lines_of_all_hosts
from tests.helpers.service import hosts_that_say


def saying(name: str, verdict: Verdict = Verdict.OK, **kind: bool) -> Check:
    return Check(name, lambda setting: [Line(name, verdict, f"{name} was tried")], **kind)


def broken(setting: Setting) -> list[Line]:
    raise OSError("the first line\nand a stack of others")


def test_a_check_that_breaks_off_is_a_line_and_the_next_one_runs():
    begun: list[str] = []
    lines = list(examine([Check("one", broken), saying("two")], Setting(), begun.append))
    assert [(line.check, line.verdict) for line in lines] == [("one", Verdict.FAIL), ("two", Verdict.OK)]
    assert lines[0].text == "OSError: the first line"
    assert begun == ["one", "two"]


@pytest.mark.parametrize("verdict", [Verdict.OK, Verdict.FAIL])
def test_without_devices_nothing_runs_on_them(verdict):
    checks = [saying("devices", verdict), saying("kernels", on_devices=True), saying("step", on_devices=True)]
    lines = list(examine(checks, Setting()))
    if verdict is Verdict.OK:
        assert [line.check for line in lines] == ["devices", "kernels", "step"]
    else:
        assert [line.text for line in lines] == ["devices was tried", "not tried without devices: kernels and step"]


def test_a_host_without_devices_keeps_all_from_them():
    setting = Setting(hosts=hosts_that_say("devices", "yes", "no"))
    lines = list(examine([saying("devices"), saying("kernels", on_devices=True)], setting))
    assert lines[-1].text == "not tried without devices on host 2: kernels"


def test_devices_do_not_start_together_without_a_host():
    setting = Setting(hosts=hosts_that_say("before collectives", "here", None))
    lines = list(examine([saying("collectives", together=True)], setting))
    assert [(line.verdict, line.text) for line in lines] == [(Verdict.FAIL, "not tried: no word from host 2")]


def test_lines_of_all_hosts_are_told_apart():
    theirs = [{"check": "disk", "verdict": "fail", "text": "full", "advice": "", "values": {"free": 0}, "host": 0}]
    found = lines_of_all_hosts(hosts_that_say("lines", json.dumps(theirs), None), [Line("disk", Verdict.OK, "room")])
    assert [(line.host, line.verdict, line.text) for line in found] == [
        (0, Verdict.OK, "room"),
        (1, Verdict.FAIL, "full"),
        (2, Verdict.FAIL, "host 2 sent no report"),
    ]
    assert found[1].values == {"free": 0}


def test_one_host_needs_no_service():
    assert Hosts().gather("anything", "text") == ["text"]
