"""What a stimulus program says, through real sockets; and what strangers say."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from lsl_peers import taking_turns
from rtfmri.errors import ConfigError
from rtfmri.readers.network import Address, Allowed
from rtfmri.stimulus import (
    MAX_PER_SECOND,
    MAX_WAITING,
    Block,
    Said,
    Stimulus,
    TcpStimulus,
    Trigger,
    ZmqStimulus,
    open_stimulus,
    parse,
)

UP = b'{"trial_type": "up", "duration": 20.0}'
UP_NOW = Block(0.0, "up", 20.0)
LATER = b'{"trial_type": "up", "duration": 20, "onset": 40.5, "colour": "red"}'
MALFORMED = {
    b"triggered": "is neither JSON nor the word trigger",
    b"[" * 10_000: "is neither JSON nor the word trigger",
    b'{"trial_type": "up", "duration": ' + b"9" * 5000 + b"}": "is neither JSON",
    b"\xff\xfe\x00": "is neither JSON nor the word trigger",
    b"[1, 2]": "is JSON, but no object",
    b"5": "is JSON, but no object",
    b"{}": "has neither a trigger nor a trial_type",
    b'{"trigger": "yes"}': "has neither a trigger nor a trial_type",
    b'{"trial_type": 5, "duration": 1}': "has neither a trigger nor a trial_type",
    b'{"trial_type": "", "duration": 1}': "has neither a trigger nor a trial_type",
    b'{"trial_type": "' + b"x" * 300 + b'", "duration": 1}': "nor a trial_type",
    b'{"trial_type": "up"}': "has no duration in seconds",
    b'{"trial_type": "up", "duration": true}': "has no duration in seconds",
    b'{"trial_type": "up", "duration": "20"}': "has no duration in seconds",
    b'{"trial_type": "up", "duration": NaN}': "has no duration in seconds",
    b'{"trial_type": "up", "duration": 1e300}': "has no duration in seconds",
    b'{"trial_type": "up", "duration": -1}': "has a duration below 0",
    b'{"trial_type": "up", "duration": 1, "onset": "now"}': "has no onset in seconds",
    b'{"trial_type": "up", "duration": 1, "onset": Infinity}': "has no onset in seconds",
    b" " * 70_000: "is longer than 64 kB",
}


@contextmanager
def listening(scheme: str) -> Iterator[Stimulus]:
    with closing(open_stimulus(f"{scheme}://127.0.0.1:0")) as link:
        yield link


def wait_for(there: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def heard(link: Stimulus, n: int) -> list[Said]:
    """Return what was said as soon as it is *n* messages."""
    said: list[Said] = []

    def there() -> bool:
        said.extend(link.said())
        return len(said) >= n

    wait_for(there)
    return said


@contextmanager
def speaker(link: Stimulus) -> Iterator[Callable[[bytes], None]]:
    """A stimulus program of either kind."""
    assert link.address
    where = (link.address.host, link.address.port)
    if isinstance(link, TcpStimulus):
        with socket.create_connection(where) as connection:
            yield lambda message: connection.sendall(message + b"\n")
        return
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 5000)
        push.connect("tcp://{}:{}".format(*where))
        yield push.send


def connected(link: Stimulus) -> socket.socket:
    assert link.address
    connection = socket.create_connection((link.address.host, link.address.port))
    connection.settimeout(20)
    return connection


def thrown_out(connection: socket.socket) -> bool:
    """Wait for the other side to close."""
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


@pytest.mark.parametrize("message", [b"trigger", b" trigger\r", b'{"trigger": true}'])
def test_a_trigger(message: bytes) -> None:
    assert parse(message, 7.0) == Trigger(7.0)


def test_a_block() -> None:
    assert parse(UP, 7.0) == Block(7.0, "up", 20.0, None)
    assert parse(LATER, 7.0) == Block(7.0, "up", 20.0, 40.5)
    assert parse('{"trial_type": "größer", "duration": 0}'.encode(), 7.0).trial_type == "größer"


@pytest.mark.parametrize("message", MALFORMED, ids=lambda message: repr(message[:30]))
def test_what_makes_no_sense_is_told_in_words(message: bytes) -> None:
    with pytest.raises(ValueError, match=MALFORMED[message]):
        parse(message, 0.0)


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["trigger", "trial_type", "duration", "onset"]), inner
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_comes_is_understood_or_refused(message: bytes) -> None:
    try:
        said = parse(message, 1.0)
    except ValueError:
        return
    assert said.came_s == 1.0
    assert isinstance(said, Trigger) or (said.trial_type and 0 <= said.duration_s < 1e6)


@pytest.mark.parametrize("scheme", ["tcp", "zmq"])
def test_messages_are_stamped_when_they_come(scheme: str) -> None:
    with listening(scheme) as link, speaker(link) as say:
        assert link.said() == []
        before_s = time.perf_counter()
        for message in (b"trigger", UP, LATER):
            say(message)
        trigger, up, later = heard(link, 3)
        after_s = time.perf_counter()
        assert link.said() == []
    assert before_s < trigger.came_s <= up.came_s <= later.came_s < after_s
    assert isinstance(trigger, Trigger)
    assert up == Block(up.came_s, "up", 20.0)
    assert later == Block(later.came_s, "up", 20.0, 40.5)
    assert (link.counts.heard, link.counts.malformed, link.counts.dropped) == (3, 0, 0)


@pytest.mark.parametrize("scheme", ["tcp", "zmq"])
def test_the_stimulus_program_may_come_back(scheme: str) -> None:
    with listening(scheme) as link:
        for _ in range(3):
            with speaker(link) as say:
                say(UP)
                assert len(heard(link, 1)) == 1


@pytest.mark.parametrize("scheme", ["tcp", "zmq"])
def test_malformed_messages_are_counted_and_said_once(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [message for message in MALFORMED if len(message) < 60_000]
    with listening(scheme) as link, speaker(link) as say:
        for message in (b'{"trial_type": "Jane Doe"}', *messages, b"trigger"):
            say(message)
        (trigger,) = heard(link, 1)
    assert isinstance(trigger, Trigger)
    assert link.counts.malformed == len(messages) + 1
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.getMessage() for r in warnings] == [
        "ignored a message of the stimulus program: it has no duration in seconds"
    ]
    assert "Doe" not in caplog.text


def test_lines_may_come_in_pieces_and_the_last_without_an_end() -> None:
    with listening("tcp") as link, connected(link) as connection:
        for piece in (b"trig", b"ger\r\n\n \n" + UP[:10], UP[10:] + b"\n" + UP):
            connection.sendall(piece)
            time.sleep(0.02)
        connection.shutdown(socket.SHUT_WR)
        said = heard(link, 3)
    assert [type(one) for one in said] == [Trigger, Block, Block]
    assert link.counts.malformed == 0


def test_too_much_drops_the_oldest(caplog: pytest.LogCaptureFixture) -> None:
    blocks = b"".join(
        b'{"trial_type": "up", "duration": 1, "onset": %d}\n' % i for i in range(MAX_WAITING + 5)
    )
    with listening("tcp") as link, connected(link) as connection:
        connection.sendall(blocks)
        wait_for(lambda: link.counts.heard == MAX_WAITING + 5)
        said = link.said()
    assert [one.onset_s for one in said] == [float(i) for i in range(5, MAX_WAITING + 5)]
    assert link.counts.dropped == 5
    assert caplog.text.count("more than can wait") == 1


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\n\r\ntrigger\n",
        b"x" * 10_000_000,
        b"no\n" * 200,
        b"trigger\n" * 6000,
    ],
    ids=["browser", "10 MB line", "garbage", "flood"],
)
def test_a_stranger_is_thrown_out_and_the_program_is_heard(data: bytes) -> None:
    with listening("tcp") as link, speaker(link) as say:
        say(b"trigger")
        assert len(heard(link, 1)) == 1
        with connected(link) as stranger:
            with suppress(ConnectionError):
                stranger.sendall(data)
            assert thrown_out(stranger)
        link.said()
        say(UP)
        assert UP_NOW in [one._replace(came_s=0.0) for one in heard(link, 1)]
        assert 0 < link.counts.malformed <= 200
        assert 2 <= link.counts.heard <= 2 + MAX_PER_SECOND


def test_who_says_nothing_makes_room() -> None:
    with listening("tcp") as link, ExitStack() as stack, speaker(link) as say:
        say(b"trigger")
        heard(link, 1)
        strangers = [stack.enter_context(connected(link)) for _ in range(30)]
        strangers[-1].sendall(b"{")  # says something, but never all of it
        assert thrown_out(strangers[0])
        say(UP)
        with speaker(link) as other:
            other(UP)
            assert len(heard(link, 2)) == 2


def test_strangers_at_a_zeromq_socket() -> None:
    with listening("zmq") as link, ExitStack() as stack, speaker(link) as say:
        for data in (b"\xff" * 2000, b"GET / HTTP/1.1\r\n\r\n", b""):
            stranger = stack.enter_context(connected(link))
            stranger.sendall(data)
        say(b"x" * 100_000)  # more than it takes: this connection is closed, and made anew
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.setsockopt(zmq.LINGER, 5000)
            assert link.address
            push.connect(f"tcp://127.0.0.1:{link.address.port}")
            push.send_multipart([b"trigger", b"trigger"])
            push.send(b"trigger")
            assert len(heard(link, 1)) == 1
        wait_for(lambda: link.counts.malformed >= 1)
        say(UP)
        assert isinstance(heard(link, 1)[0], Block)


def test_a_flood_waits_at_a_zeromq_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtfmri.stimulus.MAX_PER_SECOND", 100)
    with listening("zmq") as link, speaker(link) as say:
        for _ in range(150):
            say(b"trigger")
        wait_for(lambda: link.counts.malformed == 1)
        assert link.counts.heard == 100
        assert len(heard(link, 149)) == 149  # the others, but for one, when a second is over


class Nobody(Allowed):
    def admits(self, host: str) -> bool:
        return False


@pytest.mark.parametrize("kind", [TcpStimulus, ZmqStimulus])
def test_who_is_not_allowed_is_refused(
    kind: Callable[..., Stimulus], caplog: pytest.LogCaptureFixture
) -> None:
    with closing(kind(Address("127.0.0.1", 0), Nobody())) as link:
        assert link.address
        if kind is TcpStimulus:
            with connected(link) as connection:
                assert thrown_out(connection)
        else:
            with zmq.Context() as context, context.socket(zmq.PUSH) as push:
                push.setsockopt(zmq.LINGER, 0)
                with push.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH) as monitor:
                    push.connect(f"tcp://127.0.0.1:{link.address.port}")
                    assert monitor.poll(20_000)
                    push.disable_monitor()
        wait_for(lambda: "refused a connection" in caplog.text)
    assert link.counts.heard == 0


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("127.0.0.1:5560", r"one of tcp:, zmq:, lsl:; got '127.0.0.1:5560'"),
        ("udp://127.0.0.1:5560", "one of tcp:, zmq:, lsl:"),
        ("tcp://127.0.0.1:port", "an address is //HOST:PORT"),
        ("zmq://127.0.0.1:99999", "an address is //HOST:PORT"),
        ("tcp://192.0.2.1:5560", r"name those that may connect"),
        ("zmq://192.0.2.1:5561", r"name those that may connect"),
        ("tcp://127.0.0.1:0?allow=everybody", "allow must be addresses or networks"),
        ("tcp://127.0.0.1:0?speed=1", "'speed' is not a key"),
        ("lsl:", "needs the name or type of a stream"),
        ("lsl:a'] or ['", "needs the name or type of a stream"),
    ],
)
def test_a_bad_uri_is_refused(uri: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        open_stimulus(uri)


@pytest.mark.parametrize("scheme", ["tcp", "zmq"])
def test_a_port_in_use_is_named(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"stimulus {scheme}:.*cannot listen on .*:{port}"):
            open_stimulus(f"{scheme}://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("module", "uri", "extra"), [("zmq", "zmq://127.0.0.1:0", "zmq"), ("pylsl", "lsl:x", "lsl")]
)
def test_what_is_not_installed_is_named(
    module: str, uri: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'rtfmri\[{extra}\]'"):
        open_stimulus(uri)


@pytest.mark.parametrize("scheme", ["tcp", "zmq"])
def test_closing_ends_everything_and_may_be_done_twice(scheme: str) -> None:
    link = open_stimulus(f"{scheme}://127.0.0.1:0")
    assert link.address
    with speaker(link) as say:
        say(b"trigger")
        heard(link, 1)
        link.close()
        link.close()
    assert not [t for t in threading.enumerate() if t.name == "rtfmri-stimulus"]
    with closing(open_stimulus(f"{scheme}://127.0.0.1:{link.address.port}")):
        pass


def test_markers_of_lsl() -> None:
    lsl = pytest.importorskip("pylsl", reason="LSL is an extra")
    with taking_turns(), closing(open_stimulus("lsl:rtfmri-test-markers")) as link:
        info = lsl.StreamInfo("rtfmri-test-markers", "Markers", 1, 0, "string", "rtfmri-test")
        outlet = lsl.StreamOutlet(info)
        assert outlet.wait_for_consumers(20)
        before_s = time.perf_counter()
        outlet.push_sample(["trigger"])
        outlet.push_sample([UP.decode()], lsl.local_clock() - 3)
        outlet.push_sample(["nonsense"])
        outlet.push_sample([LATER.decode()], time.time())  # not LSL's clock
        trigger, up, later = heard(link, 3)
        after_s = time.perf_counter()
        assert link.counts.malformed == 1
        del outlet
    assert link.address is None
    # LSL knows what its two clocks, here one, differ by to within some 0.2 ms.
    assert before_s - 0.01 < trigger.came_s < after_s
    assert before_s - 3.01 < up.came_s < after_s - 2.99
    assert before_s < later.came_s < after_s
    assert link.lsl_minus_perf_s == pytest.approx(
        lsl.local_clock() - time.perf_counter(), abs=0.01
    )


OUTLET = """
import time, pylsl
info = pylsl.StreamInfo("rtfmri-test-other", "Markers", 1, 0, "string", "rtfmri-test-other")
outlet = pylsl.StreamOutlet(info)
assert outlet.wait_for_consumers(20)
for _ in range(3):
    print(time.clock_gettime(time.CLOCK_MONOTONIC))
    outlet.push_sample(["trigger"])
    time.sleep(0.05)
