"""Who may connect, where a listener listens, and when a live run is over."""

import threading
import time
from dataclasses import replace

import pytest

from memory import TR_S, volumes
from rtfmri.errors import SourceError
from rtfmri.readers import RunEnd, Skipped
from rtfmri.readers.live import LiveReader
from rtfmri.readers.network import Address, Allowed, parse_address, parse_allowed
from rtfmri.volume import Volume

ANYBODY = parse_allowed("0.0.0.0/0,::/0")


@pytest.mark.parametrize(
    ("target", "address"),
    [
        ("", Address("127.0.0.1", 9002)),
        ("//", Address("127.0.0.1", 9002)),
        ("//:7", Address("127.0.0.1", 7)),
        ("//localhost:0", Address("localhost", 0)),
        ("//127.0.0.1:65535/", Address("127.0.0.1", 65535)),
        ("//[::1]:80", Address("::1", 80)),
    ],
)
def test_an_address_is_of_this_machine_by_default(target: str, address: Address) -> None:
    assert parse_address(target, 9002) == address


@pytest.mark.parametrize("target", ["//0.0.0.0:1", "//192.0.2.1", "//[::]:1", "//scanner:1"])
def test_other_machines_must_be_named(target: str) -> None:
    with pytest.raises(SourceError, match=r"\?allow="):
        parse_address(target, 9002)
    with pytest.raises(SourceError, match=r"\?allow="):
        parse_address(target, 9002, Allowed())
    assert parse_address(target, 9002, ANYBODY).host == target[2:].rpartition(":1")[0].strip(
        "[]"
    ) or target.endswith("192.0.2.1")


@pytest.mark.parametrize("target", ["//:65536", "//a:b", "/x", "//h:1/x", "//[::1", "//u@h:1"])
def test_a_malformed_address_is_said(target: str) -> None:
    with pytest.raises(SourceError, match="an address is //HOST:PORT"):
        parse_address(target, 9002, ANYBODY)


def test_who_is_allowed() -> None:
    allowed = parse_allowed("192.0.2.7, 198.51.100.0/24,2001:db8::/32")
    admitted = ["192.0.2.7", "198.51.100.200", "2001:db8::1", "::ffff:192.0.2.7"]
    refused = ["192.0.2.8", "198.51.101.1", "2001:db9::1", "::ffff:192.0.2.8", "scanner", ""]
    assert [allowed.admits(host) for host in admitted] == [True] * 4
    assert [allowed.admits(host) for host in refused] == [False] * 6
    assert Allowed().admits("127.0.0.1")
    assert Allowed().admits("::1")
    assert not Allowed().admits("192.0.2.7")
    with pytest.raises(ValueError, match="addresses or networks"):
        parse_allowed("192.0.2.7/99")


def told(items: list[Volume | Skipped | RunEnd]) -> list[object]:
    return [item.index if isinstance(item, Volume) else item for item in items]


def test_a_live_run_ends_when_all_are_there_and_the_next_may_follow() -> None:
    reader = LiveReader(count=3)
    run = volumes(3)
    for item in (RunEnd("early"), run[0], run[0], Skipped("a", "b"), run[2], run[1], run[0]):
        assert reader.put(item)
    # A double is not counted for another volume, and what says nothing of this run ends nothing.
    assert told(list(reader)) == [
        0,
        0,
        Skipped("a", "b"),
        2,
        1,
        RunEnd("all 3 volumes are there"),
    ]
    reader.put(RunEnd("the scanner said so"))
    assert told(list(reader)) == [0, RunEnd("the scanner said so")]


def test_a_live_run_ends_in_silence() -> None:
    reader = LiveReader(timeout_s=0.05)
    reader.put(volumes(1)[0])
    assert told(list(reader)) == [0, RunEnd("no volume came for 0.05 s")]
    # With the last one there, those that lack are not waited for as long.
    reader = LiveReader(count=3, timeout_s=1e6)
    first, _, last = volumes(3)
    reader.put(Volume(first.data, first.grid, 0, tr_s=0.02))
    reader.put(Volume(last.data, last.grid, 2, tr_s=0.02))
    assert told(list(reader)) == [0, 2, RunEnd("no volume came for 0.04 s")]


def test_a_volume_0_after_a_pause_begins_the_next_run() -> None:
    reader = LiveReader()
    (first,) = volumes(1)

    def zero(arrived_s: float) -> Volume:
        return replace(first, arrived_s=arrived_s, decoded_s=arrived_s)

    now_s = time.perf_counter()
    for arrived_s in (0, 1, 1 + 2.6 * TR_S):
        reader.put(zero(now_s + arrived_s))
    assert told(list(reader)) == [0, 0, RunEnd("the next run began")]
    reader.put(RunEnd("the scanner said so"))
    assert told(list(reader)) == [0, RunEnd("the scanner said so")]
    reader.numbers_tell_runs = False
    for arrived_s in (0, 2.6 * TR_S):
        reader.put(zero(now_s + arrived_s))
    reader.put(RunEnd("the scanner said so"))
    assert told(list(reader)) == [0, 0, RunEnd("the scanner said so")]


def test_a_live_reader_passes_on_what_breaks() -> None:
    reader = LiveReader()
    reader.put(SourceError("gone"))
    with pytest.raises(SourceError, match="gone"):
        list(reader)


def test_who_sends_too_much_waits() -> None:
    reader = LiveReader()
    (volume,) = volumes(1)
    sent: list[bool] = []

    def send() -> None:
        sent.extend(reader.put(volume) for _ in range(1000))

    sender = threading.Thread(target=send)
    sender.start()
    items = iter(reader)
    for _ in range(500):
        next(items)
    assert len(sent) < 1000
    reader.close()
    sender.join(timeout=30)
    assert not sender.is_alive()
    # What nobody will take any more is refused, so that the scanner can be told.
    assert not all(sent)
    assert not reader.put(volume)
    assert told(list(reader)) == []
