"""Hosts that must agree, and the sentence where they do not. Two real ones: tests/multidevice/test_two_hosts.py."""

import errno
import json

import pytest

from baichuan_omni_jax.config import apply_overrides, load_run_config
from baichuan_omni_jax.errors import ConfigError, StorageError
from baichuan_omni_jax.train import hosts
from baichuan_omni_jax.train.hosts import check_agreement, on_all_hosts, run_facts, version_facts
from tests.helpers.micro import CONFIG


@pytest.fixture
def two_hosts(monkeypatch):
    """Host 1 says what the test puts here; host 0 is this process."""
    other = []
    monkeypatch.setattr(hosts, "all_gather_str", lambda text: [text, *other])
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    return other


def facts(*changes: str) -> dict[str, str]:
    return run_facts(apply_overrides(load_run_config(CONFIG), changes))


def test_hosts_with_the_same_configuration_agree(two_hosts):
    two_hosts.append(json.dumps(facts("data.root=elsewhere", "data.workers=3") | version_facts()))
    check_agreement(facts() | version_facts())


def test_what_a_disk_refuses_one_host_is_told_on_all(two_hosts):
    """Else the others would wait for a host that has left."""
    two_hosts.append("storage /scratch: No space left on device")
    with pytest.raises(StorageError, match=r"^host 1: /scratch: No space left on device$"):
        on_all_hosts(lambda: None)
    two_hosts[:] = [""]

    def work():
        raise PermissionError(errno.EACCES, "Permission denied", "/runs/a")

    with pytest.raises(ConfigError, match=r"^host 0: /runs/a: Permission denied$"):
        on_all_hosts(work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.seed=1"], "the hosts disagree on train.seed: 0 on host 0, 1 on host 1"),
        (["data.budgets.tokens=512"], "the hosts disagree on data.budgets.tokens: 256 on host 0, 512 on host 1"),
    ],
)
def test_the_first_disagreement_of_hosts_is_named(two_hosts, changes, message):
    two_hosts.append(json.dumps(facts(*changes)))
    with pytest.raises(ConfigError) as caught:
        check_agreement(facts())
    assert str(caught.value) == message


def test_a_fact_that_one_host_lacks(two_hosts):
    two_hosts.append(json.dumps({"a": "1", "b": "2"}))
    with pytest.raises(ConfigError, match="disagree on b: absent on host 0, 2 on host 1"):
        check_agreement({"a": "1"})


def test_an_error_of_one_host_is_raised_on_all(two_hosts):
    two_hosts.append("config manifest text.jsonl cannot be read")
    with pytest.raises(ConfigError, match=r"^host 1: manifest text\.jsonl cannot be read"):
        on_all_hosts(lambda: 3)


def test_alone_an_error_is_as_it_was():
    def work():
        raise ConfigError("no such file")

    with pytest.raises(ConfigError, match=r"^no such file$"):
        on_all_hosts(work)
