"""Independent listeners to a run's feedback: ``python feedback_clients.py KIND WHERE LAST``.

They know nothing of rtfmri: what they get they print, one JSON a line, until volume LAST.
"""

import json
import socket
import sys


def zmq(port: str, last: str) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.connect(f"tcp://127.0.0.1:{port}")
        subscriber.subscribe(b"rtfmri")
        print("ready", flush=True)
        index = -1
        while index < int(last):
            _, message = subscriber.recv_multipart()
            index = json.loads(message)["index"]
            print(message.decode(), flush=True)


def lsl(name: str, last: str) -> None:
    import pylsl

    print("ready", flush=True)
    (found,) = pylsl.resolve_byprop("name", name, timeout=120)
    inlet = pylsl.StreamInlet(found)
    index = -1
    while index < int(last):
        sample, _ = inlet.pull_sample(timeout=120)
        if sample is None:
            break
        message = json.loads(sample[0])
        index = message["index"]
        print(json.dumps(message), flush=True)


def tcp(port: str, last: str) -> None:
    with socket.create_connection(("127.0.0.1", int(port))) as connection:
        print("ready", flush=True)
        for line in connection.makefile():
            print(line, end="", flush=True)
            if json.loads(line).get("index") == int(last):
                return


if __name__ == "__main__":
    {"zmq": zmq, "lsl": lsl, "tcp": tcp}[sys.argv[1]](*sys.argv[2:])
