"""Pyneal's protocol, read literally: simulation/pynealScanner_sim.py and src/scanReceiver.py."""

import json

import numpy as np
import pytest
import zmq

from dicom_files import PATIENT
from rtfmri.readers import Skipped, open_reader
from rtfmri.readers.network import Address
from rtfmri.simulator.streams import PynealTarget, canonical
from stream_runs import GRID, background, indices, received, skipped, volume, volumes


@pytest.fixture
def context():
    made = zmq.Context()
    yield made
    made.destroy(linger=0)


def header(index: int, data: np.ndarray, **changes: object) -> dict[str, object]:
    return {
        "volIdx": index,
        "TR": 0.1,
        "dtype": str(data.dtype),
        "shape": data.shape,
        "affine": json.dumps(GRID.affine.tolist()),
        "patient": PATIENT,
    } | changes


def scanner(context: zmq.Context, address: Address, *messages: list[bytes]) -> list[str]:
    """Do what Pyneal's scanner side does, and return the answers."""
    pair = context.socket(zmq.PAIR)
    pair.setsockopt(zmq.RCVTIMEO, 20_000)
    pair.connect(f"tcp://{address.host}:{address.port}")
    pair.send_string(f"hello {PATIENT}")
    answers = [pair.recv_string()]
    for frames in messages:
        pair.send_multipart(frames)
        answers.append(pair.recv_string())
    pair.close(linger=1000)
    return answers


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32", "float64", "int64"])
@pytest.mark.parametrize("apart", [True, False])
def test_a_session_as_pyneal_scanner_has_it(context, dtype, apart, caplog):
    caplog.set_level("DEBUG")
    reader = open_reader("pyneal://:0?count=2")
    answers: list[str] = []

    def send() -> None:
        pair = context.socket(zmq.PAIR)
        pair.setsockopt(zmq.RCVTIMEO, 20_000)
        pair.connect(f"tcp://{reader.address.host}:{reader.address.port}")
        pair.send_string(f"hello {PATIENT}")
        answers.append(pair.recv_string())
        for index in range(2):
            data = np.ascontiguousarray(volume(index).data.astype(dtype))
            pair.send_json(header(index, data), 0 if apart else zmq.SNDMORE)
            pair.send(data, copy=False)
            answers.append(pair.recv_string())
        pair.close(linger=1000)

    items = received(reader, send)
    reader.close()
    assert answers == [f"hello {PATIENT}", "Received vol 0", "Received vol 1 - STOP"]
    assert indices(items) == [0, 1]
    for got in volumes(items):
        expected = volume(got.index).data.astype(dtype)
        np.testing.assert_array_equal(got.data, expected)
        np.testing.assert_array_equal(got.grid.affine, GRID.affine)
        assert got.tr_s == 0.1
    assert "DOE" not in caplog.text + repr(items)


def test_headers_of_older_versions(context):
    """They have no TR, and the affine as a list."""
    data = np.ascontiguousarray(volume(0).data)
    told = header(0, data, affine=GRID.affine.tolist())
    del told["TR"]
    reader = open_reader("pyneal://:0?count=1", tr_s=1.5)
    frames = [json.dumps(told).encode(), data.tobytes()]
    items = received(reader, lambda: scanner(context, reader.address, frames))
    reader.close()
    assert volumes(items)[0].tr_s == 1.5


@pytest.mark.parametrize(
    ("changes", "n_bytes", "reason"),
    [
        ({}, 100, "is cut short"),
        ({"affine": "[]"}, None, "has no usable geometry"),
        ({"affine": json.dumps(np.zeros((4, 4)).tolist())}, None, "has no usable geometry"),
        ({"TR": "NaN"}, None, "has no usable repetition time"),
    ],
)
def test_what_cannot_be_used_is_skipped_and_answered(context, changes, n_bytes, reason):
    data = np.ascontiguousarray(volume(0).data)
    frames = [
        [json.dumps(header(i, data, **more)).encode(), data.tobytes()[:n]]
        for i, more, n in ((0, {}, None), (1, changes, n_bytes), (2, {}, None))
    ]
    reader = open_reader("pyneal://:0?timeout_s=0.3")
    answers: list[str] = []
    items = received(reader, lambda: answers.extend(scanner(context, reader.address, *frames)))
    reader.close()
    assert answers[1:] == [f"Received vol {i}" for i in range(3)]
    assert indices(items) == [0, 2]
    assert skipped(items) == [Skipped("volume 1", reason)]


def test_pyneal_would_read_what_the_target_sends(context):
    """Says back the first words, and answers each volume."""
    pair = context.socket(zmq.PAIR)
    pair.setsockopt(zmq.RCVTIMEO, 20_000)
    port = pair.bind_to_random_port("tcp://127.0.0.1")
    target = PynealTarget(Address("127.0.0.1", port))
    got: list[tuple[dict[str, object], np.ndarray]] = []

    def receive() -> None:
        pair.send_string(pair.recv_string())
        for _ in range(2):
            told = pair.recv_json()
            data = np.frombuffer(pair.recv(), told["dtype"]).reshape(told["shape"])
            got.append((told, data))
            pair.send_string(f"Received vol {told['volIdx']}")

    with background(receive):
        for index in range(2):
            target.send(volume(index))
    target.close()
    pair.close(linger=0)
    for index, (told, data) in enumerate(got):
        affine = np.array(json.loads(told["affine"]))
        assert told["volIdx"] == index
        # Its axes go to the right, to the front and up, and every voxel is where it was.
        assert (np.argmax(np.abs(affine[:3, :3]), 0) == [0, 1, 2]).all()
        assert (np.diag(affine) > 0).all()
        np.testing.assert_array_equal(data, canonical(volume(index))[0])
        corner = np.linalg.inv(affine) @ volume(index).grid.affine @ [2, 3, 4, 1]
        i, j, k, _ = np.round(corner).astype(int)
        assert data[i, j, k] == volume(index).data[2, 3, 4]
