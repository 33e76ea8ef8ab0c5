"""Makes docs/faults.md out of what the tests observe: ``python docs/fault_table.py``."""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fault_matrix import FAULTS, N_VOLUMES, TRANSPORTS, observe, table  # noqa: E402

TEXT = f"""# What happens when it goes wrong

Every fault on every transport, as [a test](../tests/test_faults.py) plays it each time the tests
run: a run of {N_VOLUMES} volumes by the simulated scanner, over the real transport. The command
`rtfmri simulate --fault KIND@INDEX` plays the same. Nothing hangs, every run goes on to its
end, and whatever arrived is a result, or is counted, logged and in the recording with its reason.

*Under the number of another*: AFNI's protocol and NIfTI files do not number volumes. They are
counted as they come, so that after one that is lost all others are taken for the one before. Where
that matters, take another transport.

"""


def main() -> None:
    """Observe each cell and write the page."""
    cells = {}
    for fault in FAULTS:
        for transport in TRANSPORTS:
            with tempfile.TemporaryDirectory() as folder:
                cells[fault, transport] = observe(transport, fault, Path(folder))
            print(f"{fault:13} {transport:25} {cells[fault, transport]}", flush=True)
    (ROOT / "docs" / "faults.md").write_text(TEXT + table(cells), encoding="utf-8")


if __name__ == "__main__":
    main()