time.sleep(1)
"""


def test_another_program_with_settings_of_its_own_is_heard() -> None:
    pytest.importorskip("pylsl", reason="LSL is an extra")
    with closing(open_stimulus("lsl:rtfmri-test-other")) as link:
        done = subprocess.run(
            [sys.executable, "-c", OUTLET], stdout=subprocess.PIPE, check=True, timeout=60
        )
        said = heard(link, 3)
        differs_s = time.perf_counter() - time.clock_gettime(time.CLOCK_MONOTONIC)
    for one, sent in zip(said, done.stdout.split(), strict=True):
        assert one.came_s == pytest.approx(float(sent) + differs_s, abs=0.01)


def test_lsl_is_for_this_machine_or_for_others() -> None:
    pytest.importorskip("pylsl", reason="LSL is an extra")
    with (
        closing(open_stimulus("lsl:x?network=0")),
        pytest.raises(ConfigError, match="network must be the same"),
    ):
        open_stimulus("lsl:x?network=1")


def test_a_stream_of_lsl_is_found_by_its_type_and_when_it_is_back() -> None:
    lsl = pytest.importorskip("pylsl", reason="LSL is an extra")
    with taking_turns(), closing(open_stimulus("lsl:rtfmri-test-type")) as link:
        for name in ("first", "second"):
            info = lsl.StreamInfo(name, "rtfmri-test-type", 1, 0, "string")
            outlet = lsl.StreamOutlet(info)
            assert outlet.wait_for_consumers(20)
            outlet.push_sample(["trigger"])
            assert isinstance(heard(link, 1)[0], Trigger)
            del outlet
    assert not [t for t in threading.enumerate() if t.name == "rtfmri-stimulus"]
